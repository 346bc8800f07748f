"""What scores normal images get, kept beside the weights: for the color scale and for decisions.

The color scale comes from the training images, whose scores are lower than those of other normal
images. Decisions rest on `Calibration` alone: images that the model has not seen.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from rlr_fast.config import InferenceExecution, RLRConfig, Tiles
from rlr_fast.data import ImageFailure, Sample, UnscoredImageError
from rlr_fast.data.check import counted
from rlr_fast.data.records import read_record
from rlr_fast.files import file_digest, write_atomically
from rlr_fast.models.checkpoint import CheckpointError
from rlr_fast.models.rlr import RLRModel
from rlr_fast.pictures.scored_files import score_files
from rlr_fast.training.distributed import Processes
from rlr_fast.training.features import Features

CALIBRATION_FILE = "calibration.json"
_QUANTILES = (0.5, 0.9, 0.99, 0.999)
_BATCH = 16

_log = logging.getLogger(__name__)

VALIDATION, HELD_OUT = "validation", "held out"
"""`ClassScores.source` of images that training kept out: as the data say, or by choice."""


@dataclass(frozen=True)
class ClassScores:
    """What a class's calibration images score, each list in rising order.

    Attributes:
        image: Image scores.
        pixel: Highest pixel of each image's score map, which is not smoothed.
        source: Where the images come from.
        files: Digests of their content, see `rlr_fast.files.file_digest`.
    """

    image: list[float]
    pixel: list[float]
    source: str
    files: list[str]

    @staticmethod
    def of(scores: Iterable[tuple[float, float, str]], source: str) -> ClassScores:
        """Sort the (image score, highest pixel, digest of the file) of images."""
        image, pixel, files = zip(*scores, strict=True)
        return ClassScores(sorted(image), sorted(pixel), source, sorted(files))

    @staticmethod
    def of_files(scores: Iterable[tuple[float, float, str]], source: str) -> ClassScores:
        """Sort the same of files, whose copies say no more than one of them: each counts once."""
        scores = list(scores)
        by_file = {file: (image, pixel, file) for image, pixel, file in scores}
        if copies := len(scores) - len(by_file):
            told = counted(copies, "copy", "copies")
            _log.warning("%s among the images of %s: each counts once", told, source)
        return ClassScores.of(by_file.values(), source)


@dataclass(frozen=True)
class Calibration:
    """Scores of normal images that the model has not seen.

    Attributes:
        scoring: By name, what decides a score, as `scoring_identity` gives it.
        classes: Scores of each class.
    """

    scoring: dict[str, Any]
    classes: dict[str, ClassScores]

    def __post_init__(self) -> None:
        for name, scores in self.classes.items():
            if not 0 < len(scores.image) == len(scores.pixel) == len(scores.files):
                raise ValueError(f"{name!r} must have a score, a pixel and a file of each image")
            for values in (scores.image, scores.pixel):
                if values != sorted(values):
                    raise ValueError(f"the scores of {name!r} must rise")

    def is_of(self, model: RLRModel) -> bool:
        """Return whether a model has the weights and score settings of the calibration's."""
        return self.scoring == self.scoring | model.score_identity()


@dataclass(frozen=True)
class _TrainingScores:
    max: float


@dataclass(frozen=True)
class _ImageScores:
    classes: dict[str, _TrainingScores] = field(default_factory=dict)


@dataclass(frozen=True)
class _File:
    """The content of ``calibration.json``; older ones have no ``calibration``."""

    pixel: dict[str, float]
    image: _ImageScores = field(default_factory=_ImageScores)
    calibration: Calibration | None = None


def scoring_identity(
    model: RLRModel,
    precision: str = "fp32",
    tiles: Tiles | None = None,
) -> dict[str, Any]:
    """Return by name what decides a score, as JSON has it: model, precision, and tiles in use."""
    return model.score_identity() | {
        "precision": precision,
        "tile": None if tiles is None else list(tiles.size),
        "overlap": None if tiles is None else list(tiles.overlap),
    }


def with_later_settings(scoring: Mapping[str, Any]) -> dict[str, Any]:
    """Return a `scoring_identity` that was written before a setting existed with its default."""
    defaults = json.loads(RLRConfig().to_json())
    del defaults["backbone_weights"]  # decides nothing
    del defaults["tile"], defaults["overlap"]  # those that were in use stand there
    return defaults | scoring


def read_calibration(checkpoint: Path) -> Calibration | None:
    """Return what decisions can rest on; None where nothing was kept out of training.

    Raises:
        CheckpointError: The file is damaged.
    """
    file = _read(checkpoint)
    if file is None or file.calibration is None:
        return None
    return replace(file.calibration, scoring=with_later_settings(file.calibration.scoring))


def trained_classes(checkpoint: Path) -> dict[str, float]:
    """Return of each class that a run was trained on the highest score of its training images.

    There is none where the run does not say.

    Raises:
        CheckpointError: The file is damaged.
    """
    file = _read(checkpoint)
    return {} if file is None else {n: scores.max for n, scores in file.image.classes.items()}


def write_calibration(
    checkpoint: Path, calibration: Calibration, pixel: Mapping[str, float]
) -> None:
    """Put scores into a checkpoint's file in place of those it has; all else there stays.

    Args:
        checkpoint: Folder of a run.
        calibration: The scores.
        pixel: Quantiles of pixels for the color scale, where there is no file yet.

    Raises:
        OSError: The file cannot be read or written.
    """
    path = checkpoint / CALIBRATION_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        values = {"pixel": dict(pixel)}
    values["calibration"] = asdict(calibration)
    write_atomically(path, json.dumps(values, indent=2))


