"""Blocks of tokens in raster order: their rows in memory, and which pairs see each other."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rlr_fast.kernels._window import inside_window


@triton.jit
def head_of(base, strides, i_b, i_h):
    """Pointer to the (N, D) matrix of an image and head; strides are those of (batch, head, …)."""
    return base + i_b * strides[0] + i_h * strides[1]


@triton.jit
def row_pointers(base, start, SIZE: tl.constexpr, stride, D: tl.constexpr):
    """Pointers (SIZE, D) to rows of an (N, D) matrix that `_launch.addressable` let through."""
    offs = tl.arange(0, SIZE)[:, None] * stride + tl.arange(0, D)[None, :]
    return base + tl.cast(start, tl.int64) * stride + offs


@triton.jit
def load_rows(
    base, start, SIZE: tl.constexpr, stride, N: tl.constexpr, D: tl.constexpr,
    BLOCKS: tl.constexpr = 1,
):  # fmt: skip
    """Rows ``start … start + SIZE - 1``, 0 beyond N.

    A program takes BLOCKS such blocks, so that the last of them may lie beyond N altogether.
    """
    pointers = row_pointers(base, start, SIZE, stride, D)
    if N % (SIZE * BLOCKS) == 0:
        return tl.load(pointers)
    return tl.load(pointers, mask=(start + tl.arange(0, SIZE) < N)[:, None], other=0.0)


@triton.jit
def store_rows(
    base, tile, start, SIZE: tl.constexpr, stride, N: tl.constexpr, D: tl.constexpr,
    BLOCKS: tl.constexpr = 1,
):  # fmt: skip
    """The inverse of `load_rows`."""
    pointers = row_pointers(base, start, SIZE, stride, D)
    tile = tile.to(base.dtype.element_ty)
    if N % (SIZE * BLOCKS) == 0:
        tl.store(pointers, tile)
    else:
        tl.store(pointers, tile, mask=(start + tl.arange(0, SIZE) < N)[:, None])


@triton.jit
def add_rows(base, tile, start, SIZE: tl.constexpr, stride, N: tl.constexpr, D: tl.constexpr):
    """Add to rows atomically."""
    pointers = row_pointers(base, start, SIZE, stride, D)
    if N % SIZE == 0:
        tl.atomic_add(pointers, tile, sem="relaxed")
    else:
        mask = (start + tl.arange(0, SIZE) < N)[:, None]
        tl.atomic_add(pointers, tile, mask=mask, sem="relaxed")


@triton.jit
def load_row_values(base, start, SIZE: tl.constexpr, N: tl.constexpr):
    """One value a row, 0 beyond N."""
    offs = start + tl.arange(0, SIZE)
    if N % SIZE == 0:
        return tl.load(base + offs)
    return tl.load(base + offs, mask=offs < N, other=0.0)


@triton.jit
def query_block(batch, BLOCK_M: tl.constexpr, N: tl.constexpr):
    """First query, image and head of a program; query block fastest, head slowest."""
    blocks: tl.constexpr = (N + BLOCK_M - 1) // BLOCK_M
    pid = tl.program_id(0)
    i_b = (pid // blocks % batch).to(tl.int64)
    i_h = (pid // blocks // batch).to(tl.int64)
    return pid % blocks * BLOCK_M, i_b, i_h


@triton.jit
def token_at(i, lo, hi, WINDOWED: tl.constexpr):
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
    owned, met, keys, KEYS: tl.constexpr, N: tl.constexpr, W: tl.constexpr, RY: tl.constexpr,
    RX: tl.constexpr, INSIDE: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """Which of the tokens that a program owns and of those it meets in a loop see each other.

    Both are shaped to be broadcast, and ``keys`` is one of them. Keys go in multiples of KEYS, so
    that some may lie beyond N: these are seen by none. Queries beyond N see what they like, as
    nothing that follows from them is kept.
    """
    seen = tl.full((1, 1), True, tl.int1)
    if WINDOWED:
        # In this order all but one subtraction leaves the loop.
        near = inside_window(owned, met, W, RY, RX)
        seen = near if INSIDE else ~near
    if N % KEYS != 0:
        seen = seen & (keys < N)
    return seen


def value_strides(v: Tensor) -> tuple[int, ...]:
    """Return the strides (batch, head, token) of a value, with 0 for a batch that shares it."""
    strides = v.stride()[:-1]
    return (0, *strides) if v.dim() == 3 else strides
