"""MLKA: attention to the keys outside a window, with keys that the batch shares.

    output_i = Σ_j softmax_j(q_i · k_j) v_j     over the keys j outside the window of token i

query (B, h, N, d); key (h, N, d) as `prepare_key` leaves it (centred, in log2 units); value
(B, h, N, d), or (h, N, d). A row whose window covers the grid has no key: output 0 and no gradient.
Backward, with P the weights and lse their log2-sum-exp2:

    dV = Pᵀ dO,   dS = P ∘ (dO Vᵀ - delta),   delta_i = dO_i · O_i,   dQ = ln2 · dS K,
    dK = ln2 · Σ_batch dSᵀ Q

Tokens are taken in raster order. The windows of a block of queries lie in one range of keys, the
only one that tests for them; the keys before and after it are one loop that skips it. A block of
keys meets its queries in the same way.

- forward: a program owns a block of queries of one image and head.
- backward: a program owns a block of keys of one head and a chunk of the batch. dV is finished per
  image; dK stays in registers over the chunk, and the few chunks are summed in order. dQ is a sum
  over programs: float32 atomics, or, deterministically, a second kernel that owns queries.

With INSIDE the same kernels attend to the keys inside the window: LCA, for windows too large for
`rlr_fast.kernels.lca` to keep resident.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlr_fast.kernels import _launch
from rlr_fast.kernels._autograd import register_gradients
from rlr_fast.kernels._dot import dot
from rlr_fast.kernels._launch import Geometry
from rlr_fast.kernels._softmax import NO_MAXIMUM, exp2
from rlr_fast.kernels._window import inside_window, window_range
from rlr_fast.kernels.reference import prepare_key
from rlr_fast.kernels.tiles import Problem, RasterTiles, choose

_LN2 = tl.constexpr(0.6931471805599453)
# Scores of at most this magnitude need no maximum: 2**±50 and sums of 2**24 of them fit float32,
# and bfloat16 has float32's exponents.
_SAFE_SCORE = tl.constexpr(50.0)


@triton.jit
def _rows(
    base, start, SIZE: tl.constexpr, stride, N: tl.constexpr, D: tl.constexpr,
    BLOCKS: tl.constexpr = 1,
):  # fmt: skip
    """Rows ``start … start + SIZE - 1`` of an (N, D) matrix with unit column stride, 0 beyond N.

    A program takes BLOCKS such blocks, so that the last of them may lie beyond N altogether.
    """
    offs = tl.arange(0, SIZE)
    columns = tl.arange(0, D)[None, :]
    pointers = base + tl.cast(start, tl.int64) * stride + (offs[:, None] * stride + columns)
    if N % (SIZE * BLOCKS) == 0:
        return tl.load(pointers)
    return tl.load(pointers, mask=(start + offs < N)[:, None], other=0.0)


@triton.jit
def _store_rows(
    base, tile, start, SIZE: tl.constexpr, stride, N: tl.constexpr, D: tl.constexpr,
    BLOCKS: tl.constexpr = 1,
):  # fmt: skip
    """The inverse of `_rows`."""
    offs = tl.arange(0, SIZE)
    columns = tl.arange(0, D)[None, :]
    pointers = base + tl.cast(start, tl.int64) * stride + (offs[:, None] * stride + columns)
    tile = tile.to(base.dtype.element_ty)
    if N % (SIZE * BLOCKS) == 0:
        tl.store(pointers, tile)
    else:
        tl.store(pointers, tile, mask=(start + offs < N)[:, None])


@triton.jit
def _row_values(base, start, SIZE: tl.constexpr, N: tl.constexpr, OTHER: tl.constexpr):
    """One value a row, OTHER beyond N."""
    offs = start + tl.arange(0, SIZE)
    if N % SIZE == 0:
        return tl.load(base + offs)
    return tl.load(base + offs, mask=offs < N, other=OTHER)


@triton.jit
def _place(i, lo, hi, WINDOWED: tl.constexpr):
    """Token of loop index i: the windows lie in [lo, hi), all else is counted around them."""
    if WINDOWED:
        return i
    return tl.where(i < lo, i, i + hi - lo)


@triton.jit
def _last(lo, hi, BLOCK: tl.constexpr, N: tl.constexpr, WINDOWED: tl.constexpr):
    """End of a loop in steps of BLOCK over the windows [lo, hi), or over everything else."""
    if WINDOWED:
        return hi
    return (N + BLOCK - 1) // BLOCK * BLOCK - (hi - lo)


@triton.jit
def _seen(
    rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, N: tl.constexpr, W: tl.constexpr,
    RY: tl.constexpr, RX: tl.constexpr, INSIDE: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """(M, N) bool: which pairs attend to each other; only where a test is needed at all."""
    seen = tl.full((1, 1), True, tl.int1)
    if WINDOWED:
        near = inside_window(rows, columns, W, RY, RX)
        seen = near if INSIDE else ~near
    if N % ROWS != 0:
        seen = seen & (rows < N)[:, None]
    if N % COLUMNS != 0:
        seen = seen & (columns < N)[None, :]
    return seen


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
    for i in tl.range(first, _last(lo, hi, BLOCK_N, N, WINDOWED), BLOCK_N):
        start = _place(i, lo, hi, WINDOWED)
        k_tile = _rows(k, start, BLOCK_N, stride_kn, N, D)
        v_tile = _rows(v, start, BLOCK_N, stride_vn, N, D)
        s = dot(q, tl.trans(k_tile), None, PRECISION)  # (BLOCK_M, BLOCK_N)
        seen = _seen(
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
    q_tile = _rows(q + i_b * stride_qb + i_h * stride_qh, start_m, BLOCK_M, stride_qn, N, D)
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
    _store_rows(o, acc * weight[:, None], start_m, BLOCK_M, stride_on, N, D)
    row_lse = tl.where(some, row_max + tl.log2(tl.where(some, row_sum, 1.0)), float("inf"))
    tl.store(lse + (i_b * heads + i_h) * N + offs_m, row_lse, mask=offs_m < N)


@triton.jit(do_not_specialize=["batch", "heads"])
def delta_kernel(
    o, do, delta,
    stride_ob, stride_oh, stride_on, stride_dob, stride_doh, stride_don, batch, heads,
    N: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Delta (B, h, N) = rowsum(dO ∘ O); head fastest, because heads lie side by side in memory."""
    pid = tl.program_id(0)
    i_h = (pid % heads).to(tl.int64)
    start_m = pid // heads % ((N + BLOCK_M - 1) // BLOCK_M) * BLOCK_M
    i_b = (pid // heads // ((N + BLOCK_M - 1) // BLOCK_M)).to(tl.int64)
    o_tile = _rows(o + i_b * stride_ob + i_h * stride_oh, start_m, BLOCK_M, stride_on, N, D)
    do_tile = _rows(do + i_b * stride_dob + i_h * stride_doh, start_m, BLOCK_M, stride_don, N, D)
    ACC: tl.constexpr = delta.dtype.element_ty
    offs_m = start_m + tl.arange(0, BLOCK_M)
    row_delta = tl.sum(o_tile.to(ACC) * do_tile.to(ACC), 1)
    tl.store(delta + (i_b * heads + i_h) * N + offs_m, row_delta, mask=offs_m < N)


@triton.jit
def _key_step(
    dk, dv, k, v, q, do, lse, delta, seen,
    TESTED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK, dV and Kᵀ dSᵀ of one block of keys and one of queries; scores lie as (keys, queries)."""
    x = dot(k, tl.trans(q), None, PRECISION) - lse[None, :]
    p = tl.exp2(x)
    if TESTED:
        p = tl.where(seen, p, 0.0)
    dv = dot(p.to(do.dtype), do, dv, PRECISION)
    ds = p * (dot(v, tl.trans(do), None, PRECISION) - delta[None, :])
    ds = ds.to(q.dtype)
    dk = dot(ds, q, dk, PRECISION)
    return dk, dv, ds


@triton.jit
def _key_gradients(
    dk_a, dv_a, dk_b, dv_b, k_a, v_a, k_b, v_b, start_n,
    q, do, lse, delta, dq, stride_qn, stride_don, stride_dqn, lo, hi,
    N: tl.constexpr, W: tl.constexpr, RY: tl.constexpr, RX: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCKS: tl.constexpr,
    INSIDE: tl.constexpr, WINDOWED: tl.constexpr, DQ: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Accumulate the queries of one or two neighbouring blocks of keys, as `_attend` does."""
    TESTED: tl.constexpr = WINDOWED or N % BLOCK_M != 0 or N % (BLOCKS * BLOCK_N) != 0
    offs_a = start_n + tl.arange(0, BLOCK_N)
    offs_b = offs_a + BLOCK_N
    first = lo if WINDOWED else 0
    for i in tl.range(first, _last(lo, hi, BLOCK_M, N, WINDOWED), BLOCK_M):
        start = _place(i, lo, hi, WINDOWED)
        offs_m = start + tl.arange(0, BLOCK_M)
        q_tile = _rows(q, start, BLOCK_M, stride_qn, N, D)
        do_tile = _rows(do, start, BLOCK_M, stride_don, N, D)
        row_lse = _row_values(lse, start, BLOCK_M, N, 0.0)
        row_delta = _row_values(delta, start, BLOCK_M, N, 0.0)
        seen = _seen(offs_a, offs_m, BLOCK_N, BLOCK_M, N, W, RY, RX, INSIDE, WINDOWED)
        dk_a, dv_a, ds = _key_step(
            dk_a, dv_a, k_a, v_a, q_tile, do_tile, row_lse, row_delta, seen,
            TESTED, PRECISION,
        )  # fmt: skip
        if DQ != "separate":
            dq_tile = dot(tl.trans(ds), k_a, None, PRECISION)
        if BLOCKS == 2:
            seen = _seen(offs_b, offs_m, BLOCKS * BLOCK_N, BLOCK_M, N, W, RY, RX, INSIDE, WINDOWED)
            dk_b, dv_b, ds = _key_step(
                dk_b, dv_b, k_b, v_b, q_tile, do_tile, row_lse, row_delta, seen,
                TESTED, PRECISION,
            )  # fmt: skip
            if DQ != "separate":
                dq_tile = dot(tl.trans(ds), k_b, dq_tile, PRECISION)
        if DQ == "store":
            _store_rows(dq, dq_tile * _LN2, start, BLOCK_M, stride_dqn, N, D)
        if DQ == "add":
            offs = tl.arange(0, BLOCK_M)[:, None] * stride_dqn + tl.arange(0, D)[None, :]
            pointers = dq + tl.cast(start, tl.int64) * stride_dqn + offs
            if N % BLOCK_M == 0:
                tl.atomic_add(pointers, dq_tile * _LN2, sem="relaxed")
            else:
                tl.atomic_add(pointers, dq_tile * _LN2, mask=(offs_m < N)[:, None], sem="relaxed")
    return dk_a, dv_a, dk_b, dv_b


@triton.jit(do_not_specialize=["batch", "heads", "chunk"])
def backward_key_kernel(
    q, k, v, do, lse, delta, dq, dk, dv,
    stride_qb, stride_qh, stride_qn, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_dob, stride_doh, stride_don,
    stride_dqb, stride_dqh, stride_dqn, stride_dvb, stride_dvh, stride_dvn,
    batch, heads, chunk,
    H: tl.constexpr, W: tl.constexpr, RY: tl.constexpr, RX: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCKS: tl.constexpr,
    INSIDE: tl.constexpr, SHARED_VALUE: tl.constexpr, DQ: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dV, and dK (chunks, h, N, D) of BLOCKS·BLOCK_N keys and ``chunk`` images; key block fastest.

    DQ says what becomes of dQ: "add" it atomically to a float32 buffer of zeros; "store" it, where
    one program holds all keys; or keep it "separate", for `backward_query_kernel`. With
    SHARED_VALUE, dV is a sum over the chunk like dK.
    """
    N: tl.constexpr = H * W
    KEYS: tl.constexpr = BLOCKS * BLOCK_N
    ACC: tl.constexpr = lse.dtype.element_ty
    pid = tl.program_id(0)
    blocks: tl.constexpr = (N + KEYS - 1) // KEYS
    chunks = (batch + chunk - 1) // chunk
    start_n = pid % blocks * KEYS
    i_c = pid // blocks % chunks
    i_h = (pid // blocks // chunks).to(tl.int64)
    k += i_h * stride_kh
    k_a = _rows(k, start_n, BLOCK_N, stride_kn, N, D)
    k_b = k_a
    if BLOCKS == 2:
        k_b = _rows(k, start_n + BLOCK_N, BLOCK_N, stride_kn, N, D, BLOCKS)
    dk_a = tl.zeros((BLOCK_N, D), ACC)
    dv_a = tl.zeros((BLOCK_N, D), ACC)
    dk_b, dv_b = dk_a, dv_a
    lo, hi = window_range(start_n, KEYS, BLOCK_M, H, W, RY)

    for i in range(i_c * chunk, tl.minimum(i_c * chunk + chunk, batch)):
        i_b = tl.cast(i, tl.int64)
        q_image = q + i_b * stride_qb + i_h * stride_qh
        do_image = do + i_b * stride_dob + i_h * stride_doh
        v_image = v + i_b * stride_vb + i_h * stride_vh
        dq_image = dq + i_b * stride_dqb + i_h * stride_dqh
        lse_image = lse + (i_b * heads + i_h) * N
        delta_image = delta + (i_b * heads + i_h) * N
        v_a = _rows(v_image, start_n, BLOCK_N, stride_vn, N, D)
        v_b = v_a
        if BLOCKS == 2:
            v_b = _rows(v_image, start_n + BLOCK_N, BLOCK_N, stride_vn, N, D, BLOCKS)
        if not SHARED_VALUE:
            dv_a = tl.zeros((BLOCK_N, D), ACC)
            dv_b = dv_a
        dk_a, dv_a, dk_b, dv_b = _key_gradients(
            dk_a, dv_a, dk_b, dv_b, k_a, v_a, k_b, v_b, start_n,
            q_image, do_image, lse_image, delta_image, dq_image,
            stride_qn, stride_don, stride_dqn, lo, hi,
            N, W, RY, RX, D, BLOCK_M, BLOCK_N, BLOCKS, INSIDE, True, DQ, PRECISION,
        )  # fmt: skip
        if not INSIDE:
            dk_a, dv_a, dk_b, dv_b = _key_gradients(
                dk_a, dv_a, dk_b, dv_b, k_a, v_a, k_b, v_b, start_n,
                q_image, do_image, lse_image, delta_image, dq_image,
                stride_qn, stride_don, stride_dqn, lo, hi,
                N, W, RY, RX, D, BLOCK_M, BLOCK_N, BLOCKS, INSIDE, False, DQ, PRECISION,
            )  # fmt: skip
        if not SHARED_VALUE:
            dv_image = dv + i_b * stride_dvb + i_h * stride_dvh
            _store_rows(dv_image, dv_a, start_n, BLOCK_N, stride_dvn, N, D)
            if BLOCKS == 2:
                _store_rows(dv_image, dv_b, start_n + BLOCK_N, BLOCK_N, stride_dvn, N, D, BLOCKS)

    part = (i_c * heads + i_h) * N * D
    _store_rows(dk + part, dk_a * _LN2, start_n, BLOCK_N, D, N, D)
    if BLOCKS == 2:
        _store_rows(dk + part, dk_b * _LN2, start_n + BLOCK_N, BLOCK_N, D, N, D, BLOCKS)
    if SHARED_VALUE:
        _store_rows(dv + part, dv_a, start_n, BLOCK_N, D, N, D)
        if BLOCKS == 2:
            _store_rows(dv + part, dv_b, start_n + BLOCK_N, BLOCK_N, D, N, D, BLOCKS)


@triton.jit
def _query_gradient(
    dq, q, do, row_lse, row_delta, offs_m, k, v, stride_kn, stride_vn, lo, hi,
    N: tl.constexpr, W: tl.constexpr, RY: tl.constexpr, RX: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    INSIDE: tl.constexpr, WINDOWED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Accumulate the keys of a block of queries: those of [lo, hi), or all others."""
    first = lo if WINDOWED else 0
    for i in tl.range(first, _last(lo, hi, BLOCK_N, N, WINDOWED), BLOCK_N):
        start = _place(i, lo, hi, WINDOWED)
        k_tile = _rows(k, start, BLOCK_N, stride_kn, N, D)
        v_tile = _rows(v, start, BLOCK_N, stride_vn, N, D)
        x = dot(q, tl.trans(k_tile), None, PRECISION) - row_lse[:, None]
        p = tl.exp2(x)
        if WINDOWED or N % BLOCK_N != 0:
            offs_n = start + tl.arange(0, BLOCK_N)
            seen = _seen(offs_m, offs_n, BLOCK_M, BLOCK_N, N, W, RY, RX, INSIDE, WINDOWED)
            p = tl.where(seen, p, 0.0)
        ds = p * (dot(do, tl.trans(v_tile), None, PRECISION) - row_delta[:, None])
        dq = dot(ds.to(k_tile.dtype), k_tile, dq, PRECISION)
    return dq


@triton.jit(do_not_specialize=["batch", "heads"])
def backward_query_kernel(
    q, k, v, do, lse, delta, dq,
    stride_qb, stride_qh, stride_qn, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_dob, stride_doh, stride_don,
    stride_dqb, stride_dqh, stride_dqn,
    batch, heads,
    H: tl.constexpr, W: tl.constexpr, RY: tl.constexpr, RX: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, INSIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """DQ of one block of queries, in fixed order; query block fastest, head slowest."""
    N: tl.constexpr = H * W
    blocks: tl.constexpr = (N + BLOCK_M - 1) // BLOCK_M
    pid = tl.program_id(0)
    start_m = pid % blocks * BLOCK_M
    i_b = (pid // blocks % batch).to(tl.int64)
    i_h = (pid // blocks // batch).to(tl.int64)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    q_tile = _rows(q + i_b * stride_qb + i_h * stride_qh, start_m, BLOCK_M, stride_qn, N, D)
    do_tile = _rows(do + i_b * stride_dob + i_h * stride_doh, start_m, BLOCK_M, stride_don, N, D)
    row_lse = _row_values(lse + (i_b * heads + i_h) * N, start_m, BLOCK_M, N, 0.0)
    row_delta = _row_values(delta + (i_b * heads + i_h) * N, start_m, BLOCK_M, N, 0.0)
    k += i_h * stride_kh
    v += i_b * stride_vb + i_h * stride_vh
    lo, hi = window_range(start_m, BLOCK_M, BLOCK_N, H, W, RY)
    grad = tl.zeros((BLOCK_M, D), lse.dtype.element_ty)
    grad = _query_gradient(
        grad, q_tile, do_tile, row_lse, row_delta, offs_m, k, v, stride_kn, stride_vn, lo, hi,
        N, W, RY, RX, D, BLOCK_M, BLOCK_N, INSIDE, True, PRECISION,
    )  # fmt: skip
    if not INSIDE:
        grad = _query_gradient(
            grad, q_tile, do_tile, row_lse, row_delta, offs_m, k, v, stride_kn, stride_vn, lo, hi,
            N, W, RY, RX, D, BLOCK_M, BLOCK_N, INSIDE, False, PRECISION,
        )  # fmt: skip
    dq += i_b * stride_dqb + i_h * stride_dqh
    _store_rows(dq, grad * _LN2, start_m, BLOCK_M, stride_dqn, N, D)


def _tiles(kernel: str, q: Tensor, geometry: Geometry) -> RasterTiles:
    batch, _, _, width = q.shape
    return choose(Problem(kernel, geometry, width, batch, q.dtype, q.device))


def launch_forward(
    q: Tensor, k: Tensor, bound: Tensor, v: Tensor, o: Tensor, geometry: Geometry, inside: bool
) -> Tensor:
    """Write the output into ``o`` (B, h, N, d), of any strides but the last; return lse."""
    batch, heads, tokens, width = q.shape
    lse = torch.empty((batch, heads, tokens), dtype=_launch.accumulator(q.dtype), device=q.device)
    if batch == 0:
        return lse
    tile = _tiles("raster_forward", q, geometry)
    _launch.launch(
        forward_kernel, triton.cdiv(tokens, tile.queries) * batch * heads,
        q, k, v, o, lse, bound,
        *q.stride()[:3], *k.stride()[:2], *_value_strides(v), *o.stride()[:3], batch, heads,
        **geometry.constants(), D=width, BLOCK_M=tile.queries, BLOCK_N=tile.keys, INSIDE=inside,
        # Weights of 2**±50 fit bfloat16 and float32, not float16.
        CERTIFIED=q.dtype != torch.float16, FMA_EXP2_EIGHTHS=_fma_exp2_eighths(tile, q.dtype),
        PRECISION=_launch.precision(q.dtype), **tile.options(),
    )  # fmt: skip
    return lse


def launch_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor,
    dq: Tensor, dv: Tensor | None, geometry: Geometry, inside: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Write dQ into ``dq`` and, of a value a image, dV into ``dv``.

    Returns:
        dK, and dV of a value that the batch shares, both (h, N, d) in the accumulator's dtype.
    """
    batch, heads, tokens, width = q.shape
    shared = v.dim() == 3
    exact = _launch.accumulator(q.dtype)
    if batch == 0:
        zeros = torch.zeros((heads, tokens, width), dtype=exact, device=q.device)
        return zeros, zeros.clone() if shared else None
    do = _launch.unit_columns(do)
    tile = _tiles("raster_key", q, geometry)
    keys = tile.keys * tile.blocks
    programs = triton.cdiv(tokens, keys) * heads
    chunk = triton.cdiv(batch, min(batch, max(1, _launch.PROGRAMS // programs)))
    chunks = triton.cdiv(batch, chunk)
    if tokens <= keys:
        mode, dq_buffer = "store", dq
    elif tile.separate_dq or torch.are_deterministic_algorithms_enabled():
        mode, dq_buffer = "separate", dq
    else:
        mode, dq_buffer = "add", torch.zeros(dq.shape, dtype=exact, device=dq.device)
    parts = torch.empty((1 + shared, chunks, heads, tokens, width), dtype=exact, device=q.device)
    dv_buffer = parts[1] if shared else dv
    assert dv_buffer is not None
    delta = torch.empty_like(lse)
    constants: dict[str, Any] = {**geometry.constants(), "D": width, "INSIDE": inside}
    constants["PRECISION"] = _launch.precision(q.dtype)
    _launch.launch(
        delta_kernel, triton.cdiv(tokens, 128) * batch * heads,
        o, do, delta, *o.stride()[:3], *do.stride()[:3], batch, heads,
        N=tokens, D=width, BLOCK_M=128,
    )  # fmt: skip
    _launch.launch(
        backward_key_kernel, programs * chunks,
        q, k, v, do, lse, delta, dq_buffer, parts[0], dv_buffer,
        *q.stride()[:3], *k.stride()[:2], *_value_strides(v), *do.stride()[:3],
        *dq_buffer.stride()[:3], *dv_buffer.stride()[:3], batch, heads, chunk,
        BLOCK_M=tile.queries, BLOCK_N=tile.keys, BLOCKS=tile.blocks, SHARED_VALUE=shared,
        DQ=mode, **tile.options(),
        **constants,
    )  # fmt: skip
    if mode == "separate":
        tile = _tiles("raster_query", q, geometry)
        _launch.launch(
            backward_query_kernel, triton.cdiv(tokens, tile.queries) * batch * heads,
            q, k, v, do, lse, delta, dq,
            *q.stride()[:3], *k.stride()[:2], *_value_strides(v), *do.stride()[:3],
            *dq.stride()[:3], batch, heads, BLOCK_M=tile.queries, BLOCK_N=tile.keys,
            **tile.options(),
            **constants,
        )  # fmt: skip
    if mode == "add":
        dq.copy_(dq_buffer)
    sums = parts[:, 0] if chunks == 1 else parts.sum(1)
    return sums[0], sums[1] if shared else None


def _value_strides(v: Tensor) -> tuple[int, int, int]:
    """Strides (batch, head, token) of a value, with 0 for a batch that shares it."""
    strides = v.stride()[:-1]
    return (0, *strides) if v.dim() == 3 else strides  # type: ignore[return-value]


def _fma_exp2_eighths(tile: RasterTiles, dtype: torch.dtype) -> int:
    """The cubic of exp2 is exact to bfloat16's rounding, not to float32's or float16's."""
    return tile.fma_exp2_eighths if dtype == torch.bfloat16 else 0


@torch.library.custom_op("rlr_fast::masked_learnable_key_attention", mutates_args=())
def _forward(
    query: Tensor, key: Tensor, bound: Tensor, value: Tensor, grid: list[int], window: list[int]
) -> tuple[Tensor, Tensor]:
    query, key, value = map(_launch.unit_columns, (query, key, value))
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
    query, key, value = map(_launch.unit_columns, (query, key, value))
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