def _read(checkpoint: Path) -> _File | None:
    path = checkpoint / CALIBRATION_FILE
    try:
        return read_record(_File, path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


@torch.no_grad()
def score_held_out(
    model: RLRModel,
    images: Mapping[str, Sequence[Sample]],
    sources: Mapping[str, str],
    trained: Collection[str],
    processes: Processes,
    workers: int | None = None,
) -> tuple[Calibration | None, list[ImageFailure]]:
    """Score images that the model was not trained on, as prediction does by default.

    Args:
        model: The trained model.
        images: Of each class; a class may have none.
        sources: Of each class, where the images come from.
        trained: Digests of the files that it was trained on: their copies are left out.
        processes: Those that share the work; all get the result.
        workers: Threads that decode.

    Returns:
        The scores, None without any; and the images that were left out, by their places in all.
    """
    samples = [sample for group in images.values() for sample in group]
    mine = range(processes.rank, len(samples), processes.world_size)
    execution = InferenceExecution(batch_size=_BATCH, workers=workers)
    scores: list[tuple[str, float, float, str]] = []
    failures: list[ImageFailure] = []
    with processes.together():
        paths = [samples[i].path for i in mine]
        for outcomes in score_files(model.eval(), paths, execution, model.config.tiles):
            for image in outcomes:
                if isinstance(image, ImageFailure):
                    failures.append(ImageFailure(mine[image.index], image.error))
                    continue
                sample, highest = samples[mine[image.index]], float(image.score_map.max())
                digest = file_digest(sample.path)
                if digest in trained:
                    error = UnscoredImageError(sample.path, "the run was trained on a copy of it")
                    failures.append(ImageFailure(mine[image.index], error))
                    continue
                scores.append((sample.category, image.score, highest, digest))
    shares = processes.all_gather((scores, failures))
    classes = {}
    for name in images:
        of_class = [(s, p, f) for share, _ in shares for n, s, p, f in share if n == name]
        if of_class:
            classes[name] = ClassScores.of_files(of_class, sources[name])
    failed = sorted((f for _, share in shares for f in share), key=lambda f: f.index)
    scoring = scoring_identity(model, tiles=model.config.tiles)
    return Calibration(scoring, classes) if classes else None, failed


@torch.no_grad()
def score_quantiles(
    model: RLRModel, features: Features, categories: Sequence[str], processes: Processes
) -> dict[str, Any]:
    """Score the training images and return quantiles of their pixels' and images' scores.

    Each process scores its own images; the quantiles are those of all.

    Args:
        model: The trained model.
        features: Its training features, this process's share.
        categories: Class of each row of ``features``.
        processes: Those that share the training set.

    Returns:
        ``{"pixel": {quantile: score}, "image": {"max": score, "classes": {name: {"max": …}}}}``;
        the scores are those of `RLRModel.forward`. Pixel quantiles are means over the images' own.
    """
    model.eval().prepare_for_inference()
    device = model.device
    pixels: list[torch.Tensor] = []
    scores = []
    with processes.together():
        for tokens in features.batches(torch.arange(len(features)).split(_BATCH), device):
            out = model.predict_tokens(tokens)
            pixels += map(pixel_quantiles, out.score_map)
            scores.append(out.score.float())
        # A share may be empty: all its images unreadable.
        quantiles = torch.stack(pixels) if pixels else torch.empty(0, len(_QUANTILES))
        share = quantiles.cpu(), torch.cat(scores).cpu(), list(categories)
    shares = processes.all_gather(share)
    pixel = mean_quantiles(torch.cat([pixel for pixel, _, _ in shares]))
    score = torch.cat([score for _, score, _ in shares])
    names = [name for _, _, categories in shares for name in categories]
    per_class = {
        name: {"max": float(score[[n == name for n in names]].max())} for name in sorted(set(names))
    }
    return {
        "pixel": pixel,
        "image": {"max": float(score.max()), "classes": per_class},
    }


def pixel_quantiles(score_map: torch.Tensor) -> torch.Tensor:
    """Return the quantiles of a score map's pixels that the color scale needs.

    Args:
        score_map: (..., H, W). Of a large one every k-th pixel of each axis counts, 512² at most:
            torch.quantile has a limit.
    """
    step = -(-max(score_map.shape[-2:]) // 512)
    wanted = torch.tensor(_QUANTILES, device=score_map.device)
    return torch.quantile(score_map[..., ::step, ::step].flatten().float(), wanted)


def mean_quantiles(quantiles: torch.Tensor) -> dict[str, float]:
    """Return the means by name of images' `pixel_quantiles` (n, quantiles), as files hold them."""
    means = zip(_QUANTILES, quantiles.mean(0), strict=True)
    return {str(quantile): float(value) for quantile, value in means}


def color_scale(checkpoint: Path) -> tuple[float, float]:
    """Return the fixed color scale (low, high) of a checkpoint's heat maps.

    Low is the median pixel of normal training images; high lies six times as far above it, and the
    scale's middle three times, as their highest pixels (quantile 0.999). Normal images stay dark,
    whatever is shown beside them.

    Raises:
        CheckpointError: The checkpoint has no calibration (training has not finished), or a
            damaged one.
    """
    path = checkpoint / CALIBRATION_FILE
    try:
        pixel = read_record(_File, path).pixel
        low, high = pixel[str(_QUANTILES[0])], pixel[str(_QUANTILES[-1])]
        if not -math.inf < low < high < math.inf:
            raise ValueError(f"its quantiles must rise, got {low} and {high}")
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{checkpoint} has no {CALIBRATION_FILE} (written when training ends), so heat maps "
            "have no color scale"
        ) from error
    except (OSError, ValueError, KeyError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        raise CheckpointError(f"{path} cannot be read: {reason}") from error
    return low, low + 6 * (high - low)
