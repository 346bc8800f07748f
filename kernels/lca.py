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
from rlr_fast.kernels._launch import Geometry
from rlr_fast.kernels._window import within
from rlr_fast.kernels.reference import prepare_key
from rlr_fast.kernels.tiles import HaloTiles, fits_in_shared_memory

_LN2 = tl.constexpr(0.6931471805599453)
# The bias of a hidden key is minus the square of this, a product whose factors the dtype holds: far
# below any score, but in float16, where it is -2**30.
_HIDDEN = tl.constexpr(2.0**60)
_HIDDEN_FLOAT16 = tl.constexpr(2.0**15)


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
    k, v, stride_kn, stride_vn, i_y, i_x, FIRST: tl.constexpr, SIZE: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, P: tl.constexpr,
    H: tl.constexpr, W: tl.constexpr, RY: tl.constexpr, RX: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Keys and values (SIZE, D) of a part of the halo, and its bias (P, SIZE)."""
    row, column, token, exists = _halo_keys(i_y, i_x, FIRST, SIZE, PH, PW, H, W, RY, RX)
    columns = tl.arange(0, D)[None, :]
    token = token.to(tl.int64)[:, None]
    k_tile = tl.load(k + token * stride_kn + columns, mask=exists[:, None], other=0.0)
    v_tile = tl.load(v + token * stride_vn + columns, mask=exists[:, None], other=0.0)
    # Position (y, x) of the tile lies at (y + RY, x + RX) of the halo.
    position = tl.arange(0, P)
    near_y = within(row[None, :] - RY - (position // PW)[:, None], RY)
    near_x = within(column[None, :] - RX - (position % PW)[:, None], RX)
    seen = near_y & near_x & exists[None, :]
    hidden: tl.constexpr = _HIDDEN_FLOAT16 if k_tile.dtype == tl.float16 else _HIDDEN
    bias = tl.where(seen, 0.0, -hidden).to(k_tile.dtype)
    return k_tile, v_tile, bias


@triton.jit(do_not_specialize=["batch", "heads", "chunk"])
def forward_kernel(
    q, k, v, o,
    stride_qb, stride_qh, stride_qn, stride_kh, stride_kn, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on,
    batch, heads, chunk,
    H: tl.constexpr, W: tl.constexpr, RY: tl.constexpr, RX: tl.constexpr, D: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, P: tl.constexpr, IMAGES: tl.constexpr,
    HALO_A: tl.constexpr, HALO_B: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output of the positions of one tile and ``chunk`` images; head fastest.

    Heads lie side by side in memory: at d = 16 a row is one sector, and the neighboring head's
    program takes the next. The halo is HALO_A + HALO_B keys, as powers of two fit it closer.
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
    k += i_h * stride_kh
    v += i_h * stride_vh
    k_a, v_a, bias_a = _load_halo(
        k, v, stride_kn, stride_vn, i_y, i_x, 0, HALO_A, PH, PW, P, H, W, RY, RX, D
    )
    if HALO_B:
        k_b, v_b, bias_b = _load_halo(
            k, v, stride_kn, stride_vn, i_y, i_x, HALO_A, HALO_B, PH, PW, P, H, W, RY, RX, D
        )
    choice = _choice(PH, PW, P, BLOCK_M, q.dtype.element_ty)
    columns = tl.arange(0, D)[None, :]
    first = i_c * chunk
    rows = (first + image).to(tl.int64)
    token = token.to(tl.int64)
    q_pointers = q + i_h * stride_qh + (rows * stride_qb + token * stride_qn)[:, None] + columns
    o_pointers = o + i_h * stride_oh + (rows * stride_ob + token * stride_on)[:, None] + columns
    q_step = tl.cast(IMAGES, tl.int64) * stride_qb
    o_step = tl.cast(IMAGES, tl.int64) * stride_ob

    last = tl.minimum(first + chunk, batch)
    for start in tl.range(first, last, IMAGES):
        row_mask = (exists & (start + image < last))[:, None]
        q_tile = tl.load(q_pointers, mask=row_mask, other=0.0)
        s_a = dot(q_tile, tl.trans(k_a), None, PRECISION)  # (BLOCK_M, HALO_A)
        s_a = tl.dot(choice, bias_a, s_a, input_precision="tf32", out_dtype=s_a.dtype)
        row_max = tl.max(s_a, 1)
        if HALO_B:
            s_b = dot(q_tile, tl.trans(k_b), None, PRECISION)
            s_b = tl.dot(choice, bias_b, s_b, input_precision="tf32", out_dtype=s_b.dtype)
            row_max = tl.maximum(row_max, tl.max(s_b, 1))
        p_a = tl.exp2(s_a - row_max[:, None])
        row_sum = tl.sum(p_a, 1)
        out = dot(p_a.to(v_a.dtype), v_a, None, PRECISION)
        if HALO_B:
            p_b = tl.exp2(s_b - row_max[:, None])
            row_sum += tl.sum(p_b, 1)
            out = dot(p_b.to(v_b.dtype), v_b, out, PRECISION)
        out = out * (1.0 / row_sum)[:, None]
        tl.store(o_pointers, out.to(o.dtype.element_ty), mask=row_mask)
        q_pointers += q_step
        o_pointers += o_step


@triton.jit
def _give_halo(
    out, tile, part, heads, i_h, i_y, i_x, FIRST: tl.constexpr, SIZE: tl.constexpr,
    HALO: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    H: tl.constexpr, W: tl.constexpr, RY: tl.constexpr, RX: tl.constexpr, D: tl.constexpr,
    ATOMIC: tl.constexpr,
):  # fmt: skip
    """Add a part of a halo to the gradient (h, N, D), or store it as partial (part, h, HALO, D)."""
    columns = tl.arange(0, D)[None, :]
    if ATOMIC:
        _, _, token, exists = _halo_keys(i_y, i_x, FIRST, SIZE, PH, PW, H, W, RY, RX)
        rows = i_h * (H * W) + token.to(tl.int64)
        tl.atomic_add(out + rows[:, None] * D + columns, tile, mask=exists[:, None], sem="relaxed")
    else:
        rows = (tl.cast(part, tl.int64) * heads + i_h) * HALO + FIRST + tl.arange(0, SIZE)
        tl.store(out + rows[:, None] * D + columns, tile)


@triton.jit(do_not_specialize=["batch", "heads", "chunk"])
def backward_kernel(
    q, k, v, do, dq, dk, dv,
    stride_qb, stride_qh, stride_qn, stride_kh, stride_kn, stride_vh, stride_vn,
    stride_dob, stride_doh, stride_don, stride_dqb, stride_dqh, stride_dqn,
    batch, heads, chunk,
    H: tl.constexpr, W: tl.constexpr, RY: tl.constexpr, RX: tl.constexpr, D: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, P: tl.constexpr, IMAGES: tl.constexpr,
    HALO_A: tl.constexpr, HALO_B: tl.constexpr, ATOMIC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ, and the halo's dK and dV over ``chunk`` images; programs as in the forward kernel."""
    ACC: tl.constexpr = dk.dtype.element_ty
    HALO: tl.constexpr = HALO_A + HALO_B
    BLOCK_M: tl.constexpr = IMAGES * PH * PW
    tiles_x: tl.constexpr = (W + PW - 1) // PW
    tiles: tl.constexpr = (H + PH - 1) // PH * tiles_x
    pid = tl.program_id(0)
    i_h = (pid % heads).to(tl.int64)
    part = pid // heads
    i_c = part // tiles
    i_y, i_x = part % tiles // tiles_x, part % tiles % tiles_x
    image, token, exists = _position_rows(i_y, i_x, PH, PW, H, W, BLOCK_M)
    k += i_h * stride_kh
    v += i_h * stride_vh
    k_a, v_a, bias_a = _load_halo(
        k, v, stride_kn, stride_vn, i_y, i_x, 0, HALO_A, PH, PW, P, H, W, RY, RX, D
    )
    # A square product would be shared out by its rows, and every warp compute all scores.
    WIDE: tl.constexpr = D == 16 and BLOCK_M == 16
    wide_a = k_a
    if WIDE:
        wide_a = tl.reshape(tl.join(k_a, tl.zeros_like(k_a)), (HALO_A, 2 * D))
    dk_a = tl.zeros((HALO_A, D), ACC)
    dv_a = tl.zeros((HALO_A, D), ACC)
    if HALO_B:
        k_b, v_b, bias_b = _load_halo(
            k, v, stride_kn, stride_vn, i_y, i_x, HALO_A, HALO_B, PH, PW, P, H, W, RY, RX, D
        )
        wide_b = k_b
        if WIDE:
            wide_b = tl.reshape(tl.join(k_b, tl.zeros_like(k_b)), (HALO_B, 2 * D))
        dk_b = tl.zeros((HALO_B, D), ACC)
        dv_b = tl.zeros((HALO_B, D), ACC)
    choice = _choice(PH, PW, P, BLOCK_M, q.dtype.element_ty)
    columns = tl.arange(0, D)[None, :]
    first = i_c * chunk
    rows = (first + image).to(tl.int64)
    token = token.to(tl.int64)
    q_pointers = q + i_h * stride_qh + (rows * stride_qb + token * stride_qn)[:, None] + columns
    do_rows = (rows * stride_dob + token * stride_don)[:, None]
    do_pointers = do + i_h * stride_doh + do_rows + columns
    dq_rows = (rows * stride_dqb + token * stride_dqn)[:, None]
    dq_pointers = dq + i_h * stride_dqh + dq_rows + columns
    q_step = tl.cast(IMAGES, tl.int64) * stride_qb
    do_step = tl.cast(IMAGES, tl.int64) * stride_dob
    dq_step = tl.cast(IMAGES, tl.int64) * stride_dqb

    last = tl.minimum(first + chunk, batch)
    for start in tl.range(first, last, IMAGES):
        row_mask = (exists & (start + image < last))[:, None]
        q_tile = tl.load(q_pointers, mask=row_mask, other=0.0)
        do_tile = tl.load(do_pointers, mask=row_mask, other=0.0)
        p_a = dot(q_tile, tl.trans(k_a), None, PRECISION)  # (BLOCK_M, HALO_A)
        p_a = tl.dot(choice, bias_a, p_a, input_precision="tf32", out_dtype=p_a.dtype)
        row_max = tl.max(p_a, 1)
        if HALO_B:
            p_b = dot(q_tile, tl.trans(k_b), None, PRECISION)
            p_b = tl.dot(choice, bias_b, p_b, input_precision="tf32", out_dtype=p_b.dtype)
            row_max = tl.maximum(row_max, tl.max(p_b, 1))
        p_a = tl.exp2(p_a - row_max[:, None])
        row_sum = tl.sum(p_a, 1)
        if HALO_B:
            p_b = tl.exp2(p_b - row_max[:, None])
            row_sum += tl.sum(p_b, 1)
        weight = 1.0 / row_sum
        p_a *= weight[:, None]
        dp_a = dot(do_tile, tl.trans(v_a), None, PRECISION)
        delta = tl.sum(p_a * dp_a, 1)
        if HALO_B:
            p_b *= weight[:, None]
            dp_b = dot(do_tile, tl.trans(v_b), None, PRECISION)
            delta += tl.sum(p_b * dp_b, 1)
        dv_a = dot(tl.trans(p_a.to(do_tile.dtype)), do_tile, dv_a, PRECISION)
        ds_a = (p_a * (dp_a - delta[:, None])).to(q_tile.dtype)
        dq_tile = dot(ds_a, wide_a, None, PRECISION)
        dk_a = dot(tl.trans(ds_a), q_tile, dk_a, PRECISION)
        if HALO_B:
            dv_b = dot(tl.trans(p_b.to(do_tile.dtype)), do_tile, dv_b, PRECISION)
            ds_b = (p_b * (dp_b - delta[:, None])).to(q_tile.dtype)
            dq_tile = dot(ds_b, wide_b, dq_tile, PRECISION)
            dk_b = dot(tl.trans(ds_b), q_tile, dk_b, PRECISION)
        if WIDE:
            dq_tile, _ = tl.split(tl.reshape(dq_tile, (BLOCK_M, D, 2)))
        tl.store(dq_pointers, (dq_tile * _LN2).to(dq.dtype.element_ty), mask=row_mask)
        q_pointers += q_step
        do_pointers += do_step
        dq_pointers += dq_step

    _give_halo(
        dk, dk_a * _LN2, part, heads, i_h, i_y, i_x, 0, HALO_A,
        HALO, PH, PW, H, W, RY, RX, D, ATOMIC,
    )  # fmt: skip
    _give_halo(
        dv, dv_a, part, heads, i_h, i_y, i_x, 0, HALO_A, HALO, PH, PW, H, W, RY, RX, D, ATOMIC
    )
    if HALO_B:
        _give_halo(
            dk, dk_b * _LN2, part, heads, i_h, i_y, i_x, HALO_A, HALO_B,
            HALO, PH, PW, H, W, RY, RX, D, ATOMIC,
        )  # fmt: skip
        _give_halo(
            dv, dv_b, part, heads, i_h, i_y, i_x, HALO_A, HALO_B,
            HALO, PH, PW, H, W, RY, RX, D, ATOMIC,
        )  # fmt: skip


