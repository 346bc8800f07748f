"""Pictures through a model: in batches, in tiles, and from files.

May import `models`, `data` and what is below them.
"""
