"""The precisions that a model computes in: which device has them, and their autocast."""

from __future__ import annotations

import functools
import logging
from typing import get_args

import torch
from torch.backends import cpu

from rlr_fast.config import Precision, suggest

_logger = logging.getLogger(__name__)

_LOWERED = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Capabilities, as PyTorch names them, of x86 processors without products of bfloat16 matrices.
_WITHOUT_BF16 = ("AVX2",)


def check_precision(precision: str, device: torch.device) -> None:
    """Refuse a precision that does not exist, or not on this device; warn of one that is emulated.

    Raises:
        ValueError: There is no such precision, or the device does not have it.
    """
    known = get_args(Precision)
    if precision not in known:
        raise ValueError(f"precision has no choice {precision!r}; {suggest(precision, known)}")
    if precision == "fp16" and device.type != "cuda":
        raise ValueError(f"precision fp16 needs a CUDA device, got device={str(device)!r}")
    if precision == "bf16" and device.type == "cpu" and cpu.get_cpu_capability() in _WITHOUT_BF16:
        _warn_of_emulation(cpu.get_cpu_capability())


@functools.cache  # once, not at every batch
def _warn_of_emulation(capability: str) -> None:
    _logger.warning(
        "precision bf16 is emulated on this CPU (%s, without AVX-512) and takes several times as "
        "long as fp32",
        capability,
    )


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return autocast to ``bf16`` or ``fp16``; for ``fp32`` it is off."""
    return torch.autocast(
        device.type, _LOWERED.get(precision, torch.bfloat16), enabled=precision in _LOWERED
    )
