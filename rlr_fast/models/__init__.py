"""The model: frozen backbone, reconstructors around learnable references, scores, checkpoints.

May import `config`, `files` and `functional`.
"""
