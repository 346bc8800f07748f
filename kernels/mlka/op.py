"""MLKA as an operator of PyTorch, with its gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from rlr_fast.kernels import _launch
from rlr_fast.kernels._autograd import register_gradients
from rlr_fast.kernels._launch import Geometry
from rlr_fast.kernels.mlka.backward import launch_backward
from rlr_fast.kernels.mlka.forward import launch_forward
from rlr_fast.kernels.reference import prepare_key


@torch.library.custom_op("rlr_fast::masked_learnable_key_attention", mutates_args=())
def _forward(
    query: Tensor, key: Tensor, bound: Tensor, value: Tensor, grid: list[int], window: list[int]
) -> tuple[Tensor, Tensor]:
    query, key, value = map(_launch.addressable, (query, key, value))
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    geometry = Geometry.of(grid, window)
    return output, launch_forward(query, key, bound, value, output, geometry, inside=False)


@_forward.register_fake
def _(
    query: Tensor, key: Tensor, bound: Tensor, value: Tensor, grid: list[int], window: list[int]
) -> tuple[Tensor, Tensor]:
    lse = query.new_empty(query.shape[:3], dtype=_launch.accumulator(query.dtype))
    return query.new_empty(query.shape), lse


@torch.library.custom_op("rlr_fast::masked_learnable_key_attention_backward", mutates_args=())
def _backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor,
    grid: list[int], window: list[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    query, key, value = map(_launch.addressable, (query, key, value))
    dq = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    dv = None if value.dim() == 3 else torch.empty_like(dq)
    dk, dv_sum = launch_backward(
        grad, query, key, value, output, lse, dq, dv, Geometry.of(grid, window), inside=False
    )
    if dv is None:
        assert dv_sum is not None
        dv = dv_sum.to(value.dtype, copy=True)
    return dq, dk.to(key.dtype, copy=True), dv


register_gradients(_forward, _backward)


def masked_learnable_key_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: tuple[int, int],
    window: tuple[int, int],
    scale: float,
) -> Tensor:
    """Attend to the keys outside the window.

    Args:
        query: (B, h, N, d).
        key: (h, N, d).
        value: (B, h, N, d) or (h, N, d).
        grid: Token grid (H, W), N = H·W.
        window: Odd (height, width) in tokens.
        scale: Factor of the scores.
    """
    prepared, bound = prepare_key(key, scale)
    return _forward(query, prepared, bound, value, list(grid), list(window))[0]
