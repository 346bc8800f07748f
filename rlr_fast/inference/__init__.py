"""Using a trained model: batches and tiles of images, prediction, evaluation and its metrics.

May import `training`, `visualization`, `data`, `models` and what lies below them.
"""
