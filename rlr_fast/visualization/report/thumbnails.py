"""Small pictures of a report: the image, its score map in gray, and a mask, as files' bytes.

The browser paints the gray map in the colors of the heat maps and lays it over the image, so that
neither has to be stored.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from rlr_fast.visualization.heat_maps import (
    Scale,
    check_scale,
    opacity,
    paint,
    position,
    read,
    read_image,
    read_map,
)

PICTURE_SIDE = 256
"""Most pixels of the longer side of a small picture, and of a mask."""
MAP_SIDE = 128
"""Most pixels of a side of a gray score map."""

_PICTURE_QUALITY, _MAP_QUALITY = 80, 88
_STEPS = 64  # colors that the browser gets; between them it interpolates


@dataclass(frozen=True)
class Thumbnails:
    """The small pictures of an image, as the bytes of JPEG files; the mask of a PNG, if any."""

    picture: bytes
    score_map: bytes
    mask: bytes | None


def thumbnails(
    image: ArrayLike,
    score_map: ArrayLike | torch.Tensor,
    mask: ArrayLike | torch.Tensor | None,
    size: tuple[int, int],
    scale: Scale,
) -> Thumbnails:
    """Return the small pictures of an image.

    Args:
        image: The picture, (H, W, 3), uint8, in any size.
        score_map: Pixel scores, (h, w), in any size.
        mask: What is marked, (h, w), bool; None for nothing to show.
        size: (height, width) of the file: the small picture has its proportions.
        scale: Fixed color scale (low, high), see `rlr_fast.visualization.heat_maps`.

    Raises:
        ValueError: For a wrong scale, shape or dtype, or a score that is NaN or infinite.
    """
    height, width = size
    factor = min(1.0, PICTURE_SIDE / max(height, width))
    fitted = max(1, round(width * factor)), max(1, round(height * factor))
    picture = Image.fromarray(read_image(image)).resize(fitted, Image.Resampling.LANCZOS)
    gray = np.rint(255 * position(_largest(read_map(score_map), MAP_SIDE), scale))
    return Thumbnails(
        _encoded(picture, "JPEG", quality=_PICTURE_QUALITY),
        _encoded(Image.fromarray(gray.astype(np.uint8)), "JPEG", quality=_MAP_QUALITY),
        None
        if mask is None
        else _encoded(
            Image.fromarray(_largest(read(mask).astype(bool), PICTURE_SIDE)), "PNG", optimize=True
        ),
    )


def color_tables(scale: Scale) -> dict[str, list[float]]:
    """Return what paints a gray map: red, green, blue and opacity, in [0, 1], at even steps.

    Raises:
        ValueError: For a wrong scale.
    """
    check_scale(scale)
    place = np.linspace(0, 1, _STEPS, dtype=np.float32)
    colors = paint(place[None])[0] / 255
    channels = {name: colors[:, i] for i, name in enumerate(("red", "green", "blue"))}
    channels["opacity"] = opacity(place)
    return {name: [round(float(v), 4) for v in values] for name, values in channels.items()}


def _largest(values: NDArray[Any], side: int) -> NDArray[Any]:
    """Return an array (h, w) with at most ``side`` in each axis: the largest value of each block.

    A mean would make a small defect in a large map vanish.
    """
    for axis in (0, 1):
        length = values.shape[axis]
        if length > side:
            starts = np.arange(side) * length // side
            values = np.maximum.reduceat(values, starts, axis=axis)
    return values


def _encoded(picture: Image.Image, kind: str, **how: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **how)
    return buffer.getvalue()
