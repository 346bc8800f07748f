"""Score maps on one fixed color scale.

Every picture of scores takes its color scale from the caller, the same for all images. Scaling
each map by its own range would paint the least normal spot of a normal image in the color of a
defect. Up to its middle, (low + high) / 2, a scale is even; above it colors grow ever more slowly
with the score, so that no score is off the scale: high lies at three quarters.

The colors are matplotlib's "inferno": its lightness grows evenly with the score, so that equal
steps in score look equal, no edge appears where the data has none (as in "jet" and, less, "turbo"),
and the order survives gray print and color blindness. It contains no cyan, which is left for the
outline of the ground truth.
"""

from __future__ import annotations

import math
from typing import Any

import matplotlib
import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw

from rlr_fast.visualization.fonts import INK, PAPER, number, typeface

Scale = tuple[float, float]

_COLORS = np.round(255 * matplotlib.colormaps["inferno"](np.arange(256))[:, :3]).astype(np.uint8)
_STRIP = 256  # rows of a picture that are painted at once
_OPACITY = 0.7  # of an overlay, from the middle of the scale

HIGH = 0.75
"""Where a scale's high lies between its ends."""


def prediction_picture(
    image: ArrayLike, score_map: ArrayLike | torch.Tensor, scale: Scale
) -> Image.Image:
    """Return image, score map and overlay side by side, with a bar that says what a color means.

    Args:
        image: The picture, (H, W, 3), uint8.
        score_map: Pixel scores, (h, w); resized to the image (bilinear) if the sizes differ.
        scale: (low, high), ``low < high``: the scores of the first color, and of three quarters.

    Returns:
        An RGB picture of the image's height; the three panels have the image's own resolution.

    Raises:
        ValueError: For a wrong scale, shape or dtype, or a score that is NaN or infinite.
    """
    check_scale(scale)
    picture = read_image(image)
    scores = map_of(picture, score_map)
    height, width = scores.shape
    gap = max(2, round(height / 64))
    bar = _vertical_bar(height, scale)
    sheet = Image.new("RGB", (3 * (width + gap) + bar.width, height), PAPER)
    for y in range(0, height, _STRIP):  # a large picture need not fit in memory as floats
        image, part = picture[y : y + _STRIP], scores[y : y + _STRIP]
        panels = (image, heat_map(part, scale), overlay(image, part, scale))
        for i, panel in enumerate(panels):
            sheet.paste(Image.fromarray(panel), (i * (width + gap), y))
    sheet.paste(bar, (3 * (width + gap), 0))
    return sheet


def _vertical_bar(height: int, scale: Scale) -> Image.Image:
    """Return a color bar with the numbers of the scale, of the given height."""
    font = typeface(min(max(height // 18, 9), 48))
    low, high = scale
    width = max(6, height // 28)
    places = {high: 1 - HIGH, (low + high) / 2: 0.5, low: 1.0}
    text_left = width + max(3, height // 80)
    total = math.ceil(text_left + max(font.getlength(number(score)) for score in places)) + 2
    bar = Image.new("RGB", (total, height), PAPER)
    ramp = np.linspace(1, 0, height, dtype=np.float32)
    bar.paste(Image.fromarray(paint(np.tile(ramp[:, None], (1, width)))), (0, 0))
    draw = ImageDraw.Draw(bar)
    for score, y in places.items():
        where = (text_left, y * (height - 1))
        draw.text(where, number(score), INK, font, anchor="ld" if score == low else "lm")
    return bar


def heat_map(scores: NDArray[np.float32], scale: Scale) -> NDArray[np.uint8]:
    """Return the colors (H, W, 3) of scores (H, W); below the scale, its first color."""
    return paint(position(scores, scale))


def overlay(
    picture: NDArray[np.uint8], scores: NDArray[np.float32], scale: Scale
) -> NDArray[np.uint8]:
    """Return scores (H, W) painted over a picture (H, W, 3), the more opaque the higher they are.

    With u twice the position of a score in the scale, clipped to [0, 1], the opacity is
    ``0.7 * (3 u^2 - 2 u^3)``: zero at and below ``low``, where the image stays as it is, small for
    the low scores of a normal image, full from the middle of the scale. The dark rim that this
    leaves around a defect sets it off from an image of any color.
    """
    place = position(scores, scale)
    below, above = picture.astype(np.float32), paint(place).astype(np.float32)
    mixed: NDArray[np.float32] = below + opacity(place)[:, :, None] * (above - below)
    return np.rint(mixed).astype(np.uint8)


def opacity(place: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return how much of an overlay covers the picture at positions in the scale, in [0, 0.7]."""
    ramp = np.minimum(2 * place, 1)
    covered: NDArray[np.float32] = _OPACITY * ramp * ramp * (3 - 2 * ramp)
    return covered


def position(scores: NDArray[np.float32], scale: Scale) -> NDArray[np.float32]:
    """Return where each score lies between the ends of the scale, in [0, 1).

    u = (score - low) / (high - low) up to the middle, and 1 - 1 / (4 u) above it: that is smooth,
    and 1 is never reached.
    """
    low, high = check_scale(scale)
    even = np.maximum((scores.astype(np.float64) - low) / (high - low), 0)
    place = np.where(even <= 0.5, even, 1 - 0.25 / np.maximum(even, 0.5))
    return place.astype(np.float32)


def paint(place: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return the colors (H, W, 3) of positions (H, W) in the scale."""
    return _COLORS[np.rint(255 * place).astype(np.intp)]


def map_of(picture: NDArray[np.uint8], score_map: ArrayLike | torch.Tensor) -> NDArray[np.float32]:
    """Return a score map at the resolution of its picture (H, W, 3)."""
    scores = read_map(score_map)
    height, width = picture.shape[:2]
    if scores.shape == (height, width):
        return scores
    resized = Image.fromarray(scores).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(resized)


def read_map(score_map: ArrayLike | torch.Tensor) -> NDArray[np.float32]:
    """Return a score map as array (H, W) of float32; ValueError if it is none."""
    scores = read(score_map)
    if scores.ndim != 2 or scores.size == 0:
        raise ValueError(f"score_map must have shape (H, W), got {scores.shape}")
    scores = scores.astype(np.float32)
    if not np.isfinite(scores).all():
        raise ValueError("score_map must be finite, got NaN or infinite values")
    return np.ascontiguousarray(scores)


def read_image(image: ArrayLike) -> NDArray[np.uint8]:
    """Return the picture as array (H, W, 3) of uint8; ValueError if it is none."""
    picture = np.asarray(image)
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.size == 0:
        raise ValueError(f"image must have shape (H, W, 3), got {picture.shape}")
    if picture.dtype != np.uint8:
        raise ValueError(f"image must be uint8, got {picture.dtype}")
    return np.ascontiguousarray(picture)


def read(values: ArrayLike | torch.Tensor) -> NDArray[Any]:
    """Return an array or tensor as array; bfloat16, which NumPy lacks, as float32."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        return (values.float() if values.is_floating_point() else values).numpy()
    return np.asarray(values)


def check_scale(scale: Scale) -> Scale:
    """Return the scale itself, if it is two finite numbers in order; ValueError otherwise."""
    if len(scale) != 2:
        raise ValueError(f"scale must be (low, high), got {scale=}")
    low, high = float(scale[0]), float(scale[1])
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"scale must be finite with low < high, got {scale=}")
    return low, high
