"""Prediction: score image files, write a table row and a heat map for each."""

from __future__ import annotations

import csv
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from rlr_fast.config import InferenceExecution
from rlr_fast.data import iterate_images, list_images
from rlr_fast.data.layouts import holds_masks
from rlr_fast.data.threads import BackgroundWriter, default_workers
from rlr_fast.inference.batches import check_placed, score_batches
from rlr_fast.inference.tiling import Sides, Tiles, checked_tiles, predict_tiled
from rlr_fast.models.precision import check_precision
from rlr_fast.models.rlr import RLRModel
from rlr_fast.visualization import Scale, prediction_picture

RESULTS_FILE = "results.csv"
PICTURES_FOLDER = "pictures"

_log = logging.getLogger(__name__)

# Pixels of the pictures that wait to be drawn and written, in all; one larger waits alone.
_PIXELS_WAITING = 2**24


@dataclass(frozen=True)
class ImageFile:
    """A file to score, and the name of its picture in the output folder."""

    path: Path
    picture: Path


@dataclass(frozen=True)
class Prediction:
    """What `predict` did.

    Attributes:
        scores: Image score of each file that could be read.
        failures: What is wrong with the others.
        results: The table, one row (path, score) per file.
    """

    scores: dict[Path, float]
    failures: list[str]
    results: Path


def find_images(paths: Sequence[str | Path], out: Path | None = None) -> list[ImageFile]:
    """List the image files among ``paths``: files as they are, folders with all their subfolders.

    Pictures that an earlier prediction wrote in ``out`` are left out, and so are, which is logged,
    the masks of a data set in a folder.

    Raises:
        ValueError: A path does not exist, or there is no image in a folder.
    """
    images: dict[Path, ImageFile] = {}
    pictures: set[Path] = set()
    for path in map(Path, paths):
        if path.is_dir():
            folders = [path, *sorted(p for p in path.rglob("*") if p.is_dir())]
            ours = None if out is None else (out / PICTURES_FOLDER).resolve()
            masks = {folder for folder in folders[1:] if holds_masks(folder)}
            for folder in sorted(masks):
                _log.warning("the masks in %s are not scored", folder)
            files = [
                file
                for folder in folders
                if ours is None or not folder.resolve().is_relative_to(ours)
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
            if file in images:
                continue
            picture = _picture_name(place)
            if picture in pictures:  # files of one name from different folders
                picture = _picture_name(Path(*file.resolve().parts[1:]))
            pictures.add(picture)
            images[file] = ImageFile(file, picture)
    return list(images.values())


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
    progress: Callable[[int], object] | None = None,
) -> Prediction:
    """Score files; write ``results.csv`` as the scores come, and ``pictures/``.

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
        progress: Called with the number of files done since the last call.

    Returns:
        Scores and failures; a file that cannot be read does not stop the others.

    Raises:
        ValueError: An argument breaks its rule; found before any work.
        OSError: The results cannot be written.
    """
    check_placed(model, execution)
    if tile is None and overlap is not None:
        raise ValueError(f"overlap needs a tile, got {overlap=} without one")
    workers = execution.workers or default_workers()
    model.eval()
    paths = [f.path for f in files]
    if tile is None:
        done = _whole(model, paths, execution)
    else:
        done = _tiled(model, paths, checked_tiles(tile, overlap), execution)
    out.mkdir(parents=True, exist_ok=True)
    scores: dict[Path, float] = {}
    failures: list[str] = []
    with (
        # A file's name need not be text; its bytes are kept.
        open(
            out / RESULTS_FILE, "w", newline="", encoding="utf-8", errors="surrogateescape"
        ) as file,
        BackgroundWriter(workers, 2 * workers, _PIXELS_WAITING) as pictures,
    ):
        table = csv.writer(file)
        table.writerow(("path", "score"))
        for scored, failed in done:
            failures += failed
            for picture in scored:
                scores[paths[picture.index]] = picture.score
                table.writerow((paths[picture.index], picture.score))
            file.flush()
            if scale is not None:
                for picture in scored:
                    target = out / PICTURES_FOLDER / files[picture.index].picture
                    job = partial(_draw, picture.image, picture.score_map, scale, target)
                    pictures.submit(job, picture.score_map.numel())
            if progress is not None:
                progress(len(scored) + len(failed))
    return Prediction(scores, failures, out / RESULTS_FILE)


@dataclass(frozen=True)
class _Scored:
    """A picture (3, H, W) as it was scored, and its score map (H, W)."""

    index: int
    image: torch.Tensor
    score_map: torch.Tensor
    score: float


def _whole(
    model: RLRModel, paths: list[Path], execution: InferenceExecution
) -> Iterator[tuple[list[_Scored], list[str]]]:
    """Score pictures resized to the model's image size; yield those of a batch, and failures."""
    size = model.config.image_size
    batches = iterate_images(paths, size, execution.batch_size, execution.workers)
    scored = score_batches(model, ((b, b.images) for b in batches), execution.precision)
    return (
        (
            [
                _Scored(*values)
                for values in zip(
                    batch.indices,
                    batch.images,
                    torch.from_numpy(outcome.maps),
                    outcome.scores,
                    strict=True,
                )
            ],
            [str(failure.error) for failure in batch.failures],
        )
        for batch, outcome in scored
    )


def _tiled(
    model: RLRModel, paths: list[Path], tiles: Tiles, execution: InferenceExecution
) -> Iterator[tuple[list[_Scored], list[str]]]:
    """Score pictures one by one in tiles; yield as `_whole` does."""
    check_precision(execution.precision, model.device)

    def score(index: int, image: torch.Tensor) -> _Scored:
        output = predict_tiled(
            model,
            image,
            *tiles,
            batch_size=execution.batch_size,
            precision=execution.precision,
        )
        return _Scored(index, image, *output)

    def pictures() -> Iterator[tuple[list[_Scored], list[str]]]:
        for batch in iterate_images(paths, None, 1, execution.workers):
            scored, failed = [], [str(failure.error) for failure in batch.failures]
            for index, image in zip(batch.indices, batch.images, strict=True):
                misfit = tiles.misfit(*image.shape[1:])
                if misfit is None:
                    scored.append(score(index, image))
                else:
                    path = str(paths[index])
                    failed.append(f"cannot score image {path!r} in tiles: {misfit}")
            yield scored, failed

    return pictures()


def _draw(image: torch.Tensor, score_map: torch.Tensor, scale: Scale, target: Path) -> None:
    picture = prediction_picture(image.permute(1, 2, 0).numpy(), score_map, scale)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Level 1 takes a quarter of the time of the default for a file a seventh larger.
    picture.save(target, compress_level=1)
