"""Image files, scored: resized to the model's image size, or in tiles at their own resolution."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from rlr_fast.config import InferenceExecution, Tiles
from rlr_fast.data import ImageFailure, UnscoredImageError, iterate_images
from rlr_fast.models.precision import check_precision
from rlr_fast.models.rlr import RLRModel
from rlr_fast.pictures.batches import score_batches
from rlr_fast.pictures.tiling import predict_tiled

NOT_FINITE = "its score is not finite; --precision fp32 may help"
"""Why an image is left out whose score or score map is NaN or infinite."""


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
    model: RLRModel,
    paths: Iterable[Path],
    execution: InferenceExecution,
    tiles: Tiles | None = None,
) -> Iterator[list[ScoredImage | ImageFailure]]:
    """Score image files; yield those of a batch, in their order.

    A batch is of ``execution.batch_size`` files, whether or not each can be read; with tiles of
    one.

    An image whose score is NaN or infinite is left out.

    Args:
        model: A trained model, on its device.
        paths: The files, taken from an iterator as they are needed.
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
    model: RLRModel, paths: Iterable[Path], execution: InferenceExecution
) -> Iterator[list[ScoredImage | ImageFailure]]:
    """Score pictures resized to the model's image size."""
    size = model.config.image_size
    files, names = itertools.tee(paths)
    batches = iterate_images(files, size, execution.batch_size, execution.workers)
    scored = score_batches(model, ((b, b.images) for b in batches), execution.precision)

    def outcomes() -> Iterator[list[ScoredImage | ImageFailure]]:
        for batch, (maps, scores) in scored:
            images = map(
                ScoredImage,
                batch.indices,
                batch.images,
                torch.from_numpy(maps),
                scores,
                batch.original_sizes,
            )
            found: dict[int, ScoredImage | ImageFailure] = {image.index: image for image in images}
            found |= {failure.index: failure for failure in batch.failures}
            # Names in their order; a batch takes the next ones.
            rows = zip(sorted(found), names, strict=False)
            outcomes = ((found[index], path) for index, path in rows)
            yield [o if isinstance(o, ImageFailure) else _finite(o, path) for o, path in outcomes]

    return outcomes()


def _finite(image: ScoredImage, path: Path) -> ScoredImage | ImageFailure:
    """Return an image, or why it is left out where its score is not finite."""
    if math.isfinite(image.score) and image.score_map.isfinite().all():
        return image
    return ImageFailure(image.index, UnscoredImageError(path, NOT_FINITE))


def _tiled(
    model: RLRModel, paths: Iterable[Path], tiles: Tiles, execution: InferenceExecution
) -> Iterator[list[ScoredImage | ImageFailure]]:
    """Score pictures one by one in tiles."""
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

    def outcomes() -> Iterator[list[ScoredImage | ImageFailure]]:
        files, names = itertools.tee(paths)
        for batch, path in zip(
            iterate_images(files, None, 1, execution.workers), names, strict=False
        ):
            if batch.failures:
                yield [*batch.failures]
                continue
            [index], [image] = batch.indices, batch.images
            misfit = tiles.misfit(*image.shape[1:])
            if misfit is None:
                yield [_finite(score(index, image), path)]
            else:
                yield [ImageFailure(index, UnscoredImageError(path, misfit))]

    return outcomes()
