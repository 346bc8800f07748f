"""Inputs and results of the two operators, for tests of any path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gpu import DEVICE, ON_GPU
from torch import Tensor

from rlr_fast.functional import local_cross_attention, masked_learnable_key_attention

LCA, MLKA = local_cross_attention, masked_learnable_key_attention
OPERATORS = [pytest.param(LCA, id="lca"), pytest.param(MLKA, id="mlka")]
EXACT = torch.float32 if ON_GPU else torch.float64


def make_inputs(
    operator: Callable[..., Tensor],
    grid: tuple[int, int],
    batch: int = 2,
    heads: int = 2,
    width: int = 16,
    dtype: torch.dtype = EXACT,
    strided: bool = False,
    shared_value: bool | None = None,
) -> list[Tensor]:
    """Random query, key, value and output gradient; strided ones as slices of (…, N, 3, h, d)."""
    tokens = grid[0] * grid[1]

    def draw(*lead: int) -> Tensor:
        if strided:
            x = torch.randn(*lead, tokens, 3, heads, width, device=DEVICE).to(dtype)
            return x[..., 1, :, :].transpose(-2, -3)
        return torch.randn(*lead, heads, tokens, width, device=DEVICE).to(dtype)

    shared = operator is LCA if shared_value is None else shared_value
    return [draw(batch), draw(), draw() if shared else draw(batch), draw(batch)]


def results(
    operator: Callable[..., Tensor], inputs: list[Tensor], *args: Any, **options: Any
) -> dict[str, Tensor]:
    """Return the output and every gradient."""
    query, key, value = (x.detach().requires_grad_() for x in inputs[:3])
    output = operator(query, key, value, *args, **options)
    grads = torch.autograd.grad(output, (query, key, value), inputs[3])
    return dict(zip(("output", "dquery", "dkey", "dvalue"), (output.detach(), *grads), strict=True))
