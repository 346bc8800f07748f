"""Geometry of a token grid and its clipped windows, as device functions.

Token i lies at ``(i // W, i % W)``. A window reaches RY rows and RX columns to either side. The
relation "j lies in the window of i" is symmetric, so each function serves queries and keys alike.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def within(distance, RADIUS: tl.constexpr):
    """Whether ``|distance| <= RADIUS``, as one unsigned comparison."""
    return (distance + RADIUS).to(tl.uint32, bitcast=True) <= 2 * RADIUS


@triton.jit
def inside_window(m, n, W: tl.constexpr, RY: tl.constexpr, RX: tl.constexpr):
    """Whether tokens m and n, shaped to be broadcast, lie in each other's window."""
    return within(n // W - m // W, RY) & within(n % W - m % W, RX)


@triton.jit
def window_range(
    first,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    RY: tl.constexpr,
):
    """Range [lo, hi) of tokens in multiples of BLOCK that holds the windows of SIZE tokens.

    Tokens outside the range lie outside every window of tokens ``first … first + SIZE - 1``.
    """
    last = tl.minimum(first + SIZE, H * W) - 1
    lo = tl.maximum(first // W - RY, 0) * W
    hi = tl.minimum(last // W + RY + 1, H) * W
    return lo // BLOCK * BLOCK, (hi + BLOCK - 1) // BLOCK * BLOCK
