"""A trained model at work: batches and tiles of images, the scorer, decisions, evaluation.

May import `training`, for the processes that share an evaluation, and all below it.
"""
