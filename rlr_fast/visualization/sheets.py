"""Sheets of samples: image, ground truth, score map and overlay in every row."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

from rlr_fast.files import replacing
from rlr_fast.visualization.fonts import (
    EMPTY,
    FAINT,
    INK,
    PAPER,
    Color,
    number,
    one_line,
    shortened,
    typeface,
)
from rlr_fast.visualization.heat_maps import (
    HIGH,
    Scale,
    check_scale,
    heat_map,
    map_of,
    overlay,
    paint,
    read,
    read_image,
)

_OUTLINE: Color = (0, 229, 255)
_ROWS_PER_COLUMN = 16


@dataclass(frozen=True)
class SheetRow:
    """One row of a sample sheet.

    Attributes:
        image: The picture, (H, W, 3), uint8.
        score_map: Pixel scores, (h, w); of any size, it is resized to the image.
        mask: True for an anomalous pixel, (h, w), bool; None where there is no ground truth.
        score: The image score.
        category: The class of product, such as "bottle".
        defect: The kind of defect, such as "broken_large", or "good".
    """

    image: ArrayLike
    score_map: ArrayLike | torch.Tensor
    mask: ArrayLike | torch.Tensor | None
    score: float
    category: str
    defect: str


def sample_sheet(
    rows: Sequence[SheetRow],
    scale: Scale,
    path: str | os.PathLike[str],
    *,
    panel_size: int = 192,
) -> None:
    """Write a sheet of samples: image, ground truth, score map and overlay in every row.

    Each row is captioned with category, defect and image score. The outline of the ground truth is
    drawn on the overlay. More than 16 rows are laid out in several equal columns.

    Args:
        rows: The samples, at least one; about 60 make a sheet that can still be looked at.
        scale: See `rlr_fast.visualization.heat_maps.prediction_picture`.
        path: File to write; its folder must exist, its suffix names the format (.png, .jpg, .pdf).
        panel_size: Longer side of a panel in pixels, at least 64; images are resized to it.

    Raises:
        ValueError: For no row, a wrong size or scale, or a row with a wrong shape, dtype or score.
    """
    check_scale(scale)
    if not rows:
        raise ValueError("rows must hold at least one sample, got none")
    if panel_size < 64:
        raise ValueError(f"panel_size must be at least 64, got {panel_size=}")

    check_scores(row.score for row in rows)
    strips = [_panels(row, scale, panel_size) for row in rows]
    columns = math.ceil(len(rows) / _ROWS_PER_COLUMN)
    per_column = math.ceil(len(rows) / columns)

    font_size = max(11, round(panel_size / 13))
    font, bold = typeface(font_size), typeface(font_size, bold=True)
    gap = max(4, panel_size // 32)
    captions = [
        [one_line(row.category), one_line(row.defect), f"score {row.score:#.3g}"] for row in rows
    ]
    longest = max(max(bold.getlength(text) for text in caption) for caption in captions)
    text_width = math.ceil(min(longest, 1.25 * panel_size))
    column_width = text_width + 2 * gap + 4 * (panel_size + gap)
    margin = 2 * gap + font_size // 2
    line = round(1.4 * font_size)
    top = margin + line + gap
    bar_height = max(8, panel_size // 16)
    sheet = Image.new(
        "RGB",
        (
            2 * margin + columns * column_width + (columns - 1) * 3 * margin,
            top + per_column * (panel_size + gap) + 2 * gap + bar_height + 2 * line + margin,
        ),
        PAPER,
    )
    draw = ImageDraw.Draw(sheet)
    for column in range(columns):
        left = margin + column * (column_width + 3 * margin)
        panels_left = left + text_width + 2 * gap
        titles = ("image", "ground truth", "score map", "overlay")
        for i, title in enumerate(titles):
            center = panels_left + i * (panel_size + gap) + panel_size / 2
            draw.text((center, margin + line / 2), title, FAINT, font, anchor="mm")
        first = column * per_column
        for j in range(first, min(first + per_column, len(rows))):
            y = top + (j - first) * (panel_size + gap)
            for k, text in enumerate(captions[j]):
                face, ink = (bold, INK) if k == 0 else (font, INK if k == 2 else FAINT)
                where = (left + text_width, y + panel_size / 2 + (k - 1) * line)
                draw.text(where, shortened(text, face, text_width), ink, face, anchor="rm")
            for i, panel in enumerate(strips[j]):
                sheet.paste(panel, (panels_left + i * (panel_size + gap), y))

    # One bar for the whole sheet, below the score map and overlay of the first column.
    left = margin + text_width + 2 * gap + 2 * (panel_size + gap)
    y = top + per_column * (panel_size + gap) + gap
    width = 2 * panel_size + gap
    ramp = np.linspace(0, 1, width, dtype=np.float32)
    sheet.paste(Image.fromarray(paint(np.tile(ramp, (bar_height, 1)))), (left, y))
    low, high = scale
    ends = (
        (low, left, "la"),
        ((low + high) / 2, left + width / 2, "ma"),
        (high, left + HIGH * width, "ma"),
    )
    for value, x, anchor in ends:
        draw.text((x, y + bar_height + gap), number(value), INK, font, anchor=anchor)
    label_right = left - 2 * gap
    draw.text((label_right, y + bar_height / 2), "anomaly score", FAINT, font, anchor="rm")
    legend_y = y + bar_height + gap + font_size / 2
    label = "outline: ground truth"
    draw.text((label_right, legend_y), label, FAINT, font, anchor="rm")
    start = label_right - font.getlength(label) - 2 * gap
    draw.line((start - 2 * gap, legend_y, start, legend_y), _OUTLINE, max(2, panel_size // 96))
    with replacing(Path(path)) as unfinished:
        sheet.save(unfinished)


def check_scores(scores: Iterable[float]) -> None:
    """Refuse image scores that are no numbers.

    Raises:
        ValueError: One is NaN or infinite.
    """
    for score in scores:
        if not math.isfinite(score):
            raise ValueError(f"score must be a finite number, got {score}")


def _panels(row: SheetRow, scale: Scale, size: int) -> list[Image.Image]:
    """Return the four panels of one row, each size x size."""
    picture = read_image(row.image)
    fitted = fitted_size(picture, size)
    picture = np.asarray(Image.fromarray(picture).resize(fitted, Image.Resampling.LANCZOS))
    scores = map_of(picture, row.score_map)
    over = overlay(picture, scores, scale)
    truth = truth_panel(row.mask, fitted)
    if row.mask is not None:
        # Any part of a defect marks its pixel, or a small one would vanish from the outline.
        _outline(over, np.asarray(truth)[..., 0] > 0, max(1, size // 128))
    return [
        centered(panel, size)
        for panel in (
            Image.fromarray(picture),
            truth,
            Image.fromarray(heat_map(scores, scale)),
            Image.fromarray(over),
        )
    ]


def fitted_size(picture: NDArray[np.uint8], size: int) -> tuple[int, int]:
    """Return (width, height) of a picture (H, W, 3) whose longer side is made ``size``."""
    height, width = picture.shape[:2]
    factor = size / max(height, width)
    return max(1, round(width * factor)), max(1, round(height * factor))


def truth_panel(mask: ArrayLike | torch.Tensor | None, fitted: tuple[int, int]) -> Image.Image:
    """Return the ground truth (h, w) as a picture of (width, height); without one, it says so."""
    if mask is None:
        truth = Image.new("RGB", fitted, EMPTY)
        where = (fitted[0] / 2, fitted[1] / 2)
        font = typeface(max(11, max(fitted) // 13))
        ImageDraw.Draw(truth).text(where, "no mask", FAINT, font, anchor="mm")
        return truth
    gray = Image.fromarray(_read_mask(mask).astype(np.uint8) * 255)
    return gray.resize(fitted, Image.Resampling.BOX).convert("RGB")


def _outline(picture: NDArray[np.uint8], mask: NDArray[np.bool_], width: int) -> None:
    """Draw the border around a mask into a picture, outside the mask, so as to hide no score."""
    structure = np.ones((3, 3), dtype=bool)
    # Pinholes of a speckled mask are closed, or their outlines would cover the defect.
    margin = 3 * width
    padded = np.pad(mask, margin)
    closed = ndimage.binary_closing(padded, structure, iterations=margin)
    border = ndimage.binary_dilation(closed, structure, iterations=width) & ~closed
    picture[border[margin:-margin, margin:-margin]] = _OUTLINE


def centered(panel: Image.Image, size: int) -> Image.Image:
    """Return the panel in the middle of a square of paper."""
    square = Image.new("RGB", (size, size), PAPER)
    square.paste(panel, ((size - panel.width) // 2, (size - panel.height) // 2))
    return square


def _read_mask(mask: ArrayLike | torch.Tensor) -> NDArray[np.bool_]:
    values = read(mask)
    if values.ndim != 2 or values.size == 0 or values.dtype != np.bool_:
        raise ValueError(f"mask must be bool of shape (H, W), got {values.dtype} {values.shape}")
    return values
