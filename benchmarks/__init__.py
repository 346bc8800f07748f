"""Benchmarks of rlr_fast: what is timed, against what, and how the figures become tables."""
