"""Random numbers by name: keyed streams, and noise fields that are the same at every picture size.

Every number is a pure function of a path such as ``(0, "washer", "test", "scratch", 3, "angle")``.
Nothing is drawn in sequence, so neither the order of the work nor its extent can change a value.
"""

from __future__ import annotations

import hashlib
from typing import TypeVar

import numpy as np
from scipy import ndimage

Array = np.ndarray
T = TypeVar("T")

# Uniform node values in [-1, 1] blended by cubic B-splines have this standard deviation (2-D).
_SPLINE_STD = 0.277


class Stream:
    """Random numbers that belong to one path of names and integers."""

    def __init__(self, *path: str | int) -> None:
        self.path = path

    def child(self, *names: str | int) -> Stream:
        """Return the stream of a longer path."""
        return Stream(*self.path, *names)

    @property
    def key(self) -> int:
        """64 bits that depend on the path alone, not on Python's salted ``hash``."""
        text = "\x1f".join(f"{type(part).__name__}:{part}" for part in self.path)
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")

    def uniform(self, name: str, low: float = 0.0, high: float = 1.0) -> float:
        """Return the path's number called ``name``, uniform in [low, high)."""
        return low + (high - low) * (self.child(name).key / 2.0**64)

    def integer(self, name: str, low: int, high: int) -> int:
        """Return the path's integer called ``name``, uniform in low..high, both included."""
        return low + int(self.uniform(name) * (high - low + 1))

    def choice(self, name: str, options: tuple[T, ...]) -> T:
        """Return one of ``options``."""
        return options[self.integer(name, 0, len(options) - 1)]

    def generator(self) -> np.random.Generator:
        """Return NumPy's generator for this path, for noise drawn pixel by pixel."""
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence(self.key)))


def nodes(key: int, first: tuple[int, int], shape: tuple[int, int]) -> Array:
    """Return random values at integer lattice nodes.

    Args:
        key: 64 bits that name the lattice.
        first: row and column of the first node; may be negative.
        shape: rows and columns.

    Returns:
        ``shape``, float32, uniform in [-1, 1]; a node's value does not depend on the box asked for.
    """
    rows = np.arange(first[0], first[0] + shape[0], dtype=np.int64).astype(np.uint64)
    columns = np.arange(first[1], first[1] + shape[1], dtype=np.int64).astype(np.uint64)
    h = (rows * np.uint64(0x9E3779B97F4A7C15))[:, None] + (columns * np.uint64(0xC2B2AE3D27D4EB4F))[
        None, :
    ]
    h ^= np.uint64(key)
    # The finaliser of SplitMix64.
    h ^= h >> np.uint64(30)
    h *= np.uint64(0xBF58476D1CE4E5B9)
    h ^= h >> np.uint64(27)
    h *= np.uint64(0x94D049BB133111EB)
    h ^= h >> np.uint64(31)
    return (h >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-23) - np.float32(1.0)


def _spline(t: Array) -> tuple[Array, Array, Array, Array]:
    t = t.astype(np.float32)
    t2, t3 = t * t, t * t * t
    return (1 - t) ** 3 / 6, (3 * t3 - 6 * t2 + 4) / 6, (-3 * t3 + 3 * t2 + 3 * t + 1) / 6, t3 / 6


def smooth(key: int, rows: Array, columns: Array) -> Array:
    """Return smooth noise on an axis-aligned grid.

    Args:
        key: 64 bits that name the field.
        rows: (h,) lattice coordinates of the rows.
        columns: (w,) lattice coordinates of the columns.

    Returns:
        (h, w) float32, mean 0, standard deviation about 1, one bump per lattice cell.
    """
    row0, column0 = np.floor(rows).astype(int), np.floor(columns).astype(int)
    top, left = int(row0.min()) - 1, int(column0.min()) - 1
    box = nodes(key, (top, left), (int(row0.max()) + 3 - top, int(column0.max()) + 3 - left))
    wide = np.zeros((box.shape[0], len(columns)), np.float32)
    for k, weight in enumerate(_spline(columns - column0)):
        wide += box[:, column0 - 1 - left + k] * weight
    field = np.zeros((len(rows), len(columns)), np.float32)
    for k, weight in enumerate(_spline(rows - row0)):
        field += wide[row0 - 1 - top + k] * weight[:, None]
    field *= np.float32(1 / _SPLINE_STD)
    return field


def smooth_at(key: int, rows: Array, columns: Array) -> Array:
    """Return the same noise as `smooth` at free positions.

    Args:
        key: 64 bits that name the field.
        rows: (h, w) lattice coordinates.
        columns: (h, w) lattice coordinates.

    Returns:
        (h, w) float32.
    """
    top, left = int(np.floor(rows.min())) - 1, int(np.floor(columns.min())) - 1
    shape = (int(np.floor(rows.max())) + 3 - top, int(np.floor(columns.max())) + 3 - left)
    box = nodes(key, (top, left), shape) * np.float32(1 / _SPLINE_STD)
    position = np.stack([rows - top, columns - left])
    return ndimage.map_coordinates(box, position, order=3, prefilter=False, output=np.float32)


def jagged(key: int, t: Array) -> Array:
    """Return piecewise-linear noise of one variable, in [-1, 1], with a corner at each integer."""
    t0 = np.floor(t).astype(int)
    first = int(t0.min())
    table = nodes(key, (0, first), (1, int(t0.max()) + 2 - first))[0]
    left = table[t0 - first]
    return left + (table[t0 - first + 1] - left) * (t - t0).astype(np.float32)


def of_index(key: int, index: Array) -> Array:
    """Return a random value in [-1, 1] for each integer of ``index``, of any shape."""
    index = index.astype(int)
    first = int(index.min())
    return nodes(key, (0, first), (1, int(index.max()) + 1 - first))[0][index - first]
