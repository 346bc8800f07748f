"""The package in other frameworks, which are not installed with it.

May import everything but the command; nothing imports it.
"""
