"""Reconstructed features made visible: a sheet per class, of one run or of two side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlr_fast.config import InferenceExecution, Level, level_name, per_level
from rlr_fast.data import (
    DataSet,
    Sample,
    UnreadableImageError,
    iterate_images,
    load_sample_mask,
    pick_samples,
)
from rlr_fast.models.rlr import RLRModel
from rlr_fast.visualization import ComparisonRow, PrincipalColors, RunView, Scale, comparison_sheet
from rlr_fast.visualization.decoder import Decoder


@dataclass(frozen=True)
class Run:
    """A trained model, its name in the sheets, and the fixed color scale of its score maps."""

    name: str
    model: RLRModel
    scale: Scale


def check_runs(runs: Sequence[Run], level: Level | None) -> int:
    """Refuse runs that cannot stand side by side.

    Args:
        runs: At least one run.
        level: The level to show, one of ``out_indices``; None for the first.

    Returns:
        The place of the level in ``out_indices``.

    Raises:
        ValueError: There is no run, the runs' features differ, two have one name, there is no such
            level, or a model has tiles or fewer than three components.
    """
    if not runs:
        raise ValueError("runs must hold at least one, got none")
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise ValueError(f"runs must have different names, got {', '.join(names)}")
    for run in runs:
        run.model.config.require_whole("a sheet of reconstructions")
    first = runs[0].model.feature_identity()
    for run in runs[1:]:
        wrong = [
            f"{name} {first[name]} and {value}"
            for name, value in run.model.feature_identity().items()
            if value != first[name]
        ]
        if wrong:
            raise ValueError(
                f"the features of {runs[0].name} and {run.name} differ: {'; '.join(wrong)}"
            )
    indices = runs[0].model.config.out_indices
    if level is not None and level not in indices:
        known = ", ".join(map(level_name, indices))
        raise ValueError(
            f"level must be one of the runs' out_indices {known}, got {level_name(level)}"
        )
    place = 0 if level is None else indices.index(level)
    for run in runs:
        components = per_level(run.model.config.components, len(indices))[place]
        if 0 < components < 3:
            raise ValueError(
                f"components must be 3 or more to be shown as colors, got {components} at level "
                f"{level_name(indices[place])} of {run.name}"
            )
    return place


@torch.inference_mode()
def reconstruction_sheets(
    runs: Sequence[Run],
    data: DataSet,
    out: Path,
    *,
    decoder: Decoder | None = None,
    level: Level | None = None,
    per_defect: int = 1,
    workers: int | None = None,
    progress: Callable[[int], object] = lambda images: None,
) -> tuple[list[Path], list[str]]:
    """Write a sheet per class: normal and defective images, score maps and reconstructed features.

    The colors of features are the first three principal components of one level's original tokens
    over the shown images of a class, in the scale in which the first run compares them. The
    reconstructions of all runs are painted in the same basis and range of colors.

    Args:
        runs: One or more runs of the same features, all on one device.
        data: Its ``test`` samples are shown.
        out: Folder of the sheets, ``CLASS.png``.
        decoder: Paints original and reconstructed features as pictures; on the same device.
        level: The level whose features are shown, one of ``out_indices``; None for the first.
        per_defect: Images of each kind of defect, and of ``good``, at least 1; the first that can
            be read.
        workers: Threads that decode images.
        progress: Called with the number of images done since the last call.

    Returns:
        The sheets, and the files that could not be read and were left out.

    Raises:
        ValueError: See `check_runs`; ``per_defect`` breaks its rule; or a class has no test images,
            or none that can be read, or a mask has another size than its image; found before any
            sheet is written.
        OSError: A sheet cannot be written.
    """
    place = check_runs(runs, level)
    if per_defect < 1:
        raise ValueError(f"per_defect must be at least 1, got {per_defect}")
    data.require_test()
    for run in runs:
        run.model.eval().prepare_for_inference()
    config, grid = runs[0].model.config, runs[0].model.backbone.grids[place]
    features_of = level_name(config.out_indices[place])
    note = (
        f"features: {grid[0]} × {grid[1]} tokens of level {features_of}, first three "
        "principal components of the originals\n"
        "as red, green, blue; one basis and one range for originals and reconstructions"
    )
    if decoder is not None:
        note += "\ndecoded: all levels, painted by a decoder that knows normal images alone"
    picked: dict[str, list[Sample]] = {}
    failures: list[str] = []
    for name in data.classes:
        picked[name], reasons = _pick(data.test[name], per_defect, config.image_size, workers)
        failures += reasons
        if not picked[name]:
            raise ValueError(f"no test image of {name} can be read: {reasons[0]}")
    out.mkdir(parents=True, exist_ok=True)
    sheets = []
    for name, samples in picked.items():
        shown, lost = _read(samples, config.image_size, workers)
        for error in lost.values():  # it could be read a moment ago
            raise error
        rows = _rows(runs, shown, place, decoder)
        scales = [(run.name, run.scale) for run in runs]
        comparison_sheet(rows, scales, name.replace("_", " "), note, out / f"{name}.png")
        sheets.append(out / f"{name}.png")
        progress(len(samples))
    return sheets, failures


class _Shown(NamedTuple):
    sample: Sample
    image: Tensor  # (3, H, W)
    mask: Tensor | None  # (H, W)


def _pick(
    samples: Sequence[Sample], per_defect: int, size: tuple[int, int], workers: int | None
) -> tuple[list[Sample], list[str]]:
    """Return the samples to show, good ones first, and why others in their place cannot be."""
    left, reasons = list(samples), list[str]()
    while True:
        picked = [left[i] for i in pick_samples(left, per_defect)]
        _, failures = _read(picked, size, workers)
        if not failures:
            return sorted(picked, key=lambda sample: sample.is_anomaly), reasons
        reasons += [str(error) for error in failures.values()]
        left = [sample for sample in left if sample not in failures]


def _read(
    samples: Sequence[Sample], size: tuple[int, int], workers: int | None
) -> tuple[list[_Shown], dict[Sample, UnreadableImageError]]:
    """Return the samples that can be read, and why the others cannot."""
    shown: list[_Shown] = []
    failures: dict[Sample, UnreadableImageError] = {}
    for batch in iterate_images(samples, size, 1, workers):
        failures |= {samples[failure.index]: failure.error for failure in batch.failures}
        for index, image in zip(batch.indices, batch.images, strict=True):
            sample = samples[index]
            try:
                known = bool(sample.mask_paths) or not sample.is_anomaly
                mask = load_sample_mask(sample, size) if known else None
            except UnreadableImageError as error:
                failures[sample] = error
                continue
            shown.append(_Shown(sample, image, mask))
    return shown, failures


def _rows(
    runs: Sequence[Run], shown: Sequence[_Shown], place: int, decoder: Decoder | None
) -> list[ComparisonRow]:
    first = runs[0].model
    device = first.device
    images = torch.stack([sample.image for sample in shown])
    tokens = [
        first.tokens(batch.to(device)) for batch in images.split(InferenceExecution.batch_size)
    ]

    def compared(batches: list[list[Tensor]]) -> Tensor:  # (n, N, C) of the shown level
        return torch.cat([first.compared(place, levels[place]).cpu() for levels in batches])

    def decoded(batches: list[list[Tensor]]) -> list[NDArray[np.uint8] | None]:
        if decoder is None:
            return [None] * len(shown)
        pictures = torch.cat([decoder(levels).cpu() for levels in batches])
        return list((255 * pictures.clamp(0, 1)).round().byte().permute(0, 2, 3, 1).numpy())

    originals, grid = compared(tokens), first.backbone.grids[place]
    colors = PrincipalColors(originals.flatten(0, 1))
    views: list[list[RunView]] = []  # of each run
    for run in runs:
        scored = [run.model.predict_tokens(levels) for levels in tokens]
        rebuilt = [run.model.reconstruct(levels) for levels in tokens]
        maps = torch.cat([out.score_map[:, 0].cpu() for out in scored])
        scores = torch.cat([out.score for out in scored]).tolist()
        painted = [colors.paint(features, grid) for features in compared(rebuilt)]
        pictures = decoded(rebuilt)
        views.append([RunView(*of) for of in zip(maps, scores, painted, pictures, strict=True)])
    return [
        ComparisonRow(
            image=shown_sample.image.permute(1, 2, 0).numpy(),
            mask=shown_sample.mask,
            defect=shown_sample.sample.defect,
            features=colors.paint(original, grid),
            runs=of_runs,
            decoded=picture,
        )
        for shown_sample, original, picture, of_runs in zip(
            shown, originals, decoded(tokens), zip(*views, strict=True), strict=True
        )
    ]
