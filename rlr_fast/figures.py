"""Pictures: score maps on one fixed colour scale, sample sheets, loss curves.

Every picture of scores takes its colour scale from the caller, the same for all images. Scaling
each map by its own range would paint the least normal spot of a normal image in the colour of a
defect.

The colours are matplotlib's "inferno": its lightness grows evenly with the score, so that equal
steps in score look equal, no edge appears where the data has none (as in "jet" and, less, "turbo"),
and the order survives grey print and colour blindness. It contains no cyan, which is left for the
outline of the ground truth.

Nothing here uses pyplot: no window, no global state, safe in a server and in threads.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

Scale = tuple[float, float]
Colour = tuple[int, int, int]

_COLOURS = np.round(255 * matplotlib.colormaps["inferno"](np.arange(256))[:, :3]).astype(np.uint8)
_STRIP = 256  # rows of a picture that are painted at once
_OUTLINE: Colour = (0, 229, 255)
_INK: Colour = (32, 32, 32)
_FAINT: Colour = (112, 112, 112)
_PAPER: Colour = (255, 255, 255)
_EMPTY: Colour = (236, 236, 236)


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


def heat_map(score_map: ArrayLike | torch.Tensor, scale: Scale) -> Image.Image:
    """Paints a score map, a pixel a score; scores outside the scale get the colour of its end.

    Args:
        score_map: Pixel scores, (H, W).
        scale: The scores of the first and the last colour, ``low < high``.

    Returns:
        An RGB picture, W x H.

    Raises:
        ValueError: For a wrong scale or shape, or a score that is NaN or infinite.
    """
    return Image.fromarray(_paint(_position(_read_map(score_map), scale)))


def overlay(
    image: ArrayLike, score_map: ArrayLike | torch.Tensor, scale: Scale, alpha: float = 0.7
) -> Image.Image:
    """Paints a score map over its image, the more opaque the higher the score.

    With u twice the position of a score in the scale, clipped to [0, 1], the opacity is
    ``alpha * (3 u^2 - 2 u^3)``: zero at and below ``low``, where the image stays as it is, small
    for the low scores of a normal image, full from the middle of the scale. The dark rim that this
    leaves around a defect sets it off from an image of any colour.

    Args:
        image: The picture, (H, W, 3), uint8.
        score_map: Pixel scores, (h, w); resized to the image (bilinear) if the sizes differ.
        scale: The scores of the first and the last colour, ``low < high``.
        alpha: Opacity from the middle of the scale, in [0, 1].

    Returns:
        An RGB picture, W x H.

    Raises:
        ValueError: For a wrong scale, shape, dtype or alpha, or a score that is NaN or infinite.
    """
    picture = _read_image(image)
    return Image.fromarray(_blend(picture, _map_of(picture, score_map), scale, alpha))


def prediction_picture(
    image: ArrayLike, score_map: ArrayLike | torch.Tensor, scale: Scale, alpha: float = 0.7
) -> Image.Image:
    """Puts image, score map and overlay side by side, with a bar that says what a colour means.

    Args:
        image: The picture, (H, W, 3), uint8.
        score_map: Pixel scores, (h, w); resized to the image (bilinear) if the sizes differ.
        scale: The scores of the first and the last colour, ``low < high``.
        alpha: Opacity of the overlay from the middle of the scale, in [0, 1].

    Returns:
        An RGB picture of the image's height; the three panels have the image's own resolution.

    Raises:
        ValueError: For a wrong scale, shape, dtype or alpha, or a score that is NaN or infinite.
    """
    _check_scale(scale)
    picture = _read_image(image)
    scores = _map_of(picture, score_map)
    height, width = scores.shape
    gap = max(2, round(height / 64))
    bar = _vertical_bar(height, scale)
    sheet = Image.new("RGB", (3 * (width + gap) + bar.width, height), _PAPER)
    for y in range(0, height, _STRIP):  # a large picture need not fit in memory as floats
        image, part = picture[y : y + _STRIP], scores[y : y + _STRIP]
        panels = (image, _paint(_position(part, scale)), _blend(image, part, scale, alpha))
        for i, panel in enumerate(panels):
            sheet.paste(Image.fromarray(panel), (i * (width + gap), y))
    sheet.paste(bar, (3 * (width + gap), 0))
    return sheet


def sample_sheet(
    rows: Sequence[SheetRow],
    scale: Scale,
    path: str | os.PathLike[str],
    *,
    alpha: float = 0.7,
    panel_size: int = 192,
    rows_per_column: int = 16,
) -> None:
    """Writes a sheet of samples: image, ground truth, score map and overlay in every row.

    Each row is captioned with category, defect and image score. The outline of the ground truth is
    drawn on the overlay. More than ``rows_per_column`` rows are laid out in several equal columns.

    Args:
        rows: The samples, at least one; about 60 make a sheet that can still be looked at.
        scale: The scores of the first and the last colour, ``low < high``.
        path: File to write; its folder must exist, its suffix names the format (.png, .jpg, .pdf).
        alpha: Opacity of the overlay from the middle of the scale, in [0, 1].
        panel_size: Longer side of a panel in pixels, at least 64; images are resized to it.
        rows_per_column: Most rows below each other, positive.

    Raises:
        ValueError: For no row, a wrong size or scale, or a row with a wrong shape, dtype or score.
    """
    _check_scale(scale)
    if not rows:
        raise ValueError("rows must hold at least one sample, got none")
    if panel_size < 64:
        raise ValueError(f"panel_size must be at least 64, got {panel_size=}")
    if rows_per_column < 1:
        raise ValueError(f"rows_per_column must be positive, got {rows_per_column=}")

    strips = [_panels(row, scale, alpha, panel_size) for row in rows]
    columns = math.ceil(len(rows) / rows_per_column)
    per_column = math.ceil(len(rows) / columns)

    font_size = max(11, round(panel_size / 13))
    font, bold = _font(font_size), _font(font_size, bold=True)
    gap = max(4, panel_size // 32)
    captions = [[row.category, row.defect, f"score {row.score:#.3g}"] for row in rows]
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
        _PAPER,
    )
    draw = ImageDraw.Draw(sheet)
    for column in range(columns):
        left = margin + column * (column_width + 3 * margin)
        panels_left = left + text_width + 2 * gap
        titles = ("image", "ground truth", "score map", "overlay")
        for i, title in enumerate(titles):
            centre = panels_left + i * (panel_size + gap) + panel_size / 2
            draw.text((centre, margin + line / 2), title, _FAINT, font, anchor="mm")
        first = column * per_column
        for j in range(first, min(first + per_column, len(rows))):
            y = top + (j - first) * (panel_size + gap)
            for k, text in enumerate(captions[j]):
                face, ink = (bold, _INK) if k == 0 else (font, _INK if k == 2 else _FAINT)
                where = (left + text_width, y + panel_size / 2 + (k - 1) * line)
                draw.text(where, _shortened(text, face, text_width), ink, face, anchor="rm")
            for i, panel in enumerate(strips[j]):
                sheet.paste(panel, (panels_left + i * (panel_size + gap), y))

    # One bar for the whole sheet, below the score map and overlay of the first column.
    left = margin + text_width + 2 * gap + 2 * (panel_size + gap)
    y = top + per_column * (panel_size + gap) + gap
    width = 2 * panel_size + gap
    ramp = np.linspace(0, 1, width, dtype=np.float32)
    sheet.paste(Image.fromarray(_paint(np.tile(ramp, (bar_height, 1)))), (left, y))
    low, high = scale
    ends = (
        (low, left, "la"),
        ((low + high) / 2, left + width / 2, "ma"),
        (high, left + width, "ra"),
    )
    for value, x, anchor in ends:
        draw.text((x, y + bar_height + gap), _number(value), _INK, font, anchor=anchor)
    label_right = left - 2 * gap
    draw.text((label_right, y + bar_height / 2), "anomaly score", _FAINT, font, anchor="rm")
    legend_y = y + bar_height + gap + font_size / 2
    label = "outline: ground truth"
    draw.text((label_right, legend_y), label, _FAINT, font, anchor="rm")
    start = label_right - font.getlength(label) - 2 * gap
    draw.line((start - 2 * gap, legend_y, start, legend_y), _OUTLINE, max(2, panel_size // 96))
    sheet.save(path)


def loss_curve(history: Sequence[Mapping[str, float]], path: str | os.PathLike[str]) -> None:
    """Plots the loss of a training run over epochs, log scale, with its last values written out.

    A series of more than 400 records is drawn faint, under its running mean over 1/100 of the run.
    Records that lack a series, and values that are NaN or infinite, leave gaps.

    Args:
        history: Records in order of time, each with "step", "epoch" and "loss", and where known
            "level_0", "level_1", ... (the loss of each level), "lr" and "grad_norm".
        path: File to write; its folder must exist, its suffix names the format (.png, .svg, .pdf).

    Raises:
        ValueError: If there is no record, or one lacks "step", "epoch" or "loss".
    """
    if not history:
        raise ValueError("history must hold at least one record, got none")
    for i, record in enumerate(history):
        missing = [key for key in ("step", "epoch", "loss") if key not in record]
        if missing:
            raise ValueError(f"history must give step, epoch and loss, record {i} lacks {missing}")
    keys = {key for record in history for key in record}
    levels = sorted((k for k in keys if k.startswith("level_")), key=lambda k: (len(k), k))
    extras = [
        (key, name)
        for key, name in (("lr", "learning rate"), ("grad_norm", "gradient norm"))
        if key in keys
    ]

    def series(key: str) -> NDArray[np.float64]:
        values = np.array([record.get(key, math.nan) for record in history], dtype=np.float64)
        return np.where(np.isfinite(values), values, math.nan)

    epochs = series("epoch")
    window = max(3, len(history) // 100) if len(history) > 400 else 1
    figure = Figure(figsize=(8, 4.5 + 1.3 * len(extras)), dpi=150, layout="constrained")
    ratios = [4.5] + [1.3] * len(extras)
    grid = figure.subplots(len(ratios), 1, sharex=True, squeeze=False, height_ratios=ratios)
    axes = grid[:, 0]
    colours = matplotlib.colormaps["viridis"](np.linspace(0.1, 0.72, len(levels)))
    ends = []
    for key, colour in [*zip(levels, map(tuple, colours), strict=True), ("loss", "black")]:
        end = _draw_series(
            axes[0], epochs, series(key), window, colour, 2 if key == "loss" else 1.4
        )
        if end is not None:
            name = key.replace("_", " ")
            stopped = "" if end[0] == epochs[-1] else f" (epoch {end[0]:.4g})"
            ends.append((f"{name}  {end[1]:.3g}{stopped}", end[1], colour))
    for ax, (key, name) in zip(axes[1:], extras, strict=True):
        _draw_series(ax, epochs, series(key), 1 if key == "lr" else window, "dimgrey", 1.4)
        ax.set_ylabel(name)
        ax.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
        ax.set_ylim(bottom=0)
    for ax in axes:
        ax.grid(True, which="major", color="0.88", linewidth=0.8)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
        ax.margins(x=0.01)
    axes[0].set_yscale("log")
    axes[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes[0].yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes[0].yaxis.set_minor_formatter(NullFormatter())
    axes[0].set_ylabel("loss")
    axes[-1].set_xlabel("epoch")
    smoothing = f" (running mean of {window} records)" if window > 1 else ""
    title = f"Loss to step {history[-1]['step']:,}, epoch {history[-1]['epoch']:.4g}{smoothing}"
    axes[0].set_title(title, loc="left", fontsize="medium")
    _label_ends(axes[0], ends)
    figure.savefig(path)


def _draw_series(
    ax: Axes,
    epochs: NDArray[np.float64],
    values: NDArray[np.float64],
    window: int,
    colour: Any,
    width: float,
) -> tuple[float, float] | None:
    """Draws one series; returns the epoch and height of its last point, None if it has none."""
    defined = np.flatnonzero(~np.isnan(values))
    if len(defined) == 0:
        return None
    if window > 1:
        ax.plot(epochs, values, color=colour, linewidth=0.6, alpha=0.2)
        values = _running_mean(values, window)
    ax.plot(epochs, values, color=colour, linewidth=width)
    end = defined[-1]
    ax.plot(epochs[end], values[end], "o", color=colour, markersize=4)
    return float(epochs[end]), float(values[end])


def _running_mean(values: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """Mean of the last ``count`` values at each place, those that are NaN left out."""
    defined = ~np.isnan(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(defined, values, 0))])
    counts = np.concatenate([[0], np.cumsum(defined)])
    stop = np.arange(1, len(values) + 1)
    start = np.maximum(stop - count, 0)
    number = counts[stop] - counts[start]
    mean = (sums[stop] - sums[start]) / np.maximum(number, 1)
    return np.where(defined, mean, math.nan)


def _label_ends(ax: Axes, ends: Sequence[tuple[str, float, Any]]) -> None:
    """Writes texts (text, height, colour) at the right, moved apart where they would touch."""
    shown = sorted((end for end in ends if end[1] > 0), key=lambda end: end[1])
    if not shown:
        return
    low, high = np.log(ax.get_ylim())
    spacing = 0.055
    places = [(math.log(height) - low) / (high - low) for _, height, _ in shown]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + spacing)
    places[-1] = min(places[-1], 1 - spacing / 2)
    for i in reversed(range(len(places) - 1)):
        places[i] = min(places[i], places[i + 1] - spacing)
    for (text, _, colour), place in zip(shown, places, strict=True):
        ax.annotate(
            text,
            (1.01, place),
            xycoords="axes fraction",
            va="center",
            color=colour,
            fontweight="bold" if text.startswith("loss") else "normal",
        )


def _panels(row: SheetRow, scale: Scale, alpha: float, size: int) -> list[Image.Image]:
    """The four panels of one row, each size x size."""
    picture = _read_image(row.image)
    height, width = picture.shape[:2]
    factor = size / max(height, width)
    fitted = (max(1, round(width * factor)), max(1, round(height * factor)))
    picture = np.asarray(Image.fromarray(picture).resize(fitted, Image.Resampling.LANCZOS))
    scores = _map_of(picture, row.score_map)
    over = _blend(picture, scores, scale, alpha)
    if row.mask is None:
        truth = Image.new("RGB", fitted, _EMPTY)
        where = (fitted[0] / 2, fitted[1] / 2)
        ImageDraw.Draw(truth).text(
            where, "no mask", _FAINT, _font(max(11, size // 13)), anchor="mm"
        )
    else:
        mask = _read_mask(row.mask)
        grey = Image.fromarray(mask.astype(np.uint8) * 255)
        grey = grey.resize(fitted, Image.Resampling.BOX)
        truth = grey.convert("RGB")
        # Any part of a defect marks its pixel, or a small one would vanish from the outline.
        _outline(over, np.asarray(grey) > 0, max(1, size // 128))
    return [
        _centred(panel, size)
        for panel in (
            Image.fromarray(picture),
            truth,
            Image.fromarray(_paint(_position(scores, scale))),
            Image.fromarray(over),
        )
    ]


def _outline(picture: NDArray[np.uint8], mask: NDArray[np.bool_], width: int) -> None:
    """Draws the border around a mask into a picture, outside the mask, so as to hide no score."""
    structure = np.ones((3, 3), dtype=bool)
    # Pinholes of a speckled mask are closed, or their outlines would cover the defect.
    margin = 3 * width
    padded = np.pad(mask, margin)
    closed = ndimage.binary_closing(padded, structure, iterations=margin)
    border = ndimage.binary_dilation(closed, structure, iterations=width) & ~closed
    picture[border[margin:-margin, margin:-margin]] = _OUTLINE


def _centred(panel: Image.Image, size: int) -> Image.Image:
    square = Image.new("RGB", (size, size), _PAPER)
    square.paste(panel, ((size - panel.width) // 2, (size - panel.height) // 2))
    return square


def _vertical_bar(height: int, scale: Scale) -> Image.Image:
    """A colour bar with the numbers of the scale, of the given height."""
    font = _font(min(max(height // 18, 9), 48))
    low, high = scale
    width = max(6, height // 28)
    texts = [_number(value) for value in (high, (low + high) / 2, low)]
    text_left = width + max(3, height // 80)
    total = math.ceil(text_left + max(font.getlength(text) for text in texts)) + 2
    bar = Image.new("RGB", (total, height), _PAPER)
    ramp = np.linspace(1, 0, height, dtype=np.float32)
    bar.paste(Image.fromarray(_paint(np.tile(ramp[:, None], (1, width)))), (0, 0))
    draw = ImageDraw.Draw(bar)
    for text, y, anchor in zip(texts, (0, height / 2, height - 1), ("la", "lm", "ld"), strict=True):
        draw.text((text_left, y), text, _INK, font, anchor=anchor)
    return bar


def _blend(
    picture: NDArray[np.uint8], scores: NDArray[np.float32], scale: Scale, alpha: float
) -> NDArray[np.uint8]:
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], got {alpha=}")
    position = _position(scores, scale)
    ramp = np.minimum(2 * position, 1)
    opacity = (alpha * ramp * ramp * (3 - 2 * ramp))[:, :, None]
    below, above = picture.astype(np.float32), _paint(position).astype(np.float32)
    mixed: NDArray[np.float32] = below + opacity * (above - below)
    return np.rint(mixed).astype(np.uint8)


def _position(scores: NDArray[np.float32], scale: Scale) -> NDArray[np.float32]:
    """Where each score lies between the ends of the scale, in [0, 1]."""
    low, high = _check_scale(scale)
    position = (scores.astype(np.float64) - low) / (high - low)
    return np.clip(position, 0, 1).astype(np.float32)


def _paint(position: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The colours (H, W, 3) of positions (H, W) in the scale."""
    return _COLOURS[np.rint(255 * position).astype(np.intp)]


