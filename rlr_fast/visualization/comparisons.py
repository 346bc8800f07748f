"""Sheets of reconstructions: what goes into one or several runs, and what each makes of it."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw

from rlr_fast.files import replacing
from rlr_fast.visualization.fonts import FAINT, INK, PAPER, number, one_line, shortened, typeface
from rlr_fast.visualization.heat_maps import (
    HIGH,
    Scale,
    check_scale,
    heat_map,
    map_of,
    paint,
    read_image,
)
from rlr_fast.visualization.sheets import centered, check_scores, fitted_size, truth_panel

_RULE = (190, 190, 190)


@dataclass(frozen=True)
class RunView:
    """What one run makes of a sample.

    Attributes:
        score_map: Pixel scores, (H, W).
        score: The image score.
        features: Colors of the reconstructed features, (h, w, 3), uint8.
        decoded: Picture of the reconstructed features, (H, W, 3), uint8; None without a decoder.
    """

    score_map: ArrayLike | torch.Tensor
    score: float
    features: ArrayLike
    decoded: ArrayLike | None = None


@dataclass(frozen=True)
class ComparisonRow:
    """One row of a sheet of reconstructions.

    Attributes:
        image: The picture, (H, W, 3), uint8.
        mask: True for an anomalous pixel, (H, W), bool; None where there is no ground truth.
        defect: The kind of defect, or "good".
        features: Colors of the original features, (h, w, 3), uint8.
        runs: One view per run.
        decoded: Picture of the original features, (H, W, 3), uint8; None without a decoder.
    """

    image: ArrayLike
    mask: ArrayLike | torch.Tensor | None
    defect: str
    features: ArrayLike
    runs: Sequence[RunView]
    decoded: ArrayLike | None = None


def comparison_sheet(
    rows: Sequence[ComparisonRow],
    runs: Sequence[tuple[str, Scale]],
    title: str,
    note: str,
    path: str | os.PathLike[str],
    *,
    panel_size: int = 192,
) -> None:
    """Write a sheet of reconstructions: a row per sample, a group of columns per run.

    The first group holds image, ground truth and original features; each run's group its score map
    in its own fixed color scale, with a bar below, and the reconstructed features. Several runs
    are called A, B, … in the headings and beside each row's scores, and named in full below.

    Args:
        rows: The samples, at least one.
        runs: Name and color scale ``low < high`` of each run.
        title: Written above, such as the class of product.
        note: Lines written below, such as what the colors mean.
        path: File to write; its folder must exist, its suffix names the format.
        panel_size: Longer side of a panel in pixels, at least 96; images are resized to it.

    Raises:
        ValueError: For no row, a wrong size or scale, a row of another number of runs, or with or
            without decoded pictures unlike the first, or a wrong shape, dtype or score.
    """
    if not rows:
        raise ValueError("rows must hold at least one sample, got none")
    if panel_size < 96:
        raise ValueError(f"panel_size must be at least 96, got {panel_size=}")
    for _, scale in runs:
        check_scale(scale)
    decoded = rows[0].decoded is not None
    for row in rows:
        views = [row.decoded, *(view.decoded for view in row.runs)]
        if len(row.runs) != len(runs) or any((view is not None) != decoded for view in views):
            raise ValueError("rows must have a view per run, all decoded or none of them")
    check_scores(view.score for row in rows for view in row.runs)

    ending = ["decoded"] if decoded else []
    names = [one_line(name) for name, _ in runs]
    letters = [f"{chr(ord('A') + i)}: " if len(runs) > 1 else "" for i in range(len(runs))]
    names = [letter + name for letter, name in zip(letters, names, strict=True)]
    groups = [("input", ["image", "ground truth", "features", *ending])]
    groups += [(name, ["score map", "reconstruction", *ending]) for name in names]
    font_size = max(11, round(panel_size / 12))
    font, bold = typeface(font_size), typeface(font_size, bold=True)
    line, gap = round(1.4 * font_size), max(4, panel_size // 32)
    margin, apart = 3 * gap, 4 * gap
    captions = [
        [one_line(row.defect.replace("_", " "))]
        + [
            f"{letter}score {view.score:#.3g}"
            for letter, view in zip(letters, row.runs, strict=True)
        ]
        for row in rows
    ]
    longest = max(bold.getlength(text) for caption in captions for text in caption)
    text_width = math.ceil(min(longest, 1.25 * panel_size))

    lefts: list[list[int]] = []  # of the panels of each group
    x = margin + text_width + 2 * gap
    for _, columns in groups:
        lefts.append([x + i * (panel_size + gap) for i in range(len(columns))])
        x = lefts[-1][-1] + panel_size + apart
    top = margin + 3 * line + 3 * gap
    below = top + len(rows) * (panel_size + gap)
    notes = [*(names if len(runs) > 1 else []), *note.splitlines()]
    bar_height = max(8, panel_size // 16)
    bottom = 2 * gap + bar_height + (1 + len(notes)) * line
    sheet = Image.new("RGB", (x - apart + margin, below + gap + bottom + margin), PAPER)
    draw = ImageDraw.Draw(sheet)
    title = shortened(one_line(title), bold, sheet.width - 2 * margin)
    draw.text((margin, margin + line / 2), title, INK, bold, anchor="lm")
    for (name, columns), places in zip(groups, lefts, strict=True):
        width = places[-1] + panel_size - places[0]
        middle = places[0] + width / 2
        name = shortened(name, bold, width)
        draw.text((middle, margin + line * 1.5), name, INK, bold, anchor="mm")
        rule = margin + 2 * line + gap // 2
        draw.line((places[0], rule, places[0] + width - 1, rule), _RULE, max(1, panel_size // 96))
        for text, left in zip(columns, places, strict=True):
            where = (left + panel_size / 2, margin + 2.5 * line + gap)
            draw.text(where, text, FAINT, font, anchor="mm")
    for i, (row, caption) in enumerate(zip(rows, captions, strict=True)):
        y = top + i * (panel_size + gap)
        start = y + panel_size / 2 - (len(caption) - 1) * line / 2
        for k, text in enumerate(caption):
            face, ink = (bold, INK) if k == 0 else (font, FAINT)
            where = (margin + text_width, start + k * line)
            draw.text(where, shortened(text, face, text_width), ink, face, anchor="rm")
        panels = _panels(row, [scale for _, scale in runs], panel_size)
        for panel, left in zip(panels, [x for places in lefts for x in places], strict=True):
            sheet.paste(panel, (left, y))
    for k, text in enumerate(notes):
        y = below + bottom - (len(notes) - 1 - k) * line
        draw.text((margin, y), shortened(text, font, sheet.width - 2 * margin), FAINT, font, "ls")
    ramp = np.linspace(0, 1, panel_size, dtype=np.float32)
    for (_, (low, high)), places in zip(runs, lefts[1:], strict=True):
        left, y = places[0], below + gap
        sheet.paste(Image.fromarray(paint(np.tile(ramp, (bar_height, 1)))), (left, y))
        y += bar_height + gap
        draw.text((left, y), number(low), INK, font, anchor="la")
        draw.text((left + HIGH * panel_size, y), number(high), INK, font, anchor="ma")
    with replacing(Path(path)) as unfinished:
        sheet.save(unfinished)


def _panels(row: ComparisonRow, scales: Sequence[Scale], size: int) -> list[Image.Image]:
    """Return the panels of one row from left to right, each size x size."""
    image = read_image(row.image)
    fitted = fitted_size(image, size)

    def smooth(picture: ArrayLike) -> Image.Image:
        return Image.fromarray(read_image(picture)).resize(fitted, Image.Resampling.LANCZOS)

    def tokens(colors: ArrayLike) -> Image.Image:  # each token as the rectangle that it is
        return Image.fromarray(read_image(colors)).resize(fitted, Image.Resampling.NEAREST)

    shown: NDArray[Any] = np.asarray(smooth(image))
    panels = [Image.fromarray(shown), truth_panel(row.mask, fitted), tokens(row.features)]
    if row.decoded is not None:
        panels.append(smooth(row.decoded))
    for view, scale in zip(row.runs, scales, strict=True):
        scores = map_of(shown, view.score_map)
        panels += [Image.fromarray(heat_map(scores, scale)), tokens(view.features)]
        if view.decoded is not None:
            panels.append(smooth(view.decoded))
    return [centered(panel, size) for panel in panels]
