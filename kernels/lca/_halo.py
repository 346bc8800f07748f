"""The halo: a tile's rows, the keys around its positions, and the scores between them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlr_fast.kernels import _launch
from rlr_fast.kernels._choice import target_of
from rlr_fast.kernels._dot import dot
from rlr_fast.kernels._launch import Geometry, cdiv
from rlr_fast.kernels._softmax import exp2
from rlr_fast.kernels._window import within
from rlr_fast.kernels.tiles import HaloTiles, fits_in_shared_memory

# The bias of a hidden key is minus the square of this, a product whose factors the dtype holds: far
# below any score, but in float16, where it is -2**30.
_HIDDEN = tl.constexpr(2.0**60)
_HIDDEN_FLOAT16 = tl.constexpr(2.0**15)


@triton.jit
def position_rows(
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
def row_pointers(x, strides, i_h, image, token, D: tl.constexpr):
    """Pointers (BLOCK_M, D) to the rows (image, token) of a head of (B, h, N, d)."""
    rows = image.to(tl.int64) * strides[0] + token.to(tl.int64) * strides[2]
    return x + i_h * strides[1] + rows[:, None] + tl.arange(0, D)[None, :]


@triton.jit
def one_hot_position(
    PH: tl.constexpr, PW: tl.constexpr, P: tl.constexpr, BLOCK_M: tl.constexpr, DTYPE
):
    """One-hot(position of a row), (BLOCK_M, P)."""
    position = tl.arange(0, BLOCK_M) % (PH * PW)
    hidden: tl.constexpr = _HIDDEN_FLOAT16 if tl.float16 == DTYPE else _HIDDEN
    return tl.where(position[:, None] == tl.arange(0, P)[None, :], hidden, 0.0).to(DTYPE)


@triton.jit
def halo_keys(
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
def load_halo(
    k, v, k_strides, v_strides, i_h, i_y, i_x, FIRST: tl.constexpr, SIZE: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, P: tl.constexpr,
    H: tl.constexpr, W: tl.constexpr, RY: tl.constexpr, RX: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Keys and values (SIZE, D) of a part of the halo, and its bias (P, SIZE)."""
    row, column, token, exists = halo_keys(i_y, i_x, FIRST, SIZE, PH, PW, H, W, RY, RX)
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
def powers(
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


def constants_of(geometry: Geometry, tile: HaloTiles, width: int, dtype: torch.dtype) -> dict:
    """Return the constants that forward and backward kernel share, and warps and stages."""
    halo_a, halo_b = tile.parts(geometry)
    positions = max(16, tile.rows * tile.columns)
    return {
        **geometry.constants(), "D": width,
        "PH": tile.rows, "PW": tile.columns, "P": positions, "IMAGES": tile.images,
        "HALO_A": halo_a, "HALO_B": halo_b, "PRECISION": _launch.precision(dtype),
        "warps": tile.warps, "stages": tile.stages,
    }  # fmt: skip


def programs_of(q: Tensor, geometry: Geometry, tile: HaloTiles) -> tuple[int, int, int]:
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
