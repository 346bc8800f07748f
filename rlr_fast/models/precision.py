"""The precisions that a model computes in: which device has them, and their autocast."""

from __future__ import annotations

from typing import get_args

import torch

from rlr_fast.config import Precision, suggest

_LOWERED = {"bf16": torch.bfloat16, "fp16": torch.float16}


def check_precision(precision: str, device: torch.device) -> None:
    """Refuse a precision that does not exist, or not on this device.

    Raises:
        ValueError: There is no such precision, or the device does not have it.
    """
    known = get_args(Precision)
    if precision not in known:
        raise ValueError(f"precision has no choice {precision!r}; {suggest(precision, known)}")
    if precision == "fp16" and device.type != "cuda":
        raise ValueError(f"precision fp16 needs a CUDA device, got device={str(device)!r}")


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return autocast to ``bf16`` or ``fp16``; for ``fp32`` it is off."""
    return torch.autocast(
        device.type, _LOWERED.get(precision, torch.bfloat16), enabled=precision in _LOWERED
    )
