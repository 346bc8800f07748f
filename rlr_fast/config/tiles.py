"""How large pictures are cut into tiles: sizes and places, in the pictures' own pixels."""

from __future__ import annotations

import math
from numbers import Integral
from typing import Any, NamedTuple

from rlr_fast.config.rules import LARGEST, require

Sides = int | tuple[int, int]


class Tiles(NamedTuple):
    """How pictures are cut, in their own pixels.

    Attributes:
        size: (h, w) of a tile.
        overlap: Least (h, w) that two neighbors share.
    """

    size: tuple[int, int]
    overlap: tuple[int, int]

    def misfit(self, height: int, width: int) -> str | None:
        """Return why a picture cannot be cut, or None: a tile must fit into it."""
        if height >= self.size[0] and width >= self.size[1]:
            return None
        return (
            f"it has {height} x {width} pixels, less than a tile of {self.size[0]} x "
            f"{self.size[1]} (height x width); smaller tiles would fit"
        )

    def starts(self, height: int, width: int) -> tuple[list[int], list[int]]:
        """Return where the tiles of a picture begin: their tops, and their lefts.

        The fewest that cover it and share ``overlap`` pixels, evenly from border to border.
        """
        tops, lefts = map(tile_starts, (height, width), self.size, self.overlap)
        return tops, lefts


def checked_tiles(tile: Sides, overlap: Sides | None = None) -> Tiles:
    """Return how pictures are cut.

    Args:
        tile: Pixels of a tile: side, or (height, width).
        overlap: Pixels that neighbors share at least; an eighth of the tile by default.

    Raises:
        ValueError: A tile is not positive, or an overlap negative or not below the tile.
    """
    size = _pair(tile)
    require(
        len(size) == 2 and all(isinstance(s, Integral) and 0 < int(s) <= LARGEST for s in size),
        "tile",
        f"a positive side, or height and width, of at most {LARGEST}",
        tile,
    )
    shared = tuple(side // 8 for side in size) if overlap is None else _pair(overlap)
    if len(shared) != 2 or not all(
        isinstance(o, Integral) and 0 <= int(o) < side for o, side in zip(shared, size, strict=True)
    ):
        raise ValueError(f"overlap must be at least 0 and below the tile, got {overlap=}, {tile=}")
    return Tiles((int(size[0]), int(size[1])), (int(shared[0]), int(shared[1])))


def _pair(sides: Any) -> tuple[Any, ...]:
    return tuple(sides) if isinstance(sides, (tuple, list)) else (sides, sides)


def optional_tiles(
    tile: Sides | None, overlap: Sides | None, default: Tiles | None = None
) -> Tiles | None:
    """Return `checked_tiles`, of the default's size where no tile is given; None without either.

    Raises:
        ValueError: As `checked_tiles`, or an overlap without a tile.
    """
    if tile is None and overlap is None:
        return default
    if tile is None and default is not None:
        tile = default.size
    if tile is None:
        raise ValueError(f"overlap needs a tile, got {overlap=} without one")
    return checked_tiles(tile, overlap)


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """Return where tiles begin along an axis: the fewest, evenly from border to border."""
    gaps = math.ceil((length - tile) / (tile - overlap))
    return [round(i * (length - tile) / max(gaps, 1)) for i in range(gaps + 1)]
