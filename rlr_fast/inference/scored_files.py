"""Image files, scored: resized to the model's image size, or in tiles at their own resolution."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from rlr_fast.config import InferenceExecution
from rlr_fast.data import iterate_images
from rlr_fast.inference.batches import score_batches
from rlr_fast.inference.tiling import Tiles, predict_tiled
from rlr_fast.models.precision import check_precision
from rlr_fast.models.rlr import RLRModel


@dataclass(frozen=True)
class ScoredImage:
    """An image file as it was scored.

    Attributes:
        index: Place in the list of files.
        image: (3, H, W) RGB, uint8: in the model's image size, or with tiles in the file's own.
        score_map: (H, W) float32, not smoothed.
        score: Image score.
        size: (height, width) of the file.
    """

    index: int
    image: torch.Tensor
    score_map: torch.Tensor
    score: float
    size: tuple[int, int]


def score_files(
    model: RLRModel, paths: list[Path], execution: InferenceExecution, tiles: Tiles | None = None
) -> Iterator[tuple[list[ScoredImage], list[str]]]:
    """Score image files in their order; yield those of a batch, and what is wrong with others.

    An image whose score is NaN or infinite is among the others.

    Args:
        model: A trained model, on its device.
        paths: The files.
        execution: Batch size, precision and threads that decode.
        tiles: Score every picture at its own resolution in tiles; None resizes them to the model's
            image size.

    Raises:
        ValueError: The precision does not exist, or not on this device; before the first batch.
    """
    if tiles is None:
        return _whole(model, paths, execution)
    return _tiled(model, paths, tiles, execution)


def _whole(
    model: RLRModel, paths: list[Path], execution: InferenceExecution
) -> Iterator[tuple[list[ScoredImage], list[str]]]:
    """Score pictures resized to the model's image size; yield those of a batch, and failures."""
    size = model.config.image_size
    batches = iterate_images(paths, size, execution.batch_size, execution.workers)
    scored = score_batches(model, ((b, b.images) for b in batches), execution.precision)
    return (
        _finite(
            paths,
            [
                ScoredImage(*values)
                for values in zip(
                    batch.indices,
                    batch.images,
                    torch.from_numpy(outcome.maps),
                    outcome.scores,
                    batch.original_sizes,
                    strict=True,
                )
            ],
            {failure.index: str(failure.error) for failure in batch.failures},
        )
        for batch, outcome in scored
    )


def _finite(
    paths: list[Path], scored: list[ScoredImage], failed: dict[int, str]
) -> tuple[list[ScoredImage], list[str]]:
    """Move images without a finite score to those that failed, which are given by their places."""
    sound = []
    for image in scored:
        if math.isfinite(image.score) and image.score_map.isfinite().all():
            sound.append(image)
        else:
            failed[image.index] = (
                f"cannot score image {str(paths[image.index])!r}: its score is not finite; "
                "--precision fp32 may help"
            )
    return sound, [failed[index] for index in sorted(failed)]


def _tiled(
    model: RLRModel, paths: list[Path], tiles: Tiles, execution: InferenceExecution
) -> Iterator[tuple[list[ScoredImage], list[str]]]:
    """Score pictures one by one in tiles; yield as `_whole` does."""
    check_precision(execution.precision, model.device)

    def score(index: int, image: torch.Tensor) -> ScoredImage:
        output = predict_tiled(
            model,
            image,
            *tiles,
            batch_size=execution.batch_size,
            precision=execution.precision,
        )
        return ScoredImage(index, image, *output, (image.shape[1], image.shape[2]))

    def pictures() -> Iterator[tuple[list[ScoredImage], list[str]]]:
        for batch in iterate_images(paths, None, 1, execution.workers):
            scored = []
            failed = {failure.index: str(failure.error) for failure in batch.failures}
            for index, image in zip(batch.indices, batch.images, strict=True):
                misfit = tiles.misfit(*image.shape[1:])
                if misfit is None:
                    scored.append(score(index, image))
                else:
                    path = str(paths[index])
                    failed[index] = f"cannot score image {path!r} in tiles: {misfit}"
            yield _finite(paths, scored, failed)

    return pictures()
