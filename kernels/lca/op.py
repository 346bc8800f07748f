"""LCA as an operator of PyTorch, with its gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from rlr_fast.kernels import _launch
from rlr_fast.kernels._autograd import register_gradients
from rlr_fast.kernels._launch import Geometry
from rlr_fast.kernels.lca._halo import saves_nothing
from rlr_fast.kernels.lca.backward import launch_backward
from rlr_fast.kernels.lca.forward import launch_forward
from rlr_fast.kernels.reference import prepare_key


@torch.library.custom_op("rlr_fast::local_cross_attention", mutates_args=())
def _forward(
    query: Tensor, key: Tensor, bound: Tensor, value: Tensor, grid: list[int], window: list[int]
) -> tuple[Tensor, Tensor]:
    query, key, value = map(_launch.addressable, (query, key, value))
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    return output, launch_forward(query, key, bound, value, output, Geometry.of(grid, window))


@_forward.register_fake
def _(
    query: Tensor, key: Tensor, bound: Tensor, value: Tensor, grid: list[int], window: list[int]
) -> tuple[Tensor, Tensor]:
    rows = (0,) if saves_nothing(query, Geometry.of(grid, window)) else query.shape[:3]
    saved = query.new_empty(rows, dtype=_launch.accumulator(query.dtype))
    return query.new_empty(query.shape), saved


@torch.library.custom_op("rlr_fast::local_cross_attention_backward", mutates_args=())
def _backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, saved: Tensor,
    grid: list[int], window: list[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    query, key, value = map(_launch.addressable, (query, key, value))
    dq = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    geometry = Geometry.of(grid, window)
    dk, dv = launch_backward(grad, query, key, value, output, saved, dq, geometry)
    return dq, dk.to(key.dtype, copy=True), dv.to(value.dtype, copy=True)


register_gradients(_forward, _backward)


def local_cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: tuple[int, int],
    window: tuple[int, int],
    scale: float,
) -> Tensor:
    """Attend to the keys inside the window: query (B, h, N, d), key and value (h, N, d)."""
    prepared, bound = prepare_key(key, scale)
    return _forward(query, prepared, bound, value, list(grid), list(window))[0]
