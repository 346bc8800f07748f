"""Distance of tokens to their reconstruction, and its gradient: each reads both tokens once.

    d = 1/C Σ_c (r_c - o_c)² + 1 - cos(r, o),     cos = r · o / (|r|' |o|'),   |x|' = max(|x|, ε)

for each token's r and o (B, N, C); d (B, N) is in float32, or in float64 of either. Backward, with
g the gradient of d, and r / |r| = 0 where r = 0:

    dr = g (2/C (r - o) - (o / |o|' - cos r / |r|) / |r|')

A program owns a few whole tokens, so that nothing is kept for backward and nothing is added
atomically. d is the same with r and o exchanged, and so is its gradient.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlr_fast.kernels import _launch
from rlr_fast.kernels._autograd import refuse_second_derivative

# As `torch.nn.functional.cosine_similarity`.
_LEAST_NORM = tl.constexpr(1e-8)
# Elements of a program's tile: 16 a thread, of each tensor.
_TILE = 2048
# Elements that a thread loads at once, where strides allow: 16 bytes of bfloat16.
_VECTOR = 8


@triton.jit
def _token(rows, N, count):
    """Image, place and existence of each row, counted over the batch."""
    rows = rows.to(tl.int64)
    return rows // N, rows % N, rows < count


@triton.jit
def _load(
    x, stride_b, stride_n, image, place, exists, C: tl.constexpr, BLOCK_C: tl.constexpr,
    UNIT: tl.constexpr, ACC,
):  # fmt: skip
    """Tokens (ROWS, BLOCK_C), zeros beyond C; the strides count UNIT elements each."""
    columns = tl.arange(0, BLOCK_C)[None, :]
    at = x + (image * stride_b + place * stride_n)[:, None] * UNIT + columns
    return tl.load(at, mask=exists[:, None] & (columns < C), other=0.0).to(ACC)


@triton.jit
def _sum_of_products(a, b, UNIT: tl.constexpr):
    """Σ_c a·b of each row, the same number in all threads that hold the row.

    Where a thread loads one element of a row at once, it holds one product, and adds that of
    another thread. Fused with the addition its own product is not rounded, as the other one is, so
    the two threads would hold two sums. A product that is added to zero first is rounded.
    """
    if UNIT == 1:
        return tl.sum(tl.fma(a, b, tl.zeros_like(a)), 1)
    return tl.sum(a * b, 1)


@triton.jit
def _cosine(r, o, UNIT: tl.constexpr, ACC):
    """The norm of r, those of both limited below, and the cosine."""
    least = tl.full((), _LEAST_NORM, ACC)
    norm = tl.sqrt(_sum_of_products(r, r, UNIT))
    r_norm = tl.maximum(norm, least)
    o_norm = tl.maximum(tl.sqrt(_sum_of_products(o, o, UNIT)), least)
    return norm, r_norm, o_norm, _sum_of_products(r, o, UNIT) / (r_norm * o_norm)


@triton.jit(do_not_specialize=["count"])
def forward_kernel(
    r, o, d, stride_rb, stride_rn, stride_ob, stride_on, N, count,
    C: tl.constexpr, BLOCK_C: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The distance of ROWS tokens."""
    ACC: tl.constexpr = d.dtype.element_ty
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    image, place, exists = _token(rows, N, count)
    r_tile = _load(r, stride_rb, stride_rn, image, place, exists, C, BLOCK_C, UNIT, ACC)
    o_tile = _load(o, stride_ob, stride_on, image, place, exists, C, BLOCK_C, UNIT, ACC)
    _, _, _, cosine = _cosine(r_tile, o_tile, UNIT, ACC)
    error = r_tile - o_tile
    square = _sum_of_products(error, error, UNIT)
    tl.store(d + rows, square / C + 1 - cosine, mask=exists)