@triton.jit(do_not_specialize=["heads", "chunks"])
def gather_kernel(
    parts, out, heads, chunks,
    H: tl.constexpr, W: tl.constexpr, RY: tl.constexpr, RX: tl.constexpr, D: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, HALO: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Sum the halos (chunk, tile, h, HALO, D) that hold each key into (h, N, D), in fixed order."""
    N: tl.constexpr = H * W
    HEIGHT: tl.constexpr = PH + 2 * RY
    WIDTH: tl.constexpr = PW + 2 * RX
    tiles_y: tl.constexpr = (H + PH - 1) // PH
    tiles_x: tl.constexpr = (W + PW - 1) // PW
    pid = tl.program_id(0)
    i_h = (pid % heads).to(tl.int64)
    n = pid // heads * BLOCK_N + tl.arange(0, BLOCK_N)
    y, x = n // W, n % W
    columns = tl.arange(0, D)[None, :]
    total = tl.zeros((BLOCK_N, D), out.dtype.element_ty)
    for i_c in range(0, chunks):
        for above in range(0, (HEIGHT + PH - 1) // PH):
            for left in range(0, (WIDTH + PW - 1) // PW):
                i_y = (y + RY) // PH - above
                i_x = (x + RX) // PW - left
                row = y + RY - i_y * PH
                column = x + RX - i_x * PW
                exists = (n < N) & (row < HEIGHT) & (column < WIDTH)
                exists &= (i_y >= 0) & (i_y < tiles_y) & (i_x >= 0) & (i_x < tiles_x)
                part = i_c * (tiles_y * tiles_x) + i_y * tiles_x + i_x
                rows = (tl.cast(part, tl.int64) * heads + i_h) * HALO + row * WIDTH + column
                pointers = parts + rows[:, None] * D + columns
                total += tl.load(pointers, mask=exists[:, None], other=0.0)
    rows = i_h * N + n
    tl.store(out + rows[:, None] * D + columns, total, mask=(n < N)[:, None])


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
    places = triton.cdiv(geometry.height, tile.rows) * triton.cdiv(geometry.width, tile.columns)
    steps = triton.cdiv(batch, tile.images)
    most = _launch.chunk_programs(q.device, tile.warps)
    chunks = min(steps, max(1, most // (places * heads)))
    chunk = triton.cdiv(steps, chunks) * tile.images
    return places, chunk, triton.cdiv(batch, chunk)


def saves_nothing(q: Tensor, geometry: Geometry) -> bool:
    """Whether backward needs no lse of query (B, h, N, d), for it keeps all keys of a row."""
    return fits_in_shared_memory(geometry, q.shape[3], q.dtype, target_of(q.device))


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
        q, k, v, o, *q.stride()[:3], *k.stride()[:2], *v.stride()[:2], *o.stride()[:3],
        batch, heads, chunk, problem=problem, **_constants(geometry, tile, width, q.dtype),
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
    exact = _launch.accumulator(q.dtype)
    sums = torch.zeros((2, heads, tokens, width), dtype=exact, device=q.device)
    if batch == 0:
        return sums[0], sums[1]
    do = _launch.addressable(do)
    places, chunk, chunks = _programs(q, geometry, tile)
    constants = _constants(geometry, tile, width, q.dtype)
    atomic = not torch.are_deterministic_algorithms_enabled()
    halo = constants["HALO_A"] + constants["HALO_B"]
    parts = sums
    if not atomic:
        parts = torch.empty((2, chunks, places, heads, halo, width), dtype=exact, device=q.device)
    _launch.launch(
        backward_kernel, heads * places * chunks,
        q, k, v, do, dq, parts[0], parts[1],
        *q.stride()[:3], *k.stride()[:2], *v.stride()[:2], *do.stride()[:3], *dq.stride()[:3],
        batch, heads, chunk, problem=problem, ATOMIC=atomic, **constants,
    )  # fmt: skip
    if not atomic:
        for part, total in zip(parts, sums, strict=True):
            _launch.launch(
                gather_kernel, heads * triton.cdiv(tokens, 64), part, total, heads, chunks,
                **geometry.constants(), D=width,
                PH=tile.rows, PW=tile.columns, HALO=halo, BLOCK_N=64,
            )  # fmt: skip
    return sums[0], sums[1]


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
