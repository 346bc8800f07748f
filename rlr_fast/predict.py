"""Prediction: score image files, write a table row and a heat-map picture for each."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from rlr_fast.data import iterate_images, list_images
from rlr_fast.figures import prediction_picture
from rlr_fast.model import RLRModel

RESULTS_FILE = "results.csv"
PICTURES_FOLDER = "pictures"

_BATCH = 8


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
        results: The table, one row (path, score) a file.
    """

    scores: dict[Path, float]
    failures: list[str]
    results: Path


def find_images(paths: Sequence[str | Path], out: Path | None = None) -> list[ImageFile]:
    """List the image files among ``paths``: files as they are, folders with all their subfolders.

    Pictures that an earlier prediction wrote in ``out`` are left out.

    Raises:
        ValueError: A path does not exist, or there is no image in a folder.
    """
    found: dict[Path, ImageFile] = {}
    pictures: set[Path] = set()
    for path in map(Path, paths):
        if path.is_dir():
            folders = [path, *sorted(p for p in path.rglob("*") if p.is_dir())]
            ours = None if out is None else (out / PICTURES_FOLDER).resolve()
            files = [
                file
                for folder in folders
                if ours is None or not folder.resolve().is_relative_to(ours)
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
            if file in found:
                continue
            picture = _picture_name(place)
            if picture in pictures:  # files of one name from different folders
                picture = _picture_name(Path(*file.resolve().parts[1:]))
            pictures.add(picture)
            found[file] = ImageFile(file, picture)
    return list(found.values())


def _picture_name(place: Path) -> Path:
    """``a.png`` → ``a.png``, ``a.jpg`` → ``a.jpg.png``: no two files share a picture."""
    return place if place.suffix == ".png" else place.with_name(place.name + ".png")


def predict(
    model: RLRModel,
    files: Sequence[ImageFile],
    out: Path,
    scale: tuple[float, float] | None,
    *,
    workers: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> Prediction:
    """Score files; write ``results.csv`` as the scores come, and ``pictures/``.

    Args:
        model: A trained model, on its device.
        files: From `find_images`.
        out: Folder for the results.
        scale: Fixed colour scale (low, high) of the pictures; None writes none.
        workers: Threads that decode images.
        progress: Called with the number of files done since the last call.

    Returns:
        Scores and failures; a file that cannot be read does not stop the others.

    Raises:
        OSError: The results cannot be written.
    """
    device = next(model.levels.parameters()).device
    model.eval()
    out.mkdir(parents=True, exist_ok=True)
    scores: dict[Path, float] = {}
    failures: list[str] = []
    with (
        open(out / RESULTS_FILE, "w", newline="", encoding="utf-8") as file,
        torch.inference_mode(),
    ):
        table = csv.writer(file)
        table.writerow(("path", "score"))
        paths = [f.path for f in files]
        for batch in iterate_images(paths, model.config.image_size, _BATCH, workers):
            failures += [str(failure.error) for failure in batch.failures]
            if batch.indices:
                output = model(batch.images.to(device))
                score_maps = output.score_map[:, 0].float().cpu().numpy()
                for i, index in enumerate(batch.indices):
                    scores[paths[index]] = float(output.score[i])
                    table.writerow((paths[index], scores[paths[index]]))
                    if scale is not None:
                        image = batch.images[i].permute(1, 2, 0).numpy()
                        target = out / PICTURES_FOLDER / files[index].picture
                        target.parent.mkdir(parents=True, exist_ok=True)
                        prediction_picture(image, score_maps[i], scale).save(target)
                file.flush()
            if progress is not None:
                progress(len(batch.indices) + len(batch.failures))
    return Prediction(scores, failures, out / RESULTS_FILE)
