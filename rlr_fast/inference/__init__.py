"""A trained model at work: the scorer, decisions, calibration, evaluation.

May import `training`, for the processes that share an evaluation, and all below it.
"""
