"""LCA: attention to the keys inside a window, with keys and values that the batch shares.

    output_i = Σ_j softmax_j(q_i · k_j) v_j     over the keys j in the clipped window of token i

query (B, h, N, d); key (h, N, d) as `prepare_key` leaves it (centered, in log2 units); value
(h, N, d). No row is empty. Backward, with P the weights:

    dS = P ∘ (dO Vᵀ - delta),   delta_i = Σ_j P_ij (dO Vᵀ)_ij,   dQ = ln2 · dS K,
    dK = ln2 · Σ_batch dSᵀ Q,   dV = Σ_batch Pᵀ dO

Keys and values have no batch, so the rows of a score tile are (image, position) pairs: a program
owns a few positions of one head, keeps the keys and values around them (the halo) in shared memory,
and walks over the batch. Few positions have a small halo, so that hardly a product is wasted. Which
position sees which key is the same for every image: it is added to the scores as one more matrix
product, one-hot(position) @ bias.

All keys of a row are at hand, so backward needs Q and dO alone: it recomputes the softmax. dK and
dV stay in registers over the batch; halos overlap, so their sums go to float32 atomics, or,
deterministically, to partial halos that a second kernel gathers in order.

Windows whose halo is too large to keep go to the raster kernels of `mlka`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlr_fast.kernels import _launch, mlka
from rlr_fast.kernels._autograd import register_gradients
from rlr_fast.kernels._choice import choose, problem_of, target_of, with_smaller_tiles
from rlr_fast.kernels._dot import dot
from rlr_fast.kernels._launch import Geometry, cdiv
from rlr_fast.kernels._softmax import exp2
from rlr_fast.kernels._window import within
from rlr_fast.kernels.reference import prepare_key
from rlr_fast.kernels.tiles import HaloTiles, fits_in_shared_memory

_LN2 = tl.constexpr(0.6931471805599453)
# The bias of a hidden key is minus the square of this, a product whose factors the dtype holds: far
# below any score, but in float16, where it is -2**30.
_HIDDEN = tl.constexpr(2.0**60)
_HIDDEN_FLOAT16 = tl.constexpr(2.0**15)
# Where the powers of a row, taken without its maximum, have a sum in this range, none has
# overflowed, and what those below 2**-126 err by, or a hidden key's 2**-126 on the FMA units adds,
# is less than 2**-57 of the sum, all 2**8 keys together: exact to rounding.
_LEAST_SUM = tl.constexpr(2.0**-60)
_LARGEST_SUM = tl.constexpr(2.0**60)
# Bytes of the partial halos that a deterministic backward pass holds at a time.
_LARGEST_PARTS = 256 * 2**20
# Share of forward's powers of two that the FMA units compute in bfloat16, of 8.
_FMA_EXP2_EIGHTHS = 1


@triton.jit
def _position_rows(
    i_y, i_x, PH: tl.constexpr, PW: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Image in the tile, token and existence of each row (image, position)."""
    rows = tl.arange(0, BLOCK_M)
    position = rows % (PH * PW)
    y = i_y * PH + position // PW
    x = i_x * PW + position % PW
    return rows // (PH * PW), y * W + x, (y < H) & (x < W)


@triton.jit
def _row_pointers(x, strides, i_h, image, token, D: tl.constexpr):
    """Pointers (BLOCK_M, D) to the rows (image, token) of a head of (B, h, N, d)."""
    rows = image.to(tl.int64) * strides[0] + token.to(tl.int64) * strides[2]
    return x + i_h * strides[1] + rows[:, None] + tl.arange(0, D)[None, :]


@triton.jit
def _choice(PH: tl.constexpr, PW: tl.constexpr, P: tl.constexpr, BLOCK_M: tl.constexpr, DTYPE):
    """One-hot(position of a row), (BLOCK_M, P)."""
    position = tl.arange(0, BLOCK_M) % (PH * PW)
    hidden: tl.constexpr = _HIDDEN_FLOAT16 if tl.float16 == DTYPE else _HIDDEN
    return tl.where(position[:, None] == tl.arange(0, P)[None, :], hidden, 0.0).to(DTYPE)


@triton.jit
def _halo_keys(
    i_y, i_x, FIRST: tl.constexpr, SIZE: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    H: tl.constexpr, W: tl.constexpr, RY: tl.constexpr, RX: tl.constexpr,
):  # fmt: skip
    """Row and column in the halo, token and existence of the keys FIRST … FIRST + SIZE - 1."""
    WIDTH: tl.constexpr = PW + 2 * RX
    n = FIRST + tl.arange(0, SIZE)
    row, column = n // WIDTH, n % WIDTH
    y = i_y * PH - RY + row
    x = i_x * PW - RX + column
    exists = (row < PH + 2 * RY) & (y >= 0) & (y < H) & (x >= 0) & (x < W)
    return row, column, y * W + x, exists


