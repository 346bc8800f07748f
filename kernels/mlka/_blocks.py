"""Blocks of tokens in raster order: their rows, the range of their windows, the pairs they see."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rlr_fast.kernels._launch import Geometry
from rlr_fast.kernels._window import inside_window
from rlr_fast.kernels.tiles import Problem, RasterTiles, choose


@triton.jit
def load_rows(
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
def store_rows(
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
def row_values(base, start, SIZE: tl.constexpr, N: tl.constexpr, OTHER: tl.constexpr):
    """One value a row, OTHER beyond N."""
    offs = start + tl.arange(0, SIZE)
    if N % SIZE == 0:
        return tl.load(base + offs)
    return tl.load(base + offs, mask=offs < N, other=OTHER)


@triton.jit
def place(i, lo, hi, WINDOWED: tl.constexpr):
    """Token of loop index i: the windows lie in [lo, hi), all else is counted around them."""
    if WINDOWED:
        return i
    return tl.where(i < lo, i, i + hi - lo)


@triton.jit
def loop_end(lo, hi, BLOCK: tl.constexpr, N: tl.constexpr, WINDOWED: tl.constexpr):
    """End of a loop in steps of BLOCK over the windows [lo, hi), or over everything else."""
    if WINDOWED:
        return hi
    return (N + BLOCK - 1) // BLOCK * BLOCK - (hi - lo)


@triton.jit
def visible(
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


def raster_tiles(kernel: str, q: Tensor, geometry: Geometry) -> RasterTiles:
    batch, _, _, width = q.shape
    return choose(Problem(kernel, geometry, width, batch, q.dtype, q.device))


def value_strides(v: Tensor) -> tuple[int, int, int]:
    """Strides (batch, head, token) of a value, with 0 for a batch that shares it."""
    strides = v.stride()[:-1]
    return (0, *strides) if v.dim() == 3 else strides  # type: ignore[return-value]
