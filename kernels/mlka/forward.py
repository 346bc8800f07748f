"""MLKA's forward kernel: a program owns a block of queries of one image and head."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlr_fast.kernels import _launch
from rlr_fast.kernels._dot import dot
from rlr_fast.kernels._launch import Geometry
from rlr_fast.kernels._softmax import NO_MAXIMUM, exp2
from rlr_fast.kernels._window import window_range
from rlr_fast.kernels.mlka._blocks import (
    load_rows,
    loop_end,
    place,
    raster_tiles,
    store_rows,
    value_strides,
    visible,
)
from rlr_fast.kernels.tiles import RasterTiles

# Scores of at most this magnitude need no maximum: 2**±50 and sums of 2**24 of them fit float32,
# and bfloat16 has float32's exponents.
_SAFE_SCORE = tl.constexpr(50.0)


@triton.jit
def _attend(
    acc, row_sum, row_max, q, offs_m, k, v, stride_kn, stride_vn, lo, hi,
    N: tl.constexpr, W: tl.constexpr, RY: tl.constexpr, RX: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    INSIDE: tl.constexpr, WINDOWED: tl.constexpr, ONLINE: tl.constexpr,
    FMA_EXP2_EIGHTHS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Accumulate the keys of a block of queries: those of [lo, hi), or all others."""
    TESTED: tl.constexpr = WINDOWED or N % BLOCK_N != 0
    first = lo if WINDOWED else 0
    for i in tl.range(first, loop_end(lo, hi, BLOCK_N, N, WINDOWED), BLOCK_N):
        start = place(i, lo, hi, WINDOWED)
        k_tile = load_rows(k, start, BLOCK_N, stride_kn, N, D)
        v_tile = load_rows(v, start, BLOCK_N, stride_vn, N, D)
        s = dot(q, tl.trans(k_tile), None, PRECISION)  # (BLOCK_M, BLOCK_N)
        seen = visible(
            offs_m, start + tl.arange(0, BLOCK_N), BLOCK_M, BLOCK_N, N, W, RY, RX, INSIDE, WINDOWED
        )
        if ONLINE:
            if TESTED:
                s = tl.where(seen, s, -float("inf"))
            new_max = tl.maximum(row_max, tl.max(s, 1))
            rescale = tl.exp2(row_max - new_max)
            row_max = new_max
            p = tl.exp2(s - new_max[:, None])
            acc *= rescale[:, None]
            row_sum *= rescale[:, None]
        else:
            p = exp2(s, FMA_EXP2_EIGHTHS)
            if TESTED:
                p = tl.where(seen, p, 0.0)
        # Over the groups of eight columns: within a thread. The rest is summed after the loop.
        row_sum += tl.sum(tl.reshape(p, (BLOCK_M, BLOCK_N // 8, 8)), 1)
        acc = dot(p.to(v_tile.dtype), v_tile, acc, PRECISION)
    return acc, row_sum, row_max


@triton.jit
def _attend_all(
    acc, row_sum, row_max, q, start_m, offs_m, k, v, stride_kn, stride_vn,
    H: tl.constexpr, W: tl.constexpr, RY: tl.constexpr, RX: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, INSIDE: tl.constexpr,
    ONLINE: tl.constexpr, FMA_EXP2_EIGHTHS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Accumulate all keys of a block of queries."""
    N: tl.constexpr = H * W
    lo, hi = window_range(start_m, BLOCK_M, BLOCK_N, H, W, RY)
    acc, row_sum, row_max = _attend(
        acc, row_sum, row_max, q, offs_m, k, v, stride_kn, stride_vn, lo, hi,
        N, W, RY, RX, D, BLOCK_M, BLOCK_N, INSIDE, True, ONLINE, FMA_EXP2_EIGHTHS, PRECISION,
    )  # fmt: skip
    if not INSIDE:
        acc, row_sum, row_max = _attend(
            acc, row_sum, row_max, q, offs_m, k, v, stride_kn, stride_vn, lo, hi,
            N, W, RY, RX, D, BLOCK_M, BLOCK_N, INSIDE, False, ONLINE, FMA_EXP2_EIGHTHS, PRECISION,
        )  # fmt: skip
    return acc, row_sum, row_max


@triton.jit(do_not_specialize=["batch", "heads"])
def forward_kernel(
    q, k, v, o, lse, bound,
    stride_qb, stride_qh, stride_qn, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_ob, stride_oh, stride_on,
    batch, heads,
    H: tl.constexpr, W: tl.constexpr, RY: tl.constexpr, RX: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, INSIDE: tl.constexpr,
    CERTIFIED: tl.constexpr, FMA_EXP2_EIGHTHS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output and lse (B, h, N) of one block of queries; query block fastest, head slowest."""
    N: tl.constexpr = H * W
    ACC: tl.constexpr = tl.float64 if q.dtype.element_ty == tl.float64 else tl.float32
    blocks: tl.constexpr = (N + BLOCK_M - 1) // BLOCK_M
    pid = tl.program_id(0)
    start_m = pid % blocks * BLOCK_M
    i_b = (pid // blocks % batch).to(tl.int64)
    i_h = (pid // blocks // batch).to(tl.int64)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    q_tile = load_rows(q + i_b * stride_qb + i_h * stride_qh, start_m, BLOCK_M, stride_qn, N, D)
    k += i_h * stride_kh
    v += i_b * stride_vb + i_h * stride_vh

    acc = tl.zeros((BLOCK_M, D), ACC)
    row_sum = tl.zeros((BLOCK_M, 8), ACC)
    if CERTIFIED:
        # |q · k| <= |q| |k| bounds every score of the tile. Within the bound the softmax needs no
        # maximum: exact to rounding, and a fifth of the instructions are gone.
        norm = tl.sqrt(tl.max(tl.sum(q_tile.to(ACC) * q_tile.to(ACC), 1), 0))
        if norm * tl.load(bound + i_h) <= _SAFE_SCORE:
            row_max = tl.zeros((BLOCK_M,), ACC)
            acc, row_sum, row_max = _attend_all(
                acc, row_sum, row_max, q_tile, start_m, offs_m, k, v, stride_kn, stride_vn,
                H, W, RY, RX, D, BLOCK_M, BLOCK_N, INSIDE, False, FMA_EXP2_EIGHTHS, PRECISION,
            )  # fmt: skip
        else:
            row_max = tl.full((BLOCK_M,), NO_MAXIMUM, ACC)
            acc, row_sum, row_max = _attend_all(
                acc, row_sum, row_max, q_tile, start_m, offs_m, k, v, stride_kn, stride_vn,
                H, W, RY, RX, D, BLOCK_M, BLOCK_N, INSIDE, True, 0, PRECISION,
            )  # fmt: skip
    else:
        row_max = tl.full((BLOCK_M,), NO_MAXIMUM, ACC)
        acc, row_sum, row_max = _attend_all(
            acc, row_sum, row_max, q_tile, start_m, offs_m, k, v, stride_kn, stride_vn,
            H, W, RY, RX, D, BLOCK_M, BLOCK_N, INSIDE, True, 0, PRECISION,
        )  # fmt: skip

    row_sum = tl.sum(row_sum, 1)
    # A row without keys: output 0, and lse = inf makes every weight of its backward 2**-inf = 0.
    some = row_sum > 0
    weight = tl.where(some, 1.0 / tl.where(some, row_sum, 1.0), 0.0)
    o += i_b * stride_ob + i_h * stride_oh
    store_rows(o, acc * weight[:, None], start_m, BLOCK_M, stride_on, N, D)
    row_lse = tl.where(some, row_max + tl.log2(tl.where(some, row_sum, 1.0)), float("inf"))
    tl.store(lse + (i_b * heads + i_h) * N + offs_m, row_lse, mask=offs_m < N)


def launch_forward(
    q: Tensor, k: Tensor, bound: Tensor, v: Tensor, o: Tensor, geometry: Geometry, inside: bool
) -> Tensor:
    """Write the output into ``o`` (B, h, N, d), of any strides but the last; return lse."""
    batch, heads, tokens, width = q.shape
    lse = torch.empty((batch, heads, tokens), dtype=_launch.accumulator(q.dtype), device=q.device)
    if batch == 0:
        return lse
    tile = raster_tiles("raster_forward", q, geometry)
    _launch.launch(
        forward_kernel, triton.cdiv(tokens, tile.queries) * batch * heads,
        q, k, v, o, lse, bound,
        *q.stride()[:3], *k.stride()[:2], *value_strides(v), *o.stride()[:3], batch, heads,
        **geometry.constants(), D=width, BLOCK_M=tile.queries, BLOCK_N=tile.keys, INSIDE=inside,
        # Weights of 2**±50 fit bfloat16 and float32, not float16.
        CERTIFIED=q.dtype != torch.float16, FMA_EXP2_EIGHTHS=_fma_exp2_eighths(tile, q.dtype),
        PRECISION=_launch.precision(q.dtype), **tile.options(),
    )  # fmt: skip
    return lse


def _fma_exp2_eighths(tile: RasterTiles, dtype: torch.dtype) -> int:
    """The cubic of exp2 is exact to bfloat16's rounding, not to float32's or float16's."""
    return tile.fma_exp2_eighths if dtype == torch.bfloat16 else 0
