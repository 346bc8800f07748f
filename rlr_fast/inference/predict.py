"""Prediction: score image files and decide them; write a row and a heat map for each."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rlr_fast.config import InferenceExecution
from rlr_fast.data import list_images
from rlr_fast.data.files import replacing
from rlr_fast.data.images import resize_mask
from rlr_fast.data.layouts import find_class, holds_masks
from rlr_fast.data.threads import BackgroundWriter, default_workers
from rlr_fast.inference.batches import check_placed
from rlr_fast.inference.conformal import MIN_DRIFT_IMAGES, drift
from rlr_fast.inference.decisions import Decider, Decision, Rule
from rlr_fast.inference.report import add_prediction
from rlr_fast.inference.results import RESULTS_FILE, ResultsWriter
from rlr_fast.inference.scored_files import ScoredImage, score_files
from rlr_fast.inference.tiling import Sides, optional_tiles
from rlr_fast.models.rlr import RLRModel
from rlr_fast.visualization import Scale, prediction_picture
from rlr_fast.visualization.report import REPORT_FOLDER, ReportWriter

PICTURES_FOLDER = "pictures"
MASKS_FOLDER = "masks"

_log = logging.getLogger(__name__)

# Pixels of the pictures that wait to be drawn and written, in all; one larger waits alone.
_PIXELS_WAITING = 2**24


@dataclass(frozen=True)
class ImageFile:
    """A file to score, the name of its picture in the output folder, and its class, if known."""

    path: Path
    picture: Path
    category: str | None = None


@dataclass(frozen=True)
class Prediction:
    """What `predict` did.

    Attributes:
        scores: Image score of each file that could be read.
        failures: What is wrong with the others.
        results: The table, a row per file with the columns of `rlr_fast.inference.results.COLUMNS`.
        decided: Number of images that were called normal or anomalous.
        anomalous: Number of those called anomalous.
        drift: In words, which classes' images differ from the calibration's, see
            `rlr_fast.inference.conformal.drift`.
    """

    scores: dict[Path, float]
    failures: list[str]
    results: Path
    decided: int = 0
    anomalous: int = 0
    drift: tuple[str, ...] = ()


def find_images(paths: Sequence[str | Path], out: Path | None = None) -> list[ImageFile]:
    """List the image files among ``paths``: files as they are, folders with all their subfolders.

    Pictures, masks and a report's small pictures that an earlier prediction wrote in ``out`` are
    left out, and so are, which is logged, the masks of a data set in a folder.

    Raises:
        ValueError: A path does not exist, or there is no image in a folder.
    """
    images: dict[Path, ImageFile] = {}
    pictures: set[Path] = set()
    for path in map(Path, paths):
        if path.is_dir():
            folders = [path, *sorted(p for p in path.rglob("*") if p.is_dir())]
            written = () if out is None else (PICTURES_FOLDER, MASKS_FOLDER, REPORT_FOLDER)
            ours = [(out / name).resolve() for name in written if out is not None]
            masks = {folder for folder in folders[1:] if holds_masks(folder)}
            for folder in sorted(masks):
                _log.warning("the masks in %s are not scored", folder)
            files = [
                file
                for folder in folders
                if not any(map(folder.resolve().is_relative_to, ours))
                if masks.isdisjoint((folder, *folder.parents))
                for file in list_images(folder)
            ]
            if not files:
                raise ValueError(f"paths: there is no image in {str(path)!r}")
        elif path.exists():
            files = [path]
        else:
            raise ValueError(f"paths: there is no {str(path)!r}")
        for file in files:
            place = file.relative_to(path.parent) if path.is_dir() else Path(file.name)
            if ".." in place.parts:  # of "..", which has no name of its own
                place = Path(path.resolve().name, file.relative_to(path))
            if file in images:
                continue
            picture = _picture_name(place)
            if picture in pictures:  # files of one name from different folders
                picture = _picture_name(Path(*file.resolve().parts[1:]))
            pictures.add(picture)
            images[file] = ImageFile(file, picture)
    return list(images.values())


def classify_files(files: Sequence[ImageFile], classes: Collection[str]) -> list[ImageFile]:
    """Give each file the class in whose folder it lies, see `rlr_fast.data.layouts.find_class`.

    Raises:
        ValueError: The folders of a file name two classes.
    """
    return [replace(file, category=find_class(file.path, classes)) for file in files]


def _picture_name(place: Path) -> Path:
    """``a.png`` → ``a.png``, ``a.jpg`` → ``a.jpg.png``: no two files share a picture."""
    return place if place.suffix == ".png" else place.with_name(place.name + ".png")


def predict(
    model: RLRModel,
    files: Sequence[ImageFile],
    out: Path,
    scale: Scale | None,
    execution: InferenceExecution = InferenceExecution(),
    *,
    tile: Sides | None = None,
    overlap: Sides | None = None,
    decider: Decider | None = None,
    masks: bool = False,
    relative: bool = False,
    report: ReportWriter | None = None,
    progress: Callable[[int], object] | None = None,
) -> Prediction:
    """Score files; write ``results.csv`` and ``results.jsonl`` as scores come, and ``pictures/``.

    Threads decode images ahead, and draw and write pictures behind the model. What is scored when
    an error or an interruption ends it stands in the table.

    Args:
        model: A trained model, on its device.
        files: From `find_images`.
        out: Folder for the results.
        scale: Fixed color scale (low, high) of the pictures; None writes none.
        execution: Batch size, precision and threads, as many that decode images as that write
            pictures; device, backend and compilation are the model's, which may not contradict it.
        tile: Score every picture at its own resolution, in tiles of this side or (height, width);
            see `rlr_fast.inference.tiling.predict_tiled`. A picture smaller than a tile is a
            failure. By default pictures are resized to the model's image size.
        overlap: Pixels that neighboring tiles share at least; an eighth of the tile by default.
        decider: Decides images and pixels; None gives scores alone.
        masks: Write what lies above the pixel threshold as PNG into ``masks/``, 255 where it does,
            in the size of the image's file; none where there is no such threshold.
        relative: Draw the pictures of images that have a pixel threshold above the low end of
            ``scale``: that end is 0, and the threshold ½.
        report: Gets a row per image, the thresholds and the failures; the caller closes it.
        progress: Called with the number of files done since the last call.

    Returns:
        Scores, failures, and what was decided; a file that cannot be read does not stop the others.

    Raises:
        ValueError: An argument breaks its rule; found before any work.
        OSError: The results cannot be written.
    """
    check_placed(model, execution)
    tiles = optional_tiles(tile, overlap)
    workers = execution.workers or default_workers()
    model.eval()
    done = score_files(model, [f.path for f in files], execution, tiles)
    out.mkdir(parents=True, exist_ok=True)
    scores: dict[Path, float] = {}
    failures: list[str] = []
    verdicts: Counter[bool | None] = Counter()
    groups: dict[int, list[tuple[Rule, float]]] = defaultdict(list)
    with (
        ResultsWriter(out) as table,
        BackgroundWriter(workers, 2 * workers, _PIXELS_WAITING) as jobs,
    ):
        for scored, failed in done:
            failures += failed
            decided: list[tuple[ScoredImage, Rule | None, Decision | None]] = []
            for image in scored:
                file = files[image.index]
                rule = None if decider is None else decider.rule(file.category)
                decision = None
                if rule is not None:
                    decision = rule.decide(image.score, image.score_map.numpy())
                    verdicts[decision.anomalous] += 1
                    groups[id(rule.scores)].append((rule, image.score / rule.unit))
                scores[file.path] = image.score
                table.write(file.path, image.score, file.category, decision, image.size)
                decided.append((image, rule, decision))
            table.flush()
            for image, rule, decision in decided:
                file, pixels = files[image.index], image.score_map.numel()
                name = file.picture
                low = scale if report is None else report.scale
                own = None
                if low is not None and relative and rule is not None:
                    own = rule.scale(low[0])
                if report is not None:
                    if rule is not None:
                        pooled = rule.name is None
                        report.set_threshold(file.category, rule.threshold, pooled)
                    row = (file.path, file.category, image, decision, own)
                    jobs.submit(partial(add_prediction, report, *row), pixels)
                if scale is not None:
                    target = out / PICTURES_FOLDER / name
                    jobs.submit(partial(_draw, image, scale, own, target), pixels)
                if masks and decision is not None and decision.mask is not None:
                    target = out / MASKS_FOLDER / name
                    jobs.submit(partial(_write_mask, decision.mask, image.size, target), pixels)
            if report is not None:
                report.failures = failures
            if progress is not None:
                progress(len(scored) + len(failed))
    told = _drift(groups.values())
    if report is not None and told:
        report.notes.append(
            "Not like the images of the calibration, or full of defects: " + ", ".join(told)
        )
    return Prediction(
        scores,
        failures,
        out / RESULTS_FILE,
        verdicts[True] + verdicts[False],
        verdicts[True],
        told,
    )


def _drift(groups: Collection[list[tuple[Rule, float]]]) -> tuple[str, ...]:
    """Say of which images, decided by one list of scores, the scores differ from these."""
    tested = [group for group in groups if len(group) >= MIN_DRIFT_IMAGES]
    told = []
    for group in tested:
        rule = group[0][0]
        found = drift(rule.scores.image, [score for _, score in group], rule.alpha, len(tested))
        if found is not None:
            told.append(f"{rule.name or 'all classes'} ({found})")
    return tuple(told)


def _draw(image: ScoredImage, scale: Scale, own: Scale | None, target: Path) -> None:
    """Write a picture on the scale, or relative to its own one, whose low is 0 and high 1."""
    score_map = image.score_map
    if own is not None:
        score_map, scale = (score_map - own[0]) / (own[1] - own[0]), (0.0, 1.0)
    picture = prediction_picture(image.image.permute(1, 2, 0).numpy(), score_map, scale)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Level 1 takes a quarter of the time of the default for a file a seventh larger.
    with replacing(target) as unfinished:
        picture.save(unfinished, compress_level=1)


def _write_mask(mask: NDArray[np.bool_], size: tuple[int, int], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as unfinished:
        Image.fromarray(resize_mask(mask, size).astype(np.uint8) * 255).save(unfinished)
