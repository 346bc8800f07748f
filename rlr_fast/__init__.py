"""RLR: multi-class anomaly detection by reconstruction from a learnable reference."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlr_fast.config import RLRConfig, TrainConfig
    from rlr_fast.functional import local_cross_attention, masked_learnable_key_attention
    from rlr_fast.inference.scorer import Scorer
    from rlr_fast.models.attention import LocalCrossAttention, MaskedLearnableKeyAttention
    from rlr_fast.models.rlr import RLRModel, RLROutput

__version__ = "0.1.0"

__all__ = [
    "LocalCrossAttention",
    "MaskedLearnableKeyAttention",
    "RLRConfig",
    "RLRModel",
    "RLROutput",
    "Scorer",
    "TrainConfig",
    "local_cross_attention",
    "masked_learnable_key_attention",
]

# PyTorch is loaded with the first name that needs it: the command's help need not wait for it.
_MODULES = {
    "LocalCrossAttention": "rlr_fast.models.attention",
    "MaskedLearnableKeyAttention": "rlr_fast.models.attention",
    "RLRConfig": "rlr_fast.config",
    "RLRModel": "rlr_fast.models.rlr",
    "RLROutput": "rlr_fast.models.rlr",
    "Scorer": "rlr_fast.inference.scorer",
    "TrainConfig": "rlr_fast.config",
    "local_cross_attention": "rlr_fast.functional",
    "masked_learnable_key_attention": "rlr_fast.functional",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
