"""LCA's backward kernels: the gradients, and the sum of halos in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlr_fast.kernels import _launch, mlka
from rlr_fast.kernels._choice import choose, problem_of, with_smaller_tiles
from rlr_fast.kernels._dot import dot
from rlr_fast.kernels._launch import Geometry, cdiv
from rlr_fast.kernels.lca._halo import (
    constants_of,
    halo_keys,
    load_halo,
    one_hot_position,
    position_rows,
    powers,
    programs_of,
    row_pointers,
    saves_nothing,
)
from rlr_fast.kernels.tiles import HaloTiles

_LN2 = tl.constexpr(0.6931471805599453)
# Bytes of the partial halos that a deterministic backward pass holds at a time.
_LARGEST_PARTS = 256 * 2**20


@triton.jit
def _part_gradients(p, dp, delta, q, do, k, dq, dk, dv, PRECISION: tl.constexpr):
    """Add a part of the halo to dQ (None before the first), and a step of images to its dK, dV."""
    dv = dot(tl.trans(p.to(do.dtype)), do, dv, PRECISION)
    ds = (p * (dp - delta[:, None])).to(q.dtype)
    dq = dot(ds, k, dq, PRECISION)
    dk = dot(tl.trans(ds), q, dk, PRECISION)
    return dq, dk, dv


@triton.jit
def _widened(k, WIDE: tl.constexpr):
    """Keys with a column of zeros behind each, if WIDE."""
    if WIDE:
        return tl.reshape(tl.join(k, tl.zeros_like(k)), (k.shape[0], 2 * k.shape[1]))
    else:
        return k


@triton.jit
def _give_halo(
    dk, dv, dk_tile, dv_tile, part, heads, i_h, i_y, i_x, FIRST: tl.constexpr,
    HALO: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    H: tl.constexpr, W: tl.constexpr, RY: tl.constexpr, RX: tl.constexpr,
    ATOMIC: tl.constexpr,
):  # fmt: skip
    """Add a part of a halo to dK and dV (h, N, D), or store it as partial (part, h, HALO, D)."""
    SIZE: tl.constexpr = dk_tile.shape[0]
    D: tl.constexpr = dk_tile.shape[1]
    if ATOMIC:
        _, _, token, exists = halo_keys(i_y, i_x, FIRST, SIZE, PH, PW, H, W, RY, RX)
        rows = i_h * (H * W) + token.to(tl.int64)
        offsets = rows[:, None] * D + tl.arange(0, D)[None, :]
        tl.atomic_add(dk + offsets, dk_tile * _LN2, mask=exists[:, None], sem="relaxed")
        tl.atomic_add(dv + offsets, dv_tile, mask=exists[:, None], sem="relaxed")
    else:
        rows = (tl.cast(part, tl.int64) * heads + i_h) * HALO + FIRST + tl.arange(0, SIZE)
        offsets = rows[:, None] * D + tl.arange(0, D)[None, :]
        tl.store(dk + offsets, dk_tile * _LN2)
        tl.store(dv + offsets, dv_tile)


@triton.jit(do_not_specialize=["batch", "heads", "chunk", "first_part"])
def backward_kernel(
    q, k, v, do, dq, dk, dv, q_strides, k_strides, v_strides, do_strides, dq_strides,
    batch, heads, chunk, first_part,
    H: tl.constexpr, W: tl.constexpr, RY: tl.constexpr, RX: tl.constexpr, D: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, P: tl.constexpr, IMAGES: tl.constexpr,
    HALO_A: tl.constexpr, HALO_B: tl.constexpr, PRECISION: tl.constexpr, ATOMIC: tl.constexpr,
):  # fmt: skip
    """dQ, and the halo's dK and dV over ``chunk`` images; programs as in the forward kernel.

    Parts are tiles of a chunk, chunk after chunk; this launch begins with ``first_part``.
    """
    ACC: tl.constexpr = dk.dtype.element_ty
    BLOCK_M: tl.constexpr = IMAGES * PH * PW
    tiles_x: tl.constexpr = (W + PW - 1) // PW
    tiles: tl.constexpr = (H + PH - 1) // PH * tiles_x
    pid = tl.program_id(0)
    i_h = (pid % heads).to(tl.int64)
    part = first_part + pid // heads
    i_c = part // tiles
    i_y, i_x = part % tiles // tiles_x, part % tiles % tiles_x
    image, token, exists = position_rows(i_y, i_x, PH, PW, H, W, BLOCK_M)
    # A square product would be shared out by its rows, and every warp compute all scores.
    WIDE: tl.constexpr = D == 16 and BLOCK_M == 16
    halo_a = load_halo(
        k, v, k_strides, v_strides, i_h, i_y, i_x, 0, HALO_A, PH, PW, P, H, W, RY, RX, D
    )
    wide_a = _widened(halo_a[0], WIDE)
    dk_a = tl.zeros((HALO_A, D), ACC)
    dv_a = tl.zeros((HALO_A, D), ACC)
    halo_b = halo_a
    if HALO_B:
        halo_b = load_halo(
            k, v, k_strides, v_strides, i_h, i_y, i_x, HALO_A, HALO_B, PH, PW, P, H, W, RY, RX, D
        )
        wide_b = _widened(halo_b[0], WIDE)
        dk_b = tl.zeros((HALO_B, D), ACC)
        dv_b = tl.zeros((HALO_B, D), ACC)
    choice = one_hot_position(PH, PW, P, BLOCK_M, q.dtype.element_ty)
    first = i_c * chunk
    last = tl.minimum(first + chunk, batch)
    q_pointers = row_pointers(q, q_strides, i_h, first + image, token, D)
    do_pointers = row_pointers(do, do_strides, i_h, first + image, token, D)
    dq_pointers = row_pointers(dq, dq_strides, i_h, first + image, token, D)
    q_step = tl.cast(IMAGES, tl.int64) * q_strides[0]
    do_step = tl.cast(IMAGES, tl.int64) * do_strides[0]
    dq_step = tl.cast(IMAGES, tl.int64) * dq_strides[0]
    for start in tl.range(first, last, IMAGES):
        row_mask = (exists & (start + image < last))[:, None]
        q_tile = tl.load(q_pointers, mask=row_mask, other=0.0)
        do_tile = tl.load(do_pointers, mask=row_mask, other=0.0)
        p_a, p_b, row_sum = powers(q_tile, halo_a, halo_b, choice, HALO_B, PRECISION, True)
        weight = 1.0 / row_sum
        p_a *= weight[:, None]
        dp_a = dot(do_tile, tl.trans(halo_a[1]), None, PRECISION)
        delta = tl.sum(p_a * dp_a, 1)
        if HALO_B:
            p_b *= weight[:, None]
            dp_b = dot(do_tile, tl.trans(halo_b[1]), None, PRECISION)
            delta += tl.sum(p_b * dp_b, 1)
        dq_tile, dk_a, dv_a = _part_gradients(
            p_a, dp_a, delta, q_tile, do_tile, wide_a, None, dk_a, dv_a, PRECISION
        )
        if HALO_B:
            dq_tile, dk_b, dv_b = _part_gradients(
                p_b, dp_b, delta, q_tile, do_tile, wide_b, dq_tile, dk_b, dv_b, PRECISION
            )
        if WIDE:
            dq_tile, _ = tl.split(tl.reshape(dq_tile, (BLOCK_M, D, 2)))
        tl.store(dq_pointers, (dq_tile * _LN2).to(dq.dtype.element_ty), mask=row_mask)
        q_pointers += q_step
        do_pointers += do_step
        dq_pointers += dq_step

    stored = part - first_part
    _give_halo(
        dk, dv, dk_a, dv_a, stored, heads, i_h, i_y, i_x, 0,
        HALO_A + HALO_B, PH, PW, H, W, RY, RX, ATOMIC,
    )  # fmt: skip
    if HALO_B:
        _give_halo(
            dk, dv, dk_b, dv_b, stored, heads, i_h, i_y, i_x, HALO_A,
            HALO_A + HALO_B, PH, PW, H, W, RY, RX, ATOMIC,
        )  # fmt: skip


@triton.jit(
    do_not_specialize=["heads", "first_part", "last_part", "first_key", "last_key", "summed"]
)
def gather_kernel(
    dk_parts, dv_parts, dk, dv, heads, first_part, last_part, first_key, last_key, summed,
    H: tl.constexpr, W: tl.constexpr, RY: tl.constexpr, RX: tl.constexpr, D: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, HALO: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Sum into dK and dV (h, N, D), in fixed order, the partial halos that hold a key.

    The halos (part, h, HALO, D) are those of the parts ``first_part … last_part - 1``, which reach
    the keys ``first_key … last_key - 1``. The keys before ``summed`` have a sum to add to.
    """
    HEIGHT: tl.constexpr = PH + 2 * RY
    WIDTH: tl.constexpr = PW + 2 * RX
    tiles_y: tl.constexpr = (H + PH - 1) // PH
    tiles_x: tl.constexpr = (W + PW - 1) // PW
    tiles: tl.constexpr = tiles_y * tiles_x
    pid = tl.program_id(0)
    i_h = (pid % heads).to(tl.int64)
    n = first_key + pid // heads * BLOCK_N + tl.arange(0, BLOCK_N)
    y, x = n // W, n % W
    columns = tl.arange(0, D)[None, :]
    offsets = (i_h * (H * W) + n)[:, None] * D + columns
    begun = (n < tl.minimum(summed, last_key))[:, None]
    dk_sum = tl.load(dk + offsets, mask=begun, other=0.0)
    dv_sum = tl.load(dv + offsets, mask=begun, other=0.0)
    for i_c in range(first_part // tiles, (last_part + tiles - 1) // tiles):
        for above in range(0, (HEIGHT + PH - 1) // PH):
            for left in range(0, (WIDTH + PW - 1) // PW):
                i_y = (y + RY) // PH - above
                i_x = (x + RX) // PW - left
                row = y + RY - i_y * PH
                column = x + RX - i_x * PW
                part = i_c * tiles + i_y * tiles_x + i_x
                held = (n < last_key) & (row < HEIGHT) & (column < WIDTH)
                held &= (i_y >= 0) & (i_y < tiles_y) & (i_x >= 0) & (i_x < tiles_x)
                held &= (part >= first_part) & (part < last_part)
                stored = tl.cast(part - first_part, tl.int64)
                rows = (stored * heads + i_h) * HALO + row * WIDTH + column
                pointers = rows[:, None] * D + columns
                dk_sum += tl.load(dk_parts + pointers, mask=held[:, None], other=0.0)
                dv_sum += tl.load(dv_parts + pointers, mask=held[:, None], other=0.0)
    tl.store(dk + offsets, dk_sum, mask=(n < last_key)[:, None])
    tl.store(dv + offsets, dv_sum, mask=(n < last_key)[:, None])


@with_smaller_tiles
def launch_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, saved: Tensor, dq: Tensor,
    geometry: Geometry,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Write dQ into ``dq``; return dK and dV (h, N, d) in the accumulator's dtype."""
    batch, heads, tokens, width = q.shape
    problem = problem_of("halo_backward", q, geometry)
    tile = choose(problem) if saves_nothing(q, geometry) else None
    if tile is None:
        if saved.numel() == 0:
            # The GPU refused what was to do without. An infinite bound certifies nothing.
            bound = torch.full((heads,), torch.inf, dtype=saved.dtype, device=q.device)
            unused = torch.empty(q.shape, dtype=q.dtype, device=q.device)
            saved = mlka.launch_forward(q, k, bound, v, unused, geometry, inside=True)
        dk, dv = mlka.launch_backward(do, q, k, v, o, saved, dq, None, geometry, inside=True)
        assert dv is not None
        return dk, dv
    shape, exact = (2, heads, tokens, width), _launch.accumulator(q.dtype)
    atomic = not torch.are_deterministic_algorithms_enabled()
    allocate = torch.zeros if atomic or batch == 0 else torch.empty
    sums = allocate(shape, dtype=exact, device=q.device)
    if batch == 0:
        return sums[0], sums[1]
    do = _launch.addressable(do)
    places, chunk, chunks = programs_of(q, geometry, tile)
    constants = constants_of(geometry, tile, width, q.dtype)
    halo = constants["HALO_A"] + constants["HALO_B"]

    def launch(dk: Tensor, dv: Tensor, first: int, last: int) -> None:
        _launch.launch(
            backward_kernel, heads * (last - first),
            q, k, v, do, dq, dk, dv,
            q.stride()[:3], k.stride()[:2], v.stride()[:2], do.stride()[:3], dq.stride()[:3],
            batch, heads, chunk, first, problem=problem, tiles=tile, ATOMIC=atomic, **constants,
        )  # fmt: skip

    count = places * chunks
    if atomic:
        launch(sums[0], sums[1], 0, count)
        return sums[0], sums[1]
    # Without atomics the halos of as many parts as memory is given are kept, and then summed.
    size = 2 * heads * halo * width * exact.itemsize
    held = min(count, max(1, _LARGEST_PARTS // size))
    parts = torch.empty((2, held, heads, halo, width), dtype=exact, device=q.device)
    summed = 0
    for first in range(0, count, held):
        last = min(first + held, count)
        launch(parts[0], parts[1], first, last)
        first_key, last_key = _keys_of(range(first, last), geometry, tile)
        _launch.launch(
            gather_kernel, heads * cdiv(last_key - first_key, 64),
            parts[0], parts[1], sums[0], sums[1], heads, first, last, first_key, last_key, summed,
            **geometry.constants(), D=width, PH=tile.rows, PW=tile.columns, HALO=halo, BLOCK_N=64,
        )  # fmt: skip
        summed = max(summed, last_key)
    return sums[0], sums[1]


def _keys_of(parts: range, geometry: Geometry, tile: HaloTiles) -> tuple[int, int]:
    """Return a range of keys, whole rows of the grid, that holds the halos of some parts."""
    tiles_x = cdiv(geometry.width, tile.columns)
    tiles = cdiv(geometry.height, tile.rows) * tiles_x
    first, last = parts[0] % tiles, parts[-1] % tiles
    if parts[0] // tiles < parts[-1] // tiles:  # of more than one chunk of the batch
        first, last = 0, tiles - 1
    top = max(0, first // tiles_x * tile.rows - geometry.radius_y)
    bottom = min(geometry.height, (last // tiles_x + 1) * tile.rows + geometry.radius_y)
    return top * geometry.width, bottom * geometry.width
