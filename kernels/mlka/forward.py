"""MLKA forward: a program owns a block of queries of one image and head, and walks over the keys.

    p_ij = 2**(s_ij - m_i),   o_i = Σ_j p_ij v_j / Σ_j p_ij,   lse_i = m_i + log2 Σ_j p_ij

over the keys j that query i sees, with the scores s = q kᵀ in log2 units. m is the running maximum
of the row. Where the norms of queries and keys bound every score of the block, m is 0: exact to
rounding, and a fifth of the instructions are gone. Deterministic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlr_fast.kernels import _launch
from rlr_fast.kernels._choice import problem_of, require, with_smaller_tiles
from rlr_fast.kernels._dot import dot
from rlr_fast.kernels._launch import Geometry, cdiv
from rlr_fast.kernels._softmax import NO_MAXIMUM, exp2
from rlr_fast.kernels._window import window_range
from rlr_fast.kernels.mlka._blocks import (
    head_of,
    load_rows,
    loop_end,
    query_block,
    store_rows,
    token_at,
    value_strides,
    visible,
)
from rlr_fast.kernels.tiles import RasterTiles

# Scores of at most this magnitude need no maximum. Weights are within 2**±80, which bfloat16 holds
# as well as float32, and the sum of N <= 2**24 of them is at most 2**104: it leaves room for values
# of 2**24, or of 2**36 on 64x64 tokens.
_SAFE_SCORE = tl.constexpr(80.0)
# Score of a hidden key where powers of two are computed on the FMA units, which know no infinity:
# their 2**24 weights of 2**-126 are together 2**-22 of the least weight of a key that is seen.
_HIDDEN_SCORE = tl.constexpr(-126.0)
# A row's sum is below this only if it sees no key.
_NO_KEYS = tl.constexpr(2.0**-100)


@triton.jit
def _attend(
    acc, row_sum, row_max, q, start_m, k, v, k_stride, v_stride, lo, hi,
    N: tl.constexpr, W: tl.constexpr, RY: tl.constexpr, RX: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, INSIDE: tl.constexpr, WINDOWED: tl.constexpr,
    ONLINE: tl.constexpr, FMA_EXP2_EIGHTHS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Accumulate the keys of a block of queries: those of [lo, hi), or all others."""
    first = lo if WINDOWED else 0
    for i in tl.range(first, loop_end(lo, hi, BLOCK_N, N, WINDOWED), BLOCK_N):
        start_n = token_at(i, lo, hi, WINDOWED)
        k_tile = load_rows(k, start_n, BLOCK_N, k_stride, N, D)
        v_tile = load_rows(v, start_n, BLOCK_N, v_stride, N, D)
        s = dot(q, tl.trans(k_tile), None, PRECISION)  # (BLOCK_M, BLOCK_N)
        if WINDOWED or N % BLOCK_N != 0:
            queries = start_m + tl.arange(0, BLOCK_M)[:, None]
            keys = start_n + tl.arange(0, BLOCK_N)[None, :]
            seen = visible(queries, keys, keys, BLOCK_N, N, W, RY, RX, INSIDE, WINDOWED)
            # Scores are masked, not weights: LLVM would move the choice behind the conversion of
            # the weights to half precision, which then goes one by one.
            s = tl.where(seen, s, _HIDDEN_SCORE if FMA_EXP2_EIGHTHS else -float("inf"))
        if ONLINE:
            new_max = tl.maximum(row_max, tl.max(s, 1))
            rescale = tl.exp2(row_max - new_max)
            row_max = new_max
            s -= new_max[:, None]
            acc *= rescale[:, None]
            row_sum *= rescale[:, None]
        p = exp2(s, FMA_EXP2_EIGHTHS)
        # Over the groups of eight columns: within a thread. The rest is summed after the loop.
        row_sum += tl.sum(tl.reshape(p, (BLOCK_M, BLOCK_N // 8, 8)), 1)
        acc = dot(p.to(v_tile.dtype), v_tile, acc, PRECISION)
    return acc, row_sum, row_max


@triton.jit
def _attend_all(
    acc, row_sum, row_max, q, start_m, k, v, k_stride, v_stride,
    H: tl.constexpr, W: tl.constexpr, RY: tl.constexpr, RX: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, INSIDE: tl.constexpr,
    ONLINE: tl.constexpr, FMA_EXP2_EIGHTHS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Accumulate all keys of a block of queries."""
    N: tl.constexpr = H * W
    lo, hi = window_range(start_m, BLOCK_M, BLOCK_N, H, W, RY)
    acc, row_sum, row_max = _attend(
        acc, row_sum, row_max, q, start_m, k, v, k_stride, v_stride, lo, hi,
        N, W, RY, RX, D, BLOCK_M, BLOCK_N, INSIDE, True,
        ONLINE, FMA_EXP2_EIGHTHS, PRECISION,
    )  # fmt: skip
    if not INSIDE:
        acc, row_sum, row_max = _attend(
            acc, row_sum, row_max, q, start_m, k, v, k_stride, v_stride, lo, hi,
            N, W, RY, RX, D, BLOCK_M, BLOCK_N, INSIDE, False,
            ONLINE, FMA_EXP2_EIGHTHS, PRECISION,
        )  # fmt: skip
    return acc, row_sum, row_max


@triton.jit(do_not_specialize=["batch", "heads"])
def forward_kernel(
    q, k, v, o, lse, bound, q_strides, k_strides, v_strides, o_strides, batch, heads,
    H: tl.constexpr, W: tl.constexpr, RY: tl.constexpr, RX: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, INSIDE: tl.constexpr, CERTIFIED: tl.constexpr,
    FMA_EXP2_EIGHTHS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output and lse (B, h, N) of one block of queries; query block fastest, head slowest."""
    N: tl.constexpr = H * W
    ACC: tl.constexpr = lse.dtype.element_ty
    start_m, i_b, i_h = query_block(batch, BLOCK_M, N)
    q = head_of(q, q_strides, i_b, i_h)
    k += i_h * k_strides[0]
    v = head_of(v, v_strides, i_b, i_h)
    o = head_of(o, o_strides, i_b, i_h)
    q_tile = load_rows(q, start_m, BLOCK_M, q_strides[2], N, D)

    acc = tl.zeros((BLOCK_M, D), ACC)
    row_sum = tl.zeros((BLOCK_M, 8), ACC)
    safe = False
    if CERTIFIED:
        # |q · k| <= |q| |k| bounds every score of the tile.
        norm = tl.sqrt(tl.max(tl.sum(q_tile.to(ACC) * q_tile.to(ACC), 1), 0))
        safe = norm * tl.load(bound + i_h) <= _SAFE_SCORE
    if safe:
        row_max = tl.zeros((BLOCK_M,), ACC)
        acc, row_sum, row_max = _attend_all(
            acc, row_sum, row_max, q_tile, start_m, k, v, k_strides[1], v_strides[2],
            H, W, RY, RX, D, BLOCK_M, BLOCK_N, INSIDE,
            False, FMA_EXP2_EIGHTHS, PRECISION,
        )  # fmt: skip
    else:
        row_max = tl.full((BLOCK_M,), NO_MAXIMUM, ACC)
        acc, row_sum, row_max = _attend_all(
            acc, row_sum, row_max, q_tile, start_m, k, v, k_strides[1], v_strides[2],
            H, W, RY, RX, D, BLOCK_M, BLOCK_N, INSIDE, True, 0, PRECISION,
        )  # fmt: skip

    row_sum = tl.sum(row_sum, 1)
    # A row without keys: output 0, and lse = inf makes every weight of its backward 2**-inf = 0.
    some = row_sum > _NO_KEYS
    weight = tl.where(some, 1.0 / tl.where(some, row_sum, 1.0), 0.0)
    store_rows(o, acc * weight[:, None], start_m, BLOCK_M, o_strides[2], N, D)
    row_lse = tl.where(some, row_max + tl.log2(tl.where(some, row_sum, 1.0)), float("inf"))
    offs_m = start_m + tl.arange(0, BLOCK_M)
    tl.store(lse + (i_b * heads + i_h) * N + offs_m, row_lse, mask=offs_m < N)


@with_smaller_tiles
def launch_forward(
    q: Tensor, k: Tensor, bound: Tensor, v: Tensor, o: Tensor, geometry: Geometry, inside: bool
) -> Tensor:
    """Write the output into ``o`` (B, h, N, d), of any strides but the last; return lse."""
    batch, heads, tokens, width = q.shape
    lse = torch.empty((batch, heads, tokens), dtype=_launch.accumulator(q.dtype), device=q.device)
    if batch == 0:
        return lse
    problem = problem_of("raster_forward", q, geometry)
    tile: RasterTiles = require(problem)
    _launch.launch(
        forward_kernel, cdiv(tokens, tile.queries) * batch * heads,
        q, k, v, o, lse, bound,
        q.stride()[:3], k.stride()[:2], value_strides(v), o.stride()[:3], batch, heads,
        **geometry.constants(), D=width, BLOCK_M=tile.queries, BLOCK_N=tile.keys, INSIDE=inside,
        # Weights of 2**±80 fit bfloat16 and float32, not float16.
        CERTIFIED=q.dtype != torch.float16, FMA_EXP2_EIGHTHS=_fma_exp2_eighths(tile, q.dtype),
        PRECISION=_launch.precision(q.dtype), problem=problem, tiles=tile, **tile.options(),
    )  # fmt: skip
    return lse


def _fma_exp2_eighths(tile: RasterTiles, dtype: torch.dtype) -> int:
    """The cubic of exp2 is exact to bfloat16's rounding, not to float32's or float16's."""
    return tile.fma_exp2_eighths if dtype == torch.bfloat16 else 0
