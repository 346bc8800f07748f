"""Training: features of the training images, the trainer, the run's folder, several processes.

May import `visualization`, `data`, `models` and what lies below them.
"""
