"""Evaluation: seven metrics per class on a test set, with memory for one class at a time."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from rlr_fast.config import InferenceExecution, RLRConfig, Tiles
from rlr_fast.data import (
    DataSet,
    ImageFailure,
    Sample,
    UnreadableImageError,
    load_image,
    load_sample_mask,
    pick_samples,
    read_image_size,
)
from rlr_fast.inference.decisions import Decider
from rlr_fast.inference.error_counts import DecisionErrors, ErrorCounts, count_errors
from rlr_fast.inference.metrics import HEADINGS, class_metrics, format_table, mean_metrics
from rlr_fast.inference.report import add_class
from rlr_fast.models.environment import environment
from rlr_fast.models.rlr import RLRModel
from rlr_fast.pictures.batches import check_placed
from rlr_fast.pictures.scored_files import score_files
from rlr_fast.training.distributed import Processes, processes
from rlr_fast.visualization import SheetRow, sample_sheet
from rlr_fast.visualization.report import ReportWriter

METRICS_FILE = "metrics.json"


@dataclass(frozen=True)
class Evaluation:
    """The figures of a checkpoint on a test set.

    Attributes:
        classes: Metrics of each class, as `rlr_fast.inference.metrics.class_metrics` gives them.
        mean: Their means over the classes.
        protocol: How they were measured, in words and numbers.
        environment: Versions and device.
        failures: Files that could not be read and were left out.
        decisions: False alarms and misses at the calibrated thresholds; None without a decider, or
            where it can decide no class.
    """

    classes: dict[str, dict[str, float]]
    mean: dict[str, float]
    protocol: dict[str, Any]
    environment: dict[str, Any]
    failures: list[str]
    decisions: DecisionErrors | None = None

    def to_json(self, weights: str | None = None) -> str:
        """Return the content of ``metrics.json``; a metric that is not defined is null.

        Args:
            weights: Digest of the file of the weights that were measured, if there is one.
        """
        values: dict[str, Any] = {
            "mean": _plain(self.mean),
            "classes": {name: _plain(metrics) for name, metrics in self.classes.items()},
            "protocol": self.protocol,
            "environment": self.environment,
            "failures": self.failures,
        }
        if weights is not None:
            values["weights"] = weights
        if self.decisions is not None:
            values["decisions"] = self.decisions.to_dict()
        return json.dumps(values, indent=2, allow_nan=False)

    def table(self) -> str:
        """Return the figures as a text table, in percent; below it the errors of decisions."""
        table = format_table(self.classes, self.mean)
        return table if self.decisions is None else f"{table}\n\n{self.decisions.table()}"

    def tell(self, report: ReportWriter) -> None:
        """Give a report the figures and failures."""
        report.failures = self.failures
        report.metrics = {
            "headings": HEADINGS,
            "classes": {name: _plain(metrics) for name, metrics in self.classes.items()},
            "mean": _plain(self.mean),
        }
        if self.decisions is not None:
            report.decisions = self.decisions.to_dict()


def _plain(metrics: dict[str, float]) -> dict[str, float | None]:
    """Return metrics as JSON has them: null for one that is not defined."""
    return {k: v if np.isfinite(v) else None for k, v in metrics.items()}


@dataclass(frozen=True)
class FigureOptions:
    """Which test images `evaluate` shows, and how.

    Attributes:
        folder: Where the sheets are written, one per class.
        scale: Fixed color scale (low, high).
        per_defect: Images of each kind of defect, and of ``good``.
    """

    folder: Path
    scale: tuple[float, float]
    per_defect: int = 1


def evaluate(
    model: RLRModel,
    data: DataSet,
    execution: InferenceExecution = InferenceExecution(),
    *,
    tiles: Tiles | None = None,
    figures: FigureOptions | None = None,
    decider: Decider | None = None,
    report: ReportWriter | None = None,
    progress: Callable[[int], object] | None = None,
) -> Evaluation:
    """Score the test images of every class and compare with the ground truth.

    Masks are compared at the model's image size; with tiles at the scale at which the model sees
    them, in the size of a class's first picture. Image files that cannot be read, and images whose
    score is not finite, are left out and named in the result; a class of which none is left has NaN
    as its metrics, and no part in the mean.

    Started by torchrun, all processes call this together. The batches of images are dealt out to
    them; the first process gathers the maps of a class and computes its metrics, and every process
    returns the same result. The batches are those of a single process, so the numbers are too.

    Args:
        model: A trained model, on its device.
        data: Its ``test`` samples are used.
        execution: Batch size, precision and threads; device, backend and compilation are the
            model's, which may not contradict it.
        tiles: Score every picture at its own resolution in tiles; by default the model's, if it has
            any.
        figures: Write a sheet of sample images per class.
        decider: Also count false alarms and misses at its thresholds.
        report: Gets a row per image, and metrics, decisions and failures at the end; the caller
            closes it. Of several processes the first one's counts.
        progress: Called with the number of images done since the last call.

    Raises:
        ValueError: A class has no test images, a mask does not fit its image, or the execution does
            not fit the model; found before any image is scored. Or no image at all can be scored,
            or the processes were not given the same model and images.
        PeerError: Another process met an error.
    """
    with processes() as group:
        with group.together():
            check_placed(model, execution)
            tiles = tiles or model.config.tiles
            data.require_test()
            if group.is_main:
                check_masks(data)
        if group.world_size > 1:
            how = {"precision": execution.precision, "batch": execution.batch_size, "tiles": tiles}
            group.agree(_decisive(model, data) | how)
        model.eval()
        execution = replace(execution, workers=group.workers(execution.workers))
        classes: dict[str, dict[str, float]] = {}
        errors: dict[str, ErrorCounts] = {}
        failures: list[str] = []
        read = 0  # images of all processes
        done = 0  # images of earlier classes
        dealt = 0  # batches of earlier classes: the turn goes on, or the first would have most
        for name in data.classes:
            samples = data.test[name]
            with group.together():
                mine = _deal(len(samples), execution.batch_size, dealt, group)
                size = _map_size(model, samples, tiles)
                share = _score(model, samples, mine, execution, tiles, size, progress)
            dealt += math.ceil(len(samples) / execution.batch_size)
            if progress is not None:
                progress(len(samples) - share.done)
            shares = group.gather(share)
            read += sum(group.all_gather(len(share.indices)))
            if shares is None:
                continue
            scored = _join(samples, shares)
            failures += [str(failure.error) for failure in scored.failures]
            if not scored.samples:
                classes[name] = dict.fromkeys(HEADINGS, math.nan)
                continue
            labels = np.array([sample.is_anomaly for sample in scored.samples], dtype=bool)
            classes[name] = class_metrics(scored.scores, labels, scored.maps, scored.masks)
            rule = None if decider is None else decider.rule(name)
            files = [sample.path for sample in scored.samples]
            counts = None if rule is None else count_errors(rule, scored.scores, labels, files)
            if counts is not None:
                errors[name] = counts
            if figures is not None:
                try:
                    _write_sheet(name, scored, figures, size)
                except OSError as error:  # a full disk must not cost the metrics
                    failures.append(f"cannot write the figures of {name}: {error}")
            if report is not None:
                rows = (scored.samples, scored.scores, scored.maps, scored.masks)
                try:
                    add_class(report, done, *rows, decider, execution.workers)
                except OSError as error:
                    failures.append(f"cannot write the report of {name}: {error}")
                done += len(scored.samples)
        if not read:
            reason = "; ".join(failures[:1])
            raise group.alike(ValueError(f"no test image can be read: {reason}"))
        result = group.broadcast(
            lambda: Evaluation(
                classes,
                mean_metrics(classes),
                protocol(model, data, tiles) | {"precision": execution.precision},
                environment(model.device),
                failures,
                DecisionErrors(decider.alpha, decider.pool, errors)
                if decider is not None and errors
                else None,
            )
        )
        if report is not None:
            result.tell(report)
        return result


def protocol(model: RLRModel, data: DataSet, tiles: Tiles | None = None) -> dict[str, Any]:
    """Return how the metrics are measured: what must stand beside the numbers."""
    return {
        "setting": "one model for all classes",
        "data": {"root": str(data.root), "layout": data.layout, "classes": list(data.classes)},
    } | score_protocol(model.config, tiles)


def score_protocol(config: RLRConfig, tiles: Tiles | None) -> dict[str, Any]:
    """Return the part of `protocol` that is not of the data."""
    size = config.image_size

    def sigma(of: float) -> str:
        return f"sigma {' x '.join(dict.fromkeys(f'{of * s / 256:.3g}' for s in size))} px"

    smoothed = f" after a Gaussian, {sigma(config.smoothing)}" if config.smoothing else ""

    def less(surround: float) -> str:
        return f", less what a Gaussian of {sigma(surround)} makes of it" if surround else ""

    highest = f"mean of the highest {config.top_share:.3%}" if config.top_share else "maximum"
    return {
        "image_size": list(size),
        "mask": "non-zero in the file, nearest-neighbor resize",
        "pixel_score": f"score map{less(config.surround)}, not smoothed",
        "image_score": f"{highest} of the score map{smoothed}{less(config.image_surround)}",
        "upsampling": f"bilinear, {'corners aligned' if config.align_corners else 'centers kept'}",
        "uncertainty": config.uncertainty,
        "level_offsets": list(config.level_offsets),
        "level_weights": list(config.level_weights),
        "f1max": "every distinct score as threshold",
        "aupro": "8-connected regions, FPR up to 0.3",
        "checkpoint": "last epoch",
    } | ({} if tiles is None else {"tile": list(tiles.size), "overlap": list(tiles.overlap)})


@dataclass
class _Share:
    """What one process found for its images of a class; ``indices`` are their places in it."""

    indices: list[int]
    scores: np.ndarray
    maps: np.ndarray
    masks: np.ndarray
    failures: list[ImageFailure]
    done: int


@dataclass
class _Scored:
    samples: list[Sample]
    scores: np.ndarray
    maps: np.ndarray
    masks: np.ndarray
    failures: list[ImageFailure]


def _decisive(model: RLRModel, data: DataSet) -> dict[str, Any]:
    """Return by name what all processes must have in common, wherever it lies."""
    images = hashlib.sha256()
    for name in data.classes:
        for sample in data.test[name]:
            images.update(os.fsencode(f"{name}\0{os.path.relpath(sample.path, data.root)}\n"))
    identity = {f"model {k}": v for k, v in model.score_identity().items()}
    return identity | {"digest of the test images' names": images.hexdigest()[:12]}


def check_masks(data: DataSet) -> None:
    """Look for missing masks, and compare sizes with the images', from the headers alone.

    Raises:
        ValueError: A mask is missing or of another size than its image.
    """
    wrong, has_masks = [], data.has_masks
    for samples in data.test.values():
        for sample in samples:
            if sample.is_anomaly and has_masks and not sample.mask_paths:
                wrong.append(f"{sample.path} shows a defect and has no mask")
            for mask in sample.mask_paths:
                try:
                    size, of_mask = read_image_size(sample.path), read_image_size(mask)
                except UnreadableImageError:
                    continue  # reported when its turn comes
                if of_mask != size:
                    wrong.append(
                        f"{mask} is {of_mask[0]} x {of_mask[1]}, its image {sample.path} is "
                        f"{size[0]} x {size[1]}"
                    )
    if wrong:
        shown = "\n  ".join(wrong[:10])
        more = f"\n  and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        raise ValueError(
            f"masks that are missing or of another size: {len(wrong)}\n  {shown}{more}"
        )


def _deal(images: int, batch: int, dealt: int, processes: Processes) -> list[int]:
    """Return this process's images of a class: whole batches, in turn after ``dealt`` others."""
    turns = range(math.ceil(images / batch))
    mine = [turn for turn in turns if (dealt + turn) % processes.world_size == processes.rank]
    return [i for turn in mine for i in range(turn * batch, min((turn + 1) * batch, images))]


