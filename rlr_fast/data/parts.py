"""Pictures cut into tiles: each tile is a sample of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from rlr_fast.config import Tiles
from rlr_fast.data.images import (
    ImageFailure,
    UnreadableImageError,
    UnscoredImageError,
    read_image_size,
)
from rlr_fast.data.layouts import Sample
from rlr_fast.data.threads import map_ahead


def cut(
    samples: Sequence[Sample], tiles: Tiles, workers: int | None = None
) -> tuple[list[Sample], list[int], list[ImageFailure]]:
    """Return the tiles of pictures, picture after picture, and row after row within each.

    Only the headers of the files are read.

    Args:
        samples: The pictures.
        tiles: How they are cut.
        workers: Threads that read.

    Returns:
        A sample of each tile; the place of its picture in ``samples``; and the pictures that cannot
        be read, or are smaller than a tile.
    """
    parts: list[Sample] = []
    places: list[int] = []
    failures: list[ImageFailure] = []
    for place, size in enumerate(map_ahead(_size, samples, workers)):
        if isinstance(size, UnreadableImageError):
            failures.append(ImageFailure(place, size))
            continue
        misfit = tiles.misfit(*size)
        if misfit is not None:
            failures.append(ImageFailure(place, UnscoredImageError(samples[place].path, misfit)))
            continue
        tops, lefts = tiles.starts(*size)
        boxes = [(top, left, *tiles.size) for top in tops for left in lefts]
        parts += [dataclasses.replace(samples[place], box=box) for box in boxes]
        places += [place] * len(boxes)
    return parts, places, failures


def _size(sample: Sample) -> tuple[int, int] | UnreadableImageError:
    try:
        return read_image_size(sample.path)
    except UnreadableImageError as error:
        return error
