"""RLR: multi-class anomaly detection by reconstruction from a learnable reference."""

from __future__ import annotations

from rlr_fast.config import RLRConfig, TrainConfig
from rlr_fast.functional import local_cross_attention, masked_learnable_key_attention
from rlr_fast.models.attention import LocalCrossAttention, MaskedLearnableKeyAttention
from rlr_fast.models.rlr import RLRModel, RLROutput

__version__ = "0.1.0"

__all__ = [
    "LocalCrossAttention",
    "MaskedLearnableKeyAttention",
    "RLRConfig",
    "RLRModel",
    "RLROutput",
    "TrainConfig",
    "local_cross_attention",
    "masked_learnable_key_attention",
]
