"""MLKA's backward kernels: a program owns a block of keys and a chunk of the batch, or queries."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlr_fast.kernels import _launch
from rlr_fast.kernels._dot import dot
from rlr_fast.kernels._launch import Geometry
from rlr_fast.kernels._window import window_range
from rlr_fast.kernels.mlka._blocks import (
    load_rows,
    loop_end,
    place,
    raster_tiles,
    row_values,
    store_rows,
    value_strides,
    visible,
)

_LN2 = tl.constexpr(0.6931471805599453)


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
    o_tile = load_rows(o + i_b * stride_ob + i_h * stride_oh, start_m, BLOCK_M, stride_on, N, D)
    do_tile = load_rows(
        do + i_b * stride_dob + i_h * stride_doh, start_m, BLOCK_M, stride_don, N, D
    )
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
    """Accumulate the queries of one or two neighboring blocks of keys, as `_attend` does."""
    TESTED: tl.constexpr = WINDOWED or N % BLOCK_M != 0 or N % (BLOCKS * BLOCK_N) != 0
    offs_a = start_n + tl.arange(0, BLOCK_N)
    offs_b = offs_a + BLOCK_N
    first = lo if WINDOWED else 0
    for i in tl.range(first, loop_end(lo, hi, BLOCK_M, N, WINDOWED), BLOCK_M):
        start = place(i, lo, hi, WINDOWED)
        offs_m = start + tl.arange(0, BLOCK_M)
        q_tile = load_rows(q, start, BLOCK_M, stride_qn, N, D)
        do_tile = load_rows(do, start, BLOCK_M, stride_don, N, D)
        row_lse = row_values(lse, start, BLOCK_M, N, 0.0)
        row_delta = row_values(delta, start, BLOCK_M, N, 0.0)
        seen = visible(offs_a, offs_m, BLOCK_N, BLOCK_M, N, W, RY, RX, INSIDE, WINDOWED)
        dk_a, dv_a, ds = _key_step(
            dk_a, dv_a, k_a, v_a, q_tile, do_tile, row_lse, row_delta, seen,
            TESTED, PRECISION,
        )  # fmt: skip
        if DQ != "separate":
            dq_tile = dot(tl.trans(ds), k_a, None, PRECISION)
        if BLOCKS == 2:
            seen = visible(
                offs_b, offs_m, BLOCKS * BLOCK_N, BLOCK_M, N, W, RY, RX, INSIDE, WINDOWED
            )
            dk_b, dv_b, ds = _key_step(
                dk_b, dv_b, k_b, v_b, q_tile, do_tile, row_lse, row_delta, seen,
                TESTED, PRECISION,
            )  # fmt: skip
            if DQ != "separate":
                dq_tile = dot(tl.trans(ds), k_b, dq_tile, PRECISION)
        if DQ == "store":
            store_rows(dq, dq_tile * _LN2, start, BLOCK_M, stride_dqn, N, D)
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
    k_a = load_rows(k, start_n, BLOCK_N, stride_kn, N, D)
    k_b = k_a
    if BLOCKS == 2:
        k_b = load_rows(k, start_n + BLOCK_N, BLOCK_N, stride_kn, N, D, BLOCKS)
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
        v_a = load_rows(v_image, start_n, BLOCK_N, stride_vn, N, D)
        v_b = v_a
        if BLOCKS == 2:
            v_b = load_rows(v_image, start_n + BLOCK_N, BLOCK_N, stride_vn, N, D, BLOCKS)
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
            store_rows(dv_image, dv_a, start_n, BLOCK_N, stride_dvn, N, D)
            if BLOCKS == 2:
                store_rows(dv_image, dv_b, start_n + BLOCK_N, BLOCK_N, stride_dvn, N, D, BLOCKS)

    part = (i_c * heads + i_h) * N * D
    store_rows(dk + part, dk_a * _LN2, start_n, BLOCK_N, D, N, D)
    if BLOCKS == 2:
        store_rows(dk + part, dk_b * _LN2, start_n + BLOCK_N, BLOCK_N, D, N, D, BLOCKS)
    if SHARED_VALUE:
        store_rows(dv + part, dv_a, start_n, BLOCK_N, D, N, D)
        if BLOCKS == 2:
            store_rows(dv + part, dv_b, start_n + BLOCK_N, BLOCK_N, D, N, D, BLOCKS)


@triton.jit
def _query_gradient(
    dq, q, do, row_lse, row_delta, offs_m, k, v, stride_kn, stride_vn, lo, hi,
    N: tl.constexpr, W: tl.constexpr, RY: tl.constexpr, RX: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    INSIDE: tl.constexpr, WINDOWED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Accumulate the keys of a block of queries: those of [lo, hi), or all others."""
    first = lo if WINDOWED else 0
    for i in tl.range(first, loop_end(lo, hi, BLOCK_N, N, WINDOWED), BLOCK_N):
        start = place(i, lo, hi, WINDOWED)
        k_tile = load_rows(k, start, BLOCK_N, stride_kn, N, D)
        v_tile = load_rows(v, start, BLOCK_N, stride_vn, N, D)
        x = dot(q, tl.trans(k_tile), None, PRECISION) - row_lse[:, None]
        p = tl.exp2(x)
        if WINDOWED or N % BLOCK_N != 0:
            offs_n = start + tl.arange(0, BLOCK_N)
            seen = visible(offs_m, offs_n, BLOCK_M, BLOCK_N, N, W, RY, RX, INSIDE, WINDOWED)
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
    q_tile = load_rows(q + i_b * stride_qb + i_h * stride_qh, start_m, BLOCK_M, stride_qn, N, D)
    do_tile = load_rows(
        do + i_b * stride_dob + i_h * stride_doh, start_m, BLOCK_M, stride_don, N, D
    )
    row_lse = row_values(lse + (i_b * heads + i_h) * N, start_m, BLOCK_M, N, 0.0)
    row_delta = row_values(delta + (i_b * heads + i_h) * N, start_m, BLOCK_M, N, 0.0)
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
    store_rows(dq, grad * _LN2, start_m, BLOCK_M, stride_dqn, N, D)


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
    tile = raster_tiles("raster_key", q, geometry)
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
        *q.stride()[:3], *k.stride()[:2], *value_strides(v), *do.stride()[:3],
        *dq_buffer.stride()[:3], *dv_buffer.stride()[:3], batch, heads, chunk,
        BLOCK_M=tile.queries, BLOCK_N=tile.keys, BLOCKS=tile.blocks, SHARED_VALUE=shared,
        DQ=mode, **tile.options(),
        **constants,
    )  # fmt: skip
    if mode == "separate":
        tile = raster_tiles("raster_query", q, geometry)
        _launch.launch(
            backward_query_kernel, triton.cdiv(tokens, tile.queries) * batch * heads,
            q, k, v, do, lse, delta, dq,
            *q.stride()[:3], *k.stride()[:2], *value_strides(v), *do.stride()[:3],
            *dq.stride()[:3], batch, heads, BLOCK_M=tile.queries, BLOCK_N=tile.keys,
            **tile.options(),
            **constants,
        )  # fmt: skip
    if mode == "add":
        dq.copy_(dq_buffer)
    sums = parts[:, 0] if chunks == 1 else parts.sum(1)
    return sums[0], sums[1] if shared else None
