"""MLKA backward: a program owns a block of keys of one head, and walks over a chunk of the batch.

    P = 2**(s - lse),   dV = Pᵀ dO,   dS = P ∘ (dO Vᵀ - delta),   delta_i = dO_i · O_i,
    dK = ln2 · Σ_batch dSᵀ Q,   dQ = ln2 · dS K

dV is finished per image; dK stays in registers over the chunk, and the few chunks are summed in
order. dQ is a sum over the blocks of keys, that is over programs: where one program holds all keys
it is stored, else added by float32 atomics, or left to a second kernel that owns queries and
computes the weights again. Deterministic but for the atomics. delta comes with dQ: from the program
that holds all keys, from the second kernel, or before the atomics from a kernel of its own.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlr_fast.kernels import _launch
from rlr_fast.kernels._choice import problem_of, require, with_smaller_tiles
from rlr_fast.kernels._dot import dot
from rlr_fast.kernels._launch import Geometry, cdiv
from rlr_fast.kernels._window import window_range
from rlr_fast.kernels.mlka._blocks import (
    add_rows,
    head_of,
    load_row_values,
    load_rows,
    loop_end,
    query_block,
    store_rows,
    token_at,
    value_strides,
    visible,
)
from rlr_fast.kernels.tiles import RasterTiles

_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _delta(o, do, ACC: tl.constexpr):
    """Row sums of dO ∘ O."""
    return tl.sum(o.to(ACC) * do.to(ACC), 1)


@triton.jit(do_not_specialize=["batch", "heads"])
def delta_kernel(
    o, do, delta, o_strides, do_strides, batch, heads,
    N: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Delta (B, h, N) = rowsum(dO ∘ O); head fastest, because heads lie side by side in memory."""
    blocks: tl.constexpr = (N + BLOCK_M - 1) // BLOCK_M
    pid = tl.program_id(0)
    i_h = (pid % heads).to(tl.int64)
    start_m = pid // heads % blocks * BLOCK_M
    i_b = (pid // heads // blocks).to(tl.int64)
    o_tile = load_rows(head_of(o, o_strides, i_b, i_h), start_m, BLOCK_M, o_strides[2], N, D)
    do_tile = load_rows(head_of(do, do_strides, i_b, i_h), start_m, BLOCK_M, do_strides[2], N, D)
    row_delta = _delta(o_tile, do_tile, delta.dtype.element_ty)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    tl.store(delta + (i_b * heads + i_h) * N + offs_m, row_delta, mask=offs_m < N)


@triton.jit
def _key_step(
    dk, dv, k, v, q, do, row_lse, row_delta, start_n, start_m,
    N: tl.constexpr, W: tl.constexpr, RY: tl.constexpr, RX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, KEYS: tl.constexpr,
    INSIDE: tl.constexpr, WINDOWED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to dK and dV what a block of keys and one of queries give; dS (keys, queries) as well."""
    p = tl.exp2(dot(k, tl.trans(q), None, PRECISION) - row_lse[None, :])
    if WINDOWED or N % KEYS != 0:
        queries = start_m + tl.arange(0, BLOCK_M)[None, :]
        keys = start_n + tl.arange(0, BLOCK_N)[:, None]
        seen = visible(keys, queries, keys, KEYS, N, W, RY, RX, INSIDE, WINDOWED)
        p = tl.where(seen, p, 0.0)
    dv = dot(p.to(do.dtype), do, dv, PRECISION)
    ds = p * (dot(v, tl.trans(do), None, PRECISION) - row_delta[None, :])
    ds = ds.to(q.dtype)
    return dot(ds, q, dk, PRECISION), dv, ds


@triton.jit
def _key_gradients(
    dk_a, dv_a, dk_b, dv_b, k_a, v_a, k_b, v_b, start_n,
    q, o, do, lse, delta, dq, q_stride, o_stride, do_stride, dq_stride, lo, hi,
    N: tl.constexpr, W: tl.constexpr, RY: tl.constexpr, RX: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCKS: tl.constexpr,
    INSIDE: tl.constexpr, WINDOWED: tl.constexpr, DQ: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Accumulate the queries of one or two blocks of keys: those of [lo, hi), or all others."""
    KEYS: tl.constexpr = BLOCKS * BLOCK_N
    first = lo if WINDOWED else 0
    for i in tl.range(first, loop_end(lo, hi, BLOCK_M, N, WINDOWED), BLOCK_M):
        start_m = token_at(i, lo, hi, WINDOWED)
        q_tile = load_rows(q, start_m, BLOCK_M, q_stride, N, D)
        do_tile = load_rows(do, start_m, BLOCK_M, do_stride, N, D)
        row_lse = load_row_values(lse, start_m, BLOCK_M, N)
        if DQ == "store":
            o_tile = load_rows(o, start_m, BLOCK_M, o_stride, N, D)
            row_delta = _delta(o_tile, do_tile, lse.dtype.element_ty)
        else:
            row_delta = load_row_values(delta, start_m, BLOCK_M, N)
        dk_a, dv_a, ds = _key_step(
            dk_a, dv_a, k_a, v_a, q_tile, do_tile, row_lse, row_delta, start_n, start_m,
            N, W, RY, RX, BLOCK_M, BLOCK_N, KEYS, INSIDE, WINDOWED, PRECISION,
        )  # fmt: skip
        if DQ != "separate":
            dq_tile = dot(tl.trans(ds), k_a, None, PRECISION)
        if BLOCKS == 2:
            dk_b, dv_b, ds = _key_step(
                dk_b, dv_b, k_b, v_b, q_tile, do_tile, row_lse, row_delta,
                start_n + BLOCK_N, start_m,
                N, W, RY, RX, BLOCK_M, BLOCK_N, KEYS, INSIDE, WINDOWED, PRECISION,
            )  # fmt: skip
            if DQ != "separate":
                dq_tile = dot(tl.trans(ds), k_b, dq_tile, PRECISION)
        if DQ == "store":
            store_rows(dq, dq_tile * _LN2, start_m, BLOCK_M, dq_stride, N, D)
        if DQ == "add":
            add_rows(dq, dq_tile * _LN2, start_m, BLOCK_M, dq_stride, N, D)
    return dk_a, dv_a, dk_b, dv_b


@triton.jit
def _load_keys(
    base, start_n, BLOCK_N: tl.constexpr, BLOCKS: tl.constexpr, stride, N: tl.constexpr,
    D: tl.constexpr,
):  # fmt: skip
    """The rows of a program's blocks of keys; one block stands for both."""
    a = load_rows(base, start_n, BLOCK_N, stride, N, D, BLOCKS)
    b = a
    if BLOCKS == 2:
        b = load_rows(base, start_n + BLOCK_N, BLOCK_N, stride, N, D, BLOCKS)
    return a, b


@triton.jit
def _store_keys(
    base, a, b, start_n, BLOCK_N: tl.constexpr, BLOCKS: tl.constexpr, stride, N: tl.constexpr,
    D: tl.constexpr,
):  # fmt: skip
    """The inverse of `_load_keys`."""
    store_rows(base, a, start_n, BLOCK_N, stride, N, D, BLOCKS)
    if BLOCKS == 2:
        store_rows(base, b, start_n + BLOCK_N, BLOCK_N, stride, N, D, BLOCKS)


@triton.jit(do_not_specialize=["batch", "heads", "chunk"])
def backward_key_kernel(
    q, k, v, o, do, lse, delta, dq, dk, dv,
    q_strides, k_strides, v_strides, o_strides, do_strides, dq_strides, dv_strides,
    batch, heads, chunk,
    H: tl.constexpr, W: tl.constexpr, RY: tl.constexpr, RX: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCKS: tl.constexpr, INSIDE: tl.constexpr,
    SHARED_VALUE: tl.constexpr, DQ: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dV, and dK (chunks, h, N, D) of BLOCKS·BLOCK_N keys and ``chunk`` images; key block fastest.

    DQ says what becomes of dQ: "add" it atomically to a float32 buffer of zeros; "store" it, where
    one program holds all keys; or leave it "separate", to `backward_query_kernel`. To store it
    takes ``o``, all else takes ``delta``; the other is None. With SHARED_VALUE, dV is a sum over
    the chunk like dK.
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
    k_a, k_b = _load_keys(k + i_h * k_strides[0], start_n, BLOCK_N, BLOCKS, k_strides[1], N, D)
    dk_a = tl.zeros((BLOCK_N, D), ACC)
    dk_b, dv_a, dv_b = dk_a, dk_a, dk_a
    lo, hi = window_range(start_n, KEYS, BLOCK_M, H, W, RY)

    for i in range(i_c * chunk, tl.minimum(i_c * chunk + chunk, batch)):
        i_b = tl.cast(i, tl.int64)
        q_image = head_of(q, q_strides, i_b, i_h)
        do_image = head_of(do, do_strides, i_b, i_h)
        dq_image = head_of(dq, dq_strides, i_b, i_h)
        lse_image = lse + (i_b * heads + i_h) * N
        o_image, delta_image = o, delta
        if DQ == "store":
            o_image = head_of(o, o_strides, i_b, i_h)
        else:
            delta_image = delta + (i_b * heads + i_h) * N
        v_image = head_of(v, v_strides, i_b, i_h)
        v_a, v_b = _load_keys(v_image, start_n, BLOCK_N, BLOCKS, v_strides[2], N, D)
        if not SHARED_VALUE:
            dv_a = tl.zeros((BLOCK_N, D), ACC)
            dv_b = dv_a
        dk_a, dv_a, dk_b, dv_b = _key_gradients(
            dk_a, dv_a, dk_b, dv_b, k_a, v_a, k_b, v_b, start_n,
            q_image, o_image, do_image, lse_image, delta_image, dq_image,
            q_strides[2], o_strides[2], do_strides[2], dq_strides[2], lo, hi,
            N, W, RY, RX, D, BLOCK_M, BLOCK_N, BLOCKS, INSIDE, True, DQ, PRECISION,
        )  # fmt: skip
        if not INSIDE and DQ != "store":  # the windows of all keys meet all queries
            dk_a, dv_a, dk_b, dv_b = _key_gradients(
                dk_a, dv_a, dk_b, dv_b, k_a, v_a, k_b, v_b, start_n,
                q_image, o_image, do_image, lse_image, delta_image, dq_image,
                q_strides[2], o_strides[2], do_strides[2], dq_strides[2], lo, hi,
                N, W, RY, RX, D, BLOCK_M, BLOCK_N, BLOCKS, INSIDE, False, DQ, PRECISION,
            )  # fmt: skip
        if not SHARED_VALUE:
            dv_image = head_of(dv, dv_strides, i_b, i_h)
            _store_keys(dv_image, dv_a, dv_b, start_n, BLOCK_N, BLOCKS, dv_strides[2], N, D)

    part = (i_c * heads + i_h) * N * D
    _store_keys(dk + part, dk_a * _LN2, dk_b * _LN2, start_n, BLOCK_N, BLOCKS, D, N, D)
    if SHARED_VALUE:
        _store_keys(dv + part, dv_a, dv_b, start_n, BLOCK_N, BLOCKS, D, N, D)


@triton.jit
def _query_gradient(
    dq, q, do, row_lse, row_delta, start_m, k, v, k_stride, v_stride, lo, hi,
    N: tl.constexpr, W: tl.constexpr, RY: tl.constexpr, RX: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, INSIDE: tl.constexpr, WINDOWED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Accumulate the keys of a block of queries: those of [lo, hi), or all others."""
    first = lo if WINDOWED else 0
    for i in tl.range(first, loop_end(lo, hi, BLOCK_N, N, WINDOWED), BLOCK_N):
        start_n = token_at(i, lo, hi, WINDOWED)
        k_tile = load_rows(k, start_n, BLOCK_N, k_stride, N, D)
        v_tile = load_rows(v, start_n, BLOCK_N, v_stride, N, D)
        p = tl.exp2(dot(q, tl.trans(k_tile), None, PRECISION) - row_lse[:, None])
        if WINDOWED or N % BLOCK_N != 0:
            queries = start_m + tl.arange(0, BLOCK_M)[:, None]
            keys = start_n + tl.arange(0, BLOCK_N)[None, :]
            seen = visible(queries, keys, keys, BLOCK_N, N, W, RY, RX, INSIDE, WINDOWED)
            p = tl.where(seen, p, 0.0)
        ds = p * (dot(do, tl.trans(v_tile), None, PRECISION) - row_delta[:, None])
        dq = dot(ds.to(k_tile.dtype), k_tile, dq, PRECISION)
    return dq


@triton.jit(do_not_specialize=["batch", "heads"])
def backward_query_kernel(
    q, k, v, o, do, lse, delta, dq,
    q_strides, k_strides, v_strides, o_strides, do_strides, dq_strides, batch, heads,
    H: tl.constexpr, W: tl.constexpr, RY: tl.constexpr, RX: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, INSIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """DQ and delta of one block of queries, in fixed order; query block fastest, head slowest."""
    N: tl.constexpr = H * W
    ACC: tl.constexpr = lse.dtype.element_ty
    start_m, i_b, i_h = query_block(batch, BLOCK_M, N)
    q_tile = load_rows(head_of(q, q_strides, i_b, i_h), start_m, BLOCK_M, q_strides[2], N, D)
    do_tile = load_rows(head_of(do, do_strides, i_b, i_h), start_m, BLOCK_M, do_strides[2], N, D)
    o_tile = load_rows(head_of(o, o_strides, i_b, i_h), start_m, BLOCK_M, o_strides[2], N, D)
    row_lse = load_row_values(lse + (i_b * heads + i_h) * N, start_m, BLOCK_M, N)
    row_delta = _delta(o_tile, do_tile, ACC)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    tl.store(delta + (i_b * heads + i_h) * N + offs_m, row_delta, mask=offs_m < N)
    k += i_h * k_strides[0]
    v = head_of(v, v_strides, i_b, i_h)
    lo, hi = window_range(start_m, BLOCK_M, BLOCK_N, H, W, RY)
    grad = tl.zeros((BLOCK_M, D), ACC)
    grad = _query_gradient(
        grad, q_tile, do_tile, row_lse, row_delta, start_m, k, v, k_strides[1], v_strides[2],
        lo, hi, N, W, RY, RX, D, BLOCK_M, BLOCK_N, INSIDE, True, PRECISION,
    )  # fmt: skip
    if not INSIDE:
        grad = _query_gradient(
            grad, q_tile, do_tile, row_lse, row_delta, start_m, k, v, k_strides[1], v_strides[2],
            lo, hi, N, W, RY, RX, D, BLOCK_M, BLOCK_N, INSIDE, False, PRECISION,
        )  # fmt: skip
    dq = head_of(dq, dq_strides, i_b, i_h)
    store_rows(dq, grad * _LN2, start_m, BLOCK_M, dq_strides[2], N, D)


@with_smaller_tiles
def launch_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor,
    dq: Tensor, dv: Tensor | None, geometry: Geometry, inside: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Write dQ into ``dq`` and, of a value per image, dV into ``dv``.

    Returns:
        dK, and dV of a value that the batch shares, both (h, N, d) in the accumulator's dtype.
    """
    batch, heads, tokens, width = q.shape
    shared = v.dim() == 3
    exact = _launch.accumulator(q.dtype)
    if batch == 0:
        sums = torch.zeros((1 + shared, heads, tokens, width), dtype=exact, device=q.device)
        return sums[0], sums[1] if shared else None
    do = _launch.addressable(do)
    problem = problem_of("raster_key", q, geometry)
    tile: RasterTiles = require(problem)
    keys = tile.keys * tile.blocks
    programs = cdiv(tokens, keys) * heads
    # Programs run long: on 32 x 32 tokens of an H100, two rounds of them left a third of the time
    # to those that came last. One that holds all keys is alone on its multiprocessor.
    most = _launch.chunk_programs(q.device, 1 if tokens <= keys else 8)
    chunk = cdiv(batch, min(batch, max(1, most // programs)))
    chunks = cdiv(batch, chunk)
    if tokens <= keys:
        mode, dq_buffer, delta = "store", dq, None
    else:
        delta = torch.empty_like(lse)
        if tile.separate_dq or torch.are_deterministic_algorithms_enabled():
            mode, dq_buffer = "separate", dq
        else:
            mode, dq_buffer = "add", torch.zeros(dq.shape, dtype=exact, device=dq.device)
    parts = torch.empty((1 + shared, chunks, heads, tokens, width), dtype=exact, device=q.device)
    dv_buffer = parts[1] if shared else dv
    assert dv_buffer is not None
    strides = (q.stride()[:3], k.stride()[:2], value_strides(v), o.stride()[:3], do.stride()[:3])
    constants: dict[str, Any] = {**geometry.constants(), "D": width, "INSIDE": inside}
    constants["PRECISION"] = _launch.precision(q.dtype)
    if mode == "add":
        _launch.launch(
            delta_kernel, cdiv(tokens, 128) * batch * heads,
            o, do, delta, *strides[3:], batch, heads, N=tokens, D=width, BLOCK_M=128,
        )  # fmt: skip
    if mode == "separate":
        of_queries = problem_of("raster_query", q, geometry)
        their: RasterTiles = require(of_queries)
        _launch.launch(
            backward_query_kernel, cdiv(tokens, their.queries) * batch * heads,
            q, k, v, o, do, lse, delta, dq, *strides, dq.stride()[:3], batch, heads,
            BLOCK_M=their.queries, BLOCK_N=their.keys, problem=of_queries, tiles=their,
            **constants, **their.options(),
        )  # fmt: skip
    _launch.launch(
        backward_key_kernel, programs * chunks,
        q, k, v, o if delta is None else None, do, lse, delta, dq_buffer, parts[0], dv_buffer,
        *strides, dq_buffer.stride()[:3], dv_buffer.stride()[:3], batch, heads, chunk,
        BLOCK_M=tile.queries, BLOCK_N=tile.keys, BLOCKS=tile.blocks, SHARED_VALUE=shared,
        DQ=mode, problem=problem, tiles=tile, **constants, **tile.options(),
    )  # fmt: skip
    if mode == "add":
        dq.copy_(dq_buffer)
    sums = parts[:, 0] if chunks == 1 else parts.sum(1)
    return sums[0], sums[1] if shared else None