@triton.jit(do_not_specialize=["count"])
def backward_kernel(
    grad, r, o, dr, stride_gb, stride_gn, stride_rb, stride_rn, stride_ob, stride_on, N, count,
    C: tl.constexpr, BLOCK_C: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The gradient of r of ROWS tokens."""
    ACC: tl.constexpr = grad.dtype.element_ty
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    image, place, exists = _token(rows, N, count)
    r_tile = _load(r, stride_rb, stride_rn, image, place, exists, C, BLOCK_C, UNIT, ACC)
    o_tile = _load(o, stride_ob, stride_on, image, place, exists, C, BLOCK_C, UNIT, ACC)
    g = tl.load(grad + image * stride_gb + place * stride_gn, mask=exists, other=0.0)
    norm, r_norm, o_norm, cosine = _cosine(r_tile, o_tile, UNIT, ACC)
    toward = 1 / (r_norm * o_norm)
    # A token that is all zeros has no direction to turn from.
    turn = tl.where(norm > 0, cosine / (r_norm * tl.where(norm > 0, norm, 1.0)), 0.0)
    found = (r_tile - o_tile) * (2 / C) - o_tile * toward[:, None] + r_tile * turn[:, None]
    columns = tl.arange(0, BLOCK_C)[None, :]
    at = dr + rows.to(tl.int64)[:, None] * C + columns
    found = (found * g[:, None]).to(dr.dtype.element_ty)
    tl.store(at, found, mask=exists[:, None] & (columns < C))


def launch(
    kernel: Any, r: Tensor, o: Tensor, tensors: tuple[Tensor, ...], strides: tuple[int, ...] = ()
) -> None:
    """Launch over all tokens of r and o, with ``strides`` of another tensor before theirs."""
    batch, tokens, channels = r.shape
    block = max(16, _launch.next_power_of_2(channels))
    rows = max(1, _TILE // block)
    programs = _launch.cdiv(batch * tokens, rows)
    theirs = [*r.stride()[:2], *o.stride()[:2]]
    # As a number by which all are known to divide, so that a thread loads so many at once.
    unit = math.gcd(_VECTOR, channels, *theirs)
    if programs:
        _launch.launch(
            kernel, programs, *tensors, *strides, *(stride // unit for stride in theirs),
            tokens, batch * tokens, C=channels, BLOCK_C=block, UNIT=unit, ROWS=rows,
        )  # fmt: skip


@torch.library.custom_op("rlr_fast::token_distance", mutates_args=())
def _forward(reconstructed: Tensor, original: Tensor) -> Tensor:
    r, o = _launch.addressable(reconstructed), _launch.addressable(original)
    distance = r.new_empty(r.shape[:2], dtype=_exact(r, o))
    launch(forward_kernel, r, o, (r, o, distance))
    return distance


@_forward.register_fake
def _(reconstructed: Tensor, original: Tensor) -> Tensor:
    return reconstructed.new_empty(reconstructed.shape[:2], dtype=_exact(reconstructed, original))


@torch.library.custom_op("rlr_fast::token_distance_backward", mutates_args=())
def _backward(grad: Tensor, reconstructed: Tensor, original: Tensor) -> Tensor:
    r, o = _launch.addressable(reconstructed), _launch.addressable(original)
    gradient = torch.empty_like(r, memory_format=torch.contiguous_format)
    launch(backward_kernel, r, o, (grad, r, o, gradient), grad.stride())
    return gradient


@_backward.register_fake
def _(grad: Tensor, reconstructed: Tensor, original: Tensor) -> Tensor:
    return torch.empty_like(reconstructed, memory_format=torch.contiguous_format)


def _exact(r: Tensor, o: Tensor) -> torch.dtype:
    return _launch.accumulator(torch.promote_types(r.dtype, o.dtype))


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    r, o = ctx.saved_tensors
    of_r, of_o = ctx.needs_input_grad
    return _backward(grad, r, o) if of_r else None, _backward(grad, o, r) if of_o else None


_forward.register_autograd(_differentiate, setup_context=_setup_context)
_backward.register_autograd(refuse_second_derivative)


def token_distance(reconstructed: Tensor, original: Tensor) -> Tensor:
    """Return each token's distance (B, N) of two tensors (B, N, C)."""
    return _forward(reconstructed, original)