def _map_of(picture: NDArray[np.uint8], score_map: ArrayLike | torch.Tensor) -> NDArray[np.float32]:
    """A score map at the resolution of its picture (H, W, 3)."""
    scores = _read_map(score_map)
    height, width = picture.shape[:2]
    if scores.shape == (height, width):
        return scores
    resized = Image.fromarray(scores).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(resized)


def _read_map(score_map: ArrayLike | torch.Tensor) -> NDArray[np.float32]:
    scores = _read(score_map)
    if scores.ndim != 2 or scores.size == 0:
        raise ValueError(f"score_map must have shape (H, W), got {scores.shape}")
    scores = scores.astype(np.float32)
    if not np.isfinite(scores).all():
        raise ValueError("score_map must be finite, got NaN or infinite values")
    return np.ascontiguousarray(scores)


def _read_mask(mask: ArrayLike | torch.Tensor) -> NDArray[np.bool_]:
    values = _read(mask)
    if values.ndim != 2 or values.size == 0 or values.dtype != np.bool_:
        raise ValueError(f"mask must be bool of shape (H, W), got {values.dtype} {values.shape}")
    return values


def _read_image(image: ArrayLike) -> NDArray[np.uint8]:
    picture = np.asarray(image)
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.size == 0:
        raise ValueError(f"image must have shape (H, W, 3), got {picture.shape}")
    if picture.dtype != np.uint8:
        raise ValueError(f"image must be uint8, got {picture.dtype}")
    return np.ascontiguousarray(picture)


def _read(values: ArrayLike | torch.Tensor) -> NDArray[Any]:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        return (values.float() if values.is_floating_point() else values).numpy()
    return np.asarray(values)


def _check_scale(scale: Scale) -> Scale:
    if len(scale) != 2:
        raise ValueError(f"scale must be (low, high), got {scale=}")
    low, high = float(scale[0]), float(scale[1])
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"scale must be finite with low < high, got {scale=}")
    return low, high


def _number(value: float) -> str:
    return f"{value:.4g}"


def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(os.path.join(matplotlib.get_data_path(), "fonts/ttf", name), size)


def _shortened(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """The text, cut and ended by an ellipsis where it is wider than ``width`` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