@triton.jit
def _load_halo(
    k, v, k_strides, v_strides, i_h, i_y, i_x, FIRST: tl.constexpr, SIZE: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, P: tl.constexpr,
    H: tl.constexpr, W: tl.constexpr, RY: tl.constexpr, RX: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Keys and values (SIZE, D) of a part of the halo, and its bias (P, SIZE)."""
    row, column, token, exists = _halo_keys(i_y, i_x, FIRST, SIZE, PH, PW, H, W, RY, RX)
    columns = tl.arange(0, D)[None, :]
    token = token.to(tl.int64)[:, None]
    k += i_h * k_strides[0]
    v += i_h * v_strides[0]
    k_tile = tl.load(k + token * k_strides[1] + columns, mask=exists[:, None], other=0.0)
    v_tile = tl.load(v + token * v_strides[1] + columns, mask=exists[:, None], other=0.0)
    # Position (y, x) of the tile lies at (y + RY, x + RX) of the halo.
    position = tl.arange(0, P)
    near_y = within(row[None, :] - RY - (position // PW)[:, None], RY)
    near_x = within(column[None, :] - RX - (position % PW)[:, None], RX)
    seen = near_y & near_x & exists[None, :]
    if H % PH != 0 or W % PW != 0:
        # A position beyond the grid sees all keys, or its powers might add up to 0.
        beyond = (i_y * PH + position // PW >= H) | (i_x * PW + position % PW >= W)
        seen = seen | beyond[:, None]
    hidden: tl.constexpr = _HIDDEN_FLOAT16 if k_tile.dtype == tl.float16 else _HIDDEN
    bias = tl.where(seen, 0.0, -hidden).to(k_tile.dtype)
    return k_tile, v_tile, bias


@triton.jit
def _scores(q, k, bias, choice, PRECISION: tl.constexpr):
    """Scores (BLOCK_M, SIZE) of a part of the halo, those of hidden keys far below all others."""
    s = dot(q, tl.trans(k), None, PRECISION)
    # A sum of the one-hot product has one term, of two powers of two: TF32 holds it exactly.
    return tl.dot(choice, bias, s, input_precision="tf32", out_dtype=s.dtype)


@triton.jit
def _powers(
    q, halo_a, halo_b, choice, HALO_B: tl.constexpr, PRECISION: tl.constexpr,
    LESS_MAXIMUM: tl.constexpr, FMA_EXP2_EIGHTHS: tl.constexpr = 0,
):  # fmt: skip
    """2**score, or 2**(score - row maximum), (BLOCK_M, HALO_A) and (BLOCK_M, HALO_B); row sums."""
    s_a = _scores(q, halo_a[0], halo_a[2], choice, PRECISION)
    s_b = s_a
    if HALO_B:
        s_b = _scores(q, halo_b[0], halo_b[2], choice, PRECISION)
    if LESS_MAXIMUM:
        row_max = tl.max(s_a, 1)
        if HALO_B:
            row_max = tl.maximum(row_max, tl.max(s_b, 1))
            s_b -= row_max[:, None]
        s_a -= row_max[:, None]
    p_a = exp2(s_a, FMA_EXP2_EIGHTHS, True)
    p_b = p_a
    row_sum = tl.sum(p_a, 1)
    if HALO_B:
        p_b = exp2(s_b, FMA_EXP2_EIGHTHS, True)
        row_sum += tl.sum(p_b, 1)
    return p_a, p_b, row_sum


@triton.jit
def _attend(
    q_pointers, o_pointers, q_step, o_step, exists, image, first, last, halo_a, halo_b, choice,
    IMAGES: tl.constexpr, HALO_B: tl.constexpr, PRECISION: tl.constexpr,
    LESS_MAXIMUM: tl.constexpr, FMA_EXP2_EIGHTHS: tl.constexpr,
):  # fmt: skip
    """Store the output of images ``first … last - 1``; return whether all sums were in range."""
    in_range = tl.full(exists.shape, True, tl.int1)
    for start in tl.range(first, last, IMAGES):
        row_mask = (exists & (start + image < last))[:, None]
        q_tile = tl.load(q_pointers, mask=row_mask, other=0.0)
        p_a, p_b, row_sum = _powers(
            q_tile, halo_a, halo_b, choice, HALO_B, PRECISION, LESS_MAXIMUM, FMA_EXP2_EIGHTHS
        )
        # NaN is in no range.
        in_range = in_range & (row_sum >= _LEAST_SUM) & (row_sum <= _LARGEST_SUM)
        out = dot(p_a.to(q_tile.dtype), halo_a[1], None, PRECISION)
        if HALO_B:
            out = dot(p_b.to(q_tile.dtype), halo_b[1], out, PRECISION)
        out = out * (1.0 / row_sum)[:, None]
        tl.store(o_pointers, out.to(o_pointers.dtype.element_ty), mask=row_mask)
        q_pointers += q_step
        o_pointers += o_step
    return tl.min(in_range.to(tl.int32), 0) > 0


@triton.jit(do_not_specialize=["batch", "heads", "chunk"])
def forward_kernel(
    q, k, v, o, q_strides, k_strides, v_strides, o_strides, batch, heads, chunk,
    H: tl.constexpr, W: tl.constexpr, RY: tl.constexpr, RX: tl.constexpr, D: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, P: tl.constexpr, IMAGES: tl.constexpr,
    HALO_A: tl.constexpr, HALO_B: tl.constexpr, PRECISION: tl.constexpr,
    TRY_WITHOUT_MAXIMUM: tl.constexpr, FMA_EXP2_EIGHTHS: tl.constexpr,
):  # fmt: skip
    """Output of the positions of one tile and ``chunk`` images; head fastest.

    Heads lie side by side in memory: at d = 16 a row is one sector, and the neighboring head's
    program takes the next. The halo is HALO_A + HALO_B keys, as powers of two fit it closer.

    With TRY_WITHOUT_MAXIMUM the softmax takes no maximum of a row, which is a fifth of the
    instructions and lets the FMA units take a share of the powers. A program that finds a row's sum
    out of range does its images again with it.
    """
    BLOCK_M: tl.constexpr = IMAGES * PH * PW
    tiles_x: tl.constexpr = (W + PW - 1) // PW
    tiles: tl.constexpr = (H + PH - 1) // PH * tiles_x
    pid = tl.program_id(0)
    i_h = (pid % heads).to(tl.int64)
    tile = pid // heads % tiles
    i_c = pid // heads // tiles
    i_y, i_x = tile // tiles_x, tile % tiles_x
    image, token, exists = _position_rows(i_y, i_x, PH, PW, H, W, BLOCK_M)
    halo_a = _load_halo(
        k, v, k_strides, v_strides, i_h, i_y, i_x, 0, HALO_A, PH, PW, P, H, W, RY, RX, D
    )
    halo_b = halo_a
    if HALO_B:
        halo_b = _load_halo(
            k, v, k_strides, v_strides, i_h, i_y, i_x, HALO_A, HALO_B, PH, PW, P, H, W, RY, RX, D
        )
    choice = _choice(PH, PW, P, BLOCK_M, q.dtype.element_ty)
    first = i_c * chunk
    last = tl.minimum(first + chunk, batch)
    q_pointers = _row_pointers(q, q_strides, i_h, first + image, token, D)
    o_pointers = _row_pointers(o, o_strides, i_h, first + image, token, D)
    q_step = tl.cast(IMAGES, tl.int64) * q_strides[0]
    o_step = tl.cast(IMAGES, tl.int64) * o_strides[0]
    done = False
    if TRY_WITHOUT_MAXIMUM:
        done = _attend(
            q_pointers, o_pointers, q_step, o_step, exists, image, first, last, halo_a, halo_b,
            choice, IMAGES, HALO_B, PRECISION, False, FMA_EXP2_EIGHTHS,
        )  # fmt: skip
    if not done:
        _attend(
            q_pointers, o_pointers, q_step, o_step, exists, image, first, last, halo_a, halo_b,
            choice, IMAGES, HALO_B, PRECISION, True, 0,
        )  # fmt: skip


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
        _, _, token, exists = _halo_keys(i_y, i_x, FIRST, SIZE, PH, PW, H, W, RY, RX)
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
    image, token, exists = _position_rows(i_y, i_x, PH, PW, H, W, BLOCK_M)
    # A square product would be shared out by its rows, and every warp compute all scores.
    WIDE: tl.constexpr = D == 16 and BLOCK_M == 16
    halo_a = _load_halo(
        k, v, k_strides, v_strides, i_h, i_y, i_x, 0, HALO_A, PH, PW, P, H, W, RY, RX, D
    )
    wide_a = _widened(halo_a[0], WIDE)
    dk_a = tl.zeros((HALO_A, D), ACC)
    dv_a = tl.zeros((HALO_A, D), ACC)
    halo_b = halo_a
    if HALO_B:
        halo_b = _load_halo(
            k, v, k_strides, v_strides, i_h, i_y, i_x, HALO_A, HALO_B, PH, PW, P, H, W, RY, RX, D
        )
        wide_b = _widened(halo_b[0], WIDE)
        dk_b = tl.zeros((HALO_B, D), ACC)
        dv_b = tl.zeros((HALO_B, D), ACC)
    choice = _choice(PH, PW, P, BLOCK_M, q.dtype.element_ty)
    first = i_c * chunk
    last = tl.minimum(first + chunk, batch)
    q_pointers = _row_pointers(q, q_strides, i_h, first + image, token, D)
    do_pointers = _row_pointers(do, do_strides, i_h, first + image, token, D)
    dq_pointers = _row_pointers(dq, dq_strides, i_h, first + image, token, D)
    q_step = tl.cast(IMAGES, tl.int64) * q_strides[0]
    do_step = tl.cast(IMAGES, tl.int64) * do_strides[0]
    dq_step = tl.cast(IMAGES, tl.int64) * dq_strides[0]
    for start in tl.range(first, last, IMAGES):
        row_mask = (exists & (start + image < last))[:, None]
        q_tile = tl.load(q_pointers, mask=row_mask, other=0.0)
        do_tile = tl.load(do_pointers, mask=row_mask, other=0.0)
        p_a, p_b, row_sum = _powers(q_tile, halo_a, halo_b, choice, HALO_B, PRECISION, True)
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


def _constants(geometry: Geometry, tile: HaloTiles, width: int, dtype: torch.dtype) -> dict:
    halo_a, halo_b = tile.parts(geometry)
    positions = max(16, tile.rows * tile.columns)
    return {
        **geometry.constants(), "D": width,
        "PH": tile.rows, "PW": tile.columns, "P": positions, "IMAGES": tile.images,
        "HALO_A": halo_a, "HALO_B": halo_b, "PRECISION": _launch.precision(dtype),
        "warps": tile.warps, "stages": tile.stages,
    }  # fmt: skip


def _programs(q: Tensor, geometry: Geometry, tile: HaloTiles) -> tuple[int, int, int]:
    """Return position tiles, images a chunk, and chunks."""
    batch, heads = q.shape[:2]
    places = cdiv(geometry.height, tile.rows) * cdiv(geometry.width, tile.columns)
    steps = cdiv(batch, tile.images)
    # Two rounds of what a multiprocessor holds, of programs with up to 255 registers a thread.
    most = _launch.chunk_programs(q.device, 2 * max(1, 8 // tile.warps))
    chunks = min(steps, max(1, most // (places * heads)))
    chunk = cdiv(steps, chunks) * tile.images
    return places, chunk, cdiv(batch, chunk)


def saves_nothing(q: Tensor, geometry: Geometry) -> bool:
    """Whether backward needs no lse of query (B, h, N, d), for it keeps all keys of a row."""
    # Traced with shapes of any size, a width is a symbol, which is no key of a cache.
    return fits_in_shared_memory(geometry, int(q.shape[3]), q.dtype, target_of(q.device))


@with_smaller_tiles
def launch_forward(
    q: Tensor, k: Tensor, bound: Tensor, v: Tensor, o: Tensor, geometry: Geometry
) -> Tensor:
    """Write the output into ``o`` (B, h, N, d), of any strides but the last.

    Returns:
        What backward needs beside the arguments: nothing, or lse (B, h, N) of a large window.
    """
    batch, heads, _, width = q.shape
    if not saves_nothing(q, geometry):
        return mlka.launch_forward(q, k, bound, v, o, geometry, inside=True)
    saved = torch.empty((0,), dtype=_launch.accumulator(q.dtype), device=q.device)
    if batch == 0:
        return saved
    problem = problem_of("halo_forward", q, geometry)
    tile = choose(problem)
    if tile is None:
        mlka.launch_forward(q, k, bound, v, o, geometry, inside=True)
        return saved
    places, chunk, chunks = _programs(q, geometry, tile)
    _launch.launch(
        forward_kernel, heads * places * chunks,
        q, k, v, o, q.stride()[:3], k.stride()[:2], v.stride()[:2], o.stride()[:3],
        batch, heads, chunk, problem=problem, **_constants(geometry, tile, width, q.dtype),
        # Float16 has no weight of 2**60. Float32's products, and the memory of wider heads, take
        # longer than the powers. Float64 tests in the interpreter what bfloat16 does on a GPU.
        TRY_WITHOUT_MAXIMUM=q.dtype in (torch.bfloat16, torch.float64) and width <= 32,
        # The cubic of exp2 is exact to bfloat16's rounding, not to float32's or float16's.
        FMA_EXP2_EIGHTHS=_FMA_EXP2_EIGHTHS if q.dtype == torch.bfloat16 else 0,
    )  # fmt: skip
    return saved


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
    places, chunk, chunks = _programs(q, geometry, tile)
    constants = _constants(geometry, tile, width, q.dtype)
    halo = constants["HALO_A"] + constants["HALO_B"]

    def launch(dk: Tensor, dv: Tensor, first: int, last: int) -> None:
        _launch.launch(
            backward_kernel, heads * (last - first),
            q, k, v, do, dq, dk, dv,
            q.stride()[:3], k.stride()[:2], v.stride()[:2], do.stride()[:3], dq.stride()[:3],
            batch, heads, chunk, first, problem=problem, ATOMIC=atomic, **constants,
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
