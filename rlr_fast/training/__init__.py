"""Training: features, the trainer, scores of normal images, the run's folder, several processes.

May import `visualization`, `data`, `models` and what lies below them.
"""
