"""The loss of a training run over its epochs."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from numpy.typing import NDArray

from rlr_fast.files import replacing


def loss_curve(history: Sequence[Mapping[str, float]], path: str | os.PathLike[str]) -> None:
    """Plot the loss of a training run over epochs, log scale, with its last values written out.

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
    colors = matplotlib.colormaps["viridis"](np.linspace(0.1, 0.72, len(levels)))
    ends = []
    for key, color in [*zip(levels, map(tuple, colors), strict=True), ("loss", "black")]:
        end = _draw_series(axes[0], epochs, series(key), window, color, 2 if key == "loss" else 1.4)
        if end is not None:
            name = key.replace("_", " ")
            stopped = "" if end[0] == epochs[-1] else f" (epoch {end[0]:.4g})"
            ends.append((f"{name}  {end[1]:.3g}{stopped}", end[1], color))
    for ax, (key, name) in zip(axes[1:], extras, strict=True):
        _draw_series(ax, epochs, series(key), 1 if key == "lr" else window, "dimgray", 1.4)
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
    with replacing(Path(path)) as unfinished:
        figure.savefig(unfinished)


def _draw_series(
    ax: Axes,
    epochs: NDArray[np.float64],
    values: NDArray[np.float64],
    window: int,
    color: Any,
    width: float,
) -> tuple[float, float] | None:
    """Draw one series; return the epoch and height of its last point, None if it has none."""
    defined = np.flatnonzero(~np.isnan(values))
    if len(defined) == 0:
        return None
    if window > 1:
        ax.plot(epochs, values, color=color, linewidth=0.6, alpha=0.2)
        values = _running_mean(values, window)
    ax.plot(epochs, values, color=color, linewidth=width)
    end = defined[-1]
    ax.plot(epochs[end], values[end], "o", color=color, markersize=4)
    return float(epochs[end]), float(values[end])


def _running_mean(values: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """Return the mean of the last ``count`` values at each place, those that are NaN left out."""
    defined = ~np.isnan(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(defined, values, 0))])
    counts = np.concatenate([[0], np.cumsum(defined)])
    stop = np.arange(1, len(values) + 1)
    start = np.maximum(stop - count, 0)
    number = counts[stop] - counts[start]
    mean = (sums[stop] - sums[start]) / np.maximum(number, 1)
    return np.where(defined, mean, math.nan)


def _label_ends(ax: Axes, ends: Sequence[tuple[str, float, Any]]) -> None:
    """Write texts (text, height, color) at the right, moved apart where they would touch."""
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
    for (text, _, color), place in zip(shown, places, strict=True):
        ax.annotate(
            text,
            (1.01, place),
            xycoords="axes fraction",
            va="center",
            color=color,
            fontweight="bold" if text.startswith("loss") else "normal",
        )
