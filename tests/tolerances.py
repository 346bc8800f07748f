"""The error budget of the attention paths, measured against the definition in float64."""

from __future__ import annotations

import torch
from torch import Tensor

# Rounding band, in units of the dtype's epsilon times the largest true value: half precision only
# rounds its result, the wider types also sum in another order and with another exponential.
_BAND = {torch.float64: 16, torch.float32: 16, torch.bfloat16: 1, torch.float16: 1}


def assert_within_budget(name: str, actual: Tensor, eager: Tensor, exact: Tensor) -> None:
    """Check that ``actual`` errs at most twice as much as plain PyTorch, plus a rounding band.

    Args:
        name: What is compared, for the message.
        actual: Result under test.
        eager: The definition computed in the same dtype.
        exact: The definition in float64, from the same inputs.
    """
    assert actual.dtype == eager.dtype, f"{name}: dtype {actual.dtype}, expected {eager.dtype}"
    assert actual.shape == exact.shape, f"{name}: {actual.shape}, expected {exact.shape}"
    band = _BAND[actual.dtype] * torch.finfo(actual.dtype).eps * exact.abs().max()
    allowed = 2 * (eager.double() - exact).abs().max() + band
    error = (actual.double() - exact).abs().max()
    # Written so that NaN fails.
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"
