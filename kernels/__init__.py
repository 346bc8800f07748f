"""Triton kernels of the two attention operators and of the token distance, forward and backward.

They import torch and triton alone. `rlr_fast.functional` checks arguments and chooses between them
and the PyTorch paths; these functions are its Triton path and check nothing.
"""

from __future__ import annotations

if __name__ != "rlr_fast.kernels":
    raise ImportError("the kernels are imported as rlr_fast.kernels, not by their folder's name")

from rlr_fast.kernels._launch import (
    LaunchRefused,
    unsupported_device,
    unsupported_reason,
    unsupported_width,
)
from rlr_fast.kernels._trial import refusal
from rlr_fast.kernels.block import block_attention
from rlr_fast.kernels.distance import token_distance
from rlr_fast.kernels.lca import local_cross_attention
from rlr_fast.kernels.mlka import masked_learnable_key_attention
from rlr_fast.kernels.reference import prepare_key

__all__ = [
    "LaunchRefused",
    "block_attention",
    "local_cross_attention",
    "masked_learnable_key_attention",
    "prepare_key",
    "refusal",
    "token_distance",
    "unsupported_device",
    "unsupported_reason",
    "unsupported_width",
]
