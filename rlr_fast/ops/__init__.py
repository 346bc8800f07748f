"""The windowed attention operators in PyTorch: `dense` defines them, `tiled` is portable and fast.

Imports nothing of the package. The Triton kernels of the same operators are `rlr_fast.kernels`, and
`rlr_fast.functional` chooses between them.
"""
