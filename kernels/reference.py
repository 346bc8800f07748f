"""Preparation of a reference's keys, once for all images.

    key' = scale · log2 e · (key - center),   bound_h = max_n |key'_n|

A constant added to all keys changes no softmax. The center is the mean over the tokens of a head,
so that scores q · key', in log2 units, are small: rounding shrinks, and |q| · bound limits every
score. Where a few huge keys decide the mean, it is 0: their share in the mean would be rounded into
every other key. The gradient needs no correction for the center, because the gradients of a
softmax's scores sum to 0 over the keys: d key = scale · log2 e · d key'.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlr_fast.kernels import _launch

_STAGES = tl.constexpr(3)


@triton.jit
def _squares(tile):
    """Return the squared norms of rows.

    Products are rounded before any is added, see `distance._sum_of_products`: fused with the
    addition, threads that hold one row would hold two norms.
    """
    return tl.sum(tl.fma(tile, tile, tl.zeros_like(tile)), 1)


@triton.jit
def prepare_kernel(
    key, prepared, bound, stride_h, stride_n, N, factor,
    D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One head per program: its center, then its keys and their largest norm.

    The mean is taken for what all keys have in common unless it is twice as long as the usual key,
    whose length is the mean of the keys' with the exponent ½, on which a few have little weight.

    Tiles are loaded ahead: a program is alone on its multiprocessor, where nothing else would hide
    the way to memory. More programs per head would need a second launch for the mean.
    """
    ACC: tl.constexpr = bound.dtype.element_ty
    i_h = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    columns = tl.arange(0, D)
    key += i_h * stride_h
    prepared += i_h * N * D
    total = tl.zeros((BLOCK, D), ACC)
    roots = tl.zeros((BLOCK,), ACC)
    for start in tl.range(0, N, BLOCK, num_stages=_STAGES):
        rows = (start + offs).to(tl.int64)
        inside = (rows < N)[:, None]
        tile = tl.load(key + rows[:, None] * stride_n + columns, mask=inside, other=0.0).to(ACC)
        total += tile
        roots += tl.sqrt(tl.sqrt(_squares(tile)))
    mean = tl.sum(total, 0) / N
    usual = tl.sum(roots, 0) / N
    usual *= usual
    length = tl.sqrt(tl.sum(_squares(mean[None, :]), 0))
    # Neither holds of NaN and of infinity, which stay with their keys.
    center = tl.where((length <= 2 * usual) & (length < float("inf")), mean, 0.0)
    largest = tl.zeros((BLOCK,), ACC)
    for start in tl.range(0, N, BLOCK, num_stages=_STAGES):
        rows = (start + offs).to(tl.int64)
        inside = (rows < N)[:, None]
        tile = tl.load(key + rows[:, None] * stride_n + columns, mask=inside, other=0.0).to(ACC)
        tile = ((tile - center[None, :]) * factor).to(prepared.dtype.element_ty)
        tl.store(prepared + rows[:, None] * D + columns, tile, mask=inside)
        tile = tl.where(inside, tile.to(ACC), 0.0)
        largest = tl.maximum(largest, _squares(tile))
    tl.store(bound + i_h, tl.sqrt(tl.max(largest, 0)))


@torch.library.custom_op("rlr_fast::prepare_key", mutates_args=())
def _prepare(key: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    key = _launch.addressable(key)
    heads, tokens, width = key.shape
    prepared = torch.empty((heads, tokens, width), dtype=key.dtype, device=key.device)
    bound = torch.empty((heads,), dtype=_launch.accumulator(key.dtype), device=key.device)
    block = max(16, min(8192 // width, _launch.next_power_of_2(tokens)))
    _launch.launch(
        prepare_kernel, heads,
        key, prepared, bound, key.stride(0), key.stride(1), tokens, scale * math.log2(math.e),
        D=width, BLOCK=block, warps=8,
    )  # fmt: skip
    return prepared, bound


@_prepare.register_fake
def _(key: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return (
        key.new_empty(key.shape),
        key.new_empty((key.shape[0],), dtype=_launch.accumulator(key.dtype)),
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.factor = inputs[1] * math.log2(math.e)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None]:
    return grad * ctx.factor, None


_prepare.register_autograd(_backward, setup_context=_setup_context)


def prepare_key(key: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Center and scale the keys (h, N, d) of a reference, see the module's equation.

    Args:
        key: (h, N, d), of any strides.
        scale: Factor of the scores.

    Returns:
        The keys (h, N, d) in log2 units and in their dtype, and the largest norm of each head's
        keys (h,).
    """
    return _prepare(key, scale)