def _map_size(model: RLRModel, samples: list[Sample], tiles: Tiles | None) -> tuple[int, int]:
    """Return the (H, W) at which score maps of a class are compared with masks."""
    size = model.config.image_size
    if tiles is None:
        return size
    for sample in samples:
        with contextlib.suppress(UnreadableImageError):
            own = read_image_size(sample.path)
            if tiles.misfit(*own) is None:
                sides = zip(own, tiles.size, size, strict=True)
                height, width = (round(side * seen / tile) for side, tile, seen in sides)
                return height, width
    return size


def _score(
    model: RLRModel,
    samples: list[Sample],
    mine: list[int],
    execution: InferenceExecution,
    tiles: Tiles | None,
    size: tuple[int, int],
    progress: Callable[[int], object] | None,
) -> _Share:
    """Score the samples at the places ``mine``; maps and masks are of a size (H, W)."""
    maps = np.empty((len(mine), *size), dtype=np.float32)
    masks = np.empty((len(mine), *size), dtype=bool)
    scores: list[float] = []
    kept: list[int] = []
    failures: list[ImageFailure] = []
    for outcomes in score_files(model, (samples[i].path for i in mine), execution, tiles):
        for image in outcomes:
            place, row = mine[image.index], len(kept)
            if isinstance(image, ImageFailure):
                failures.append(ImageFailure(place, image.error))
                continue
            try:
                masks[row] = ground_truth(samples[place], size)
            except UnreadableImageError as error:
                failures.append(ImageFailure(place, error))
                continue
            maps[row] = _resized(image.score_map, size)
            scores.append(image.score)
            kept.append(place)
        if progress is not None:
            progress(len(outcomes))
    count = len(kept)
    values = np.array(scores, dtype=np.float32)
    return _Share(kept, values, maps[:count], masks[:count], failures, len(mine))


