"""The error budget of the attention paths, measured against the definition in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Rounding band, in units of the dtype's epsilon times the largest true value: half precision only
# rounds its result, the wider types also sum in another order and with another exponential.
_BAND = {torch.float64: 16, torch.float32: 16, torch.bfloat16: 1, torch.float16: 1}


def rounded_terms(inputs: Sequence[Tensor]) -> dict[str, float]:
    """Return for each result the size of what is rounded, in float32 or wider, on the way to it.

    A weight errs by as much, relatively, as its score absolutely. A score's gradient is a
    difference of terms as large as the products of output gradient and values: where it is
    nothing, as with one key, what is left of them is rounding, more or less of it by the order in
    which a processor adds.

    Args:
        inputs: Query, key, value and output gradient, ([B,] h, N, d); the scale is ``d**-0.5``.
    """
    query, key, value, grad_output = (x.detach().double() for x in inputs)
    scale = query.shape[-1] ** -0.5
    score = float((query @ key.mT).abs().max()) * scale
    grad_score = float((grad_output @ value.mT).abs().max()) * scale
    largest = {name: float(x.abs().max()) for name, x in (("query", query), ("key", key))}
    return {
        "output": score * float(value.abs().max()),
        "dvalue": score * float(grad_output.abs().max()),
        "dquery": max(1.0, score) * grad_score * largest["key"],
        "dkey": max(1.0, score) * grad_score * largest["query"],
    }


def budget(actual: Tensor, eager: Tensor, exact: Tensor, terms: float) -> tuple[Tensor, Tensor]:
    """Return the largest error of ``actual``, and what is allowed.

    That is twice as much as plain PyTorch errs, plus a rounding band.

    Args:
        actual: Result under test.
        eager: The definition computed in the same dtype.
        exact: The definition in float64, from the same inputs.
        terms: See `rounded_terms`.
    """
    band = _BAND[actual.dtype] * torch.finfo(actual.dtype).eps * exact.abs().max()
    band += torch.finfo(torch.promote_types(actual.dtype, torch.float32)).eps * terms
    allowed = 2 * (eager.double() - exact).abs().max() + band
    return (actual.double() - exact).abs().max(), allowed


def assert_within_budget(
    name: str, actual: Tensor, eager: Tensor, exact: Tensor, terms: float
) -> None:
    """Check that a result is within its `budget`; ``name`` is for the message."""
    assert actual.dtype == eager.dtype, f"{name}: dtype {actual.dtype}, expected {eager.dtype}"
    assert actual.shape == exact.shape, f"{name}: {actual.shape}, expected {exact.shape}"
    error, allowed = budget(actual, eager, exact, terms)
    # Written so that NaN fails.
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"