def _resized(score_map: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    if score_map.shape == size:
        return score_map
    return F.interpolate(score_map[None, None], size, mode="bilinear", antialias=True)[0, 0]


def _join(samples: list[Sample], shares: list[_Share]) -> _Scored:
    """Put the shares together in the order of ``samples``."""
    indices = np.concatenate([np.array(share.indices, dtype=int) for share in shares])
    rows = np.split(
        np.argsort(np.argsort(indices)), np.cumsum([len(share.indices) for share in shares])[:-1]
    )

    def join(parts: list[np.ndarray]) -> np.ndarray:
        if len(parts) == 1:
            return parts[0]
        whole = np.empty((len(indices), *parts[0].shape[1:]), dtype=parts[0].dtype)
        for where, part in zip(rows, parts, strict=True):
            whole[where] = part
        return whole

    return _Scored(
        samples=[samples[i] for i in np.sort(indices)],
        scores=join([share.scores for share in shares]),
        maps=join([share.maps for share in shares]),
        masks=join([share.masks for share in shares]),
        failures=sorted((f for share in shares for f in share.failures), key=lambda f: f.index),
    )


def ground_truth(sample: Sample, size: tuple[int, int]) -> np.ndarray:
    """Return the mask (H, W) of a sample; without one nothing is marked, pixel metrics undefined.

    Raises:
        UnreadableImageError: It cannot be read.
    """
    if not sample.mask_paths:
        return np.zeros(size, dtype=bool)
    return load_sample_mask(sample, size).numpy()


def _write_sheet(name: str, scored: _Scored, options: FigureOptions, size: tuple[int, int]) -> None:
    rows = []
    for i in pick_samples(scored.samples, options.per_defect):
        sample = scored.samples[i]
        rows.append(
            SheetRow(
                image=load_image(sample.path, size).permute(1, 2, 0).numpy(),
                mask=scored.masks[i],
                score_map=scored.maps[i],
                category=name,
                defect=sample.defect,
                score=float(scored.scores[i]),
            )
        )
    options.folder.mkdir(parents=True, exist_ok=True)
    sample_sheet(rows, options.scale, options.folder / f"{name}.png")
