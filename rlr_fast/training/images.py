"""What is trained on: whole pictures, or tiles of them."""

from __future__ import annotations

from dataclasses import dataclass

from rlr_fast.config import RLRConfig
from rlr_fast.data import DataSet, ImageFailure, Sample
from rlr_fast.data.check import counted
from rlr_fast.data.parts import cut
from rlr_fast.training.run_dir import TrainingError


@dataclass(frozen=True)
class TrainingImages:
    """What is trained on: ``samples``, which are whole pictures or tiles of them.

    ``places`` are those of each sample's picture; ``failures`` are pictures that have no tiles.
    """

    pictures: list[Sample]
    samples: list[Sample]
    places: list[int]
    failures: list[ImageFailure]

    def __str__(self) -> str:
        images = counted(len(self.pictures) - len(self.failures), "image")
        if self.samples is self.pictures:
            return images
        return f"{counted(len(self.samples), 'tile')} of {images}"


def training_images(data: DataSet, config: RLRConfig, workers: int | None) -> TrainingImages:
    """Return the images of all classes that a model is trained on; only headers are read.

    Args:
        data: Its ``train`` samples.
        config: Of the model: its tiles count.
        workers: Threads that read.

    Raises:
        TrainingError: A class has no picture that could be cut into tiles.
    """
    pictures = [sample for group in data.train.values() for sample in group]
    if config.tiles is None:
        return TrainingImages(pictures, pictures, list(range(len(pictures))), [])
    images = TrainingImages(pictures, *cut(pictures, config.tiles, workers))
    error = lost_class(pictures, images.failures)
    if error is not None:
        raise error
    return images


def lost_class(pictures: list[Sample], failures: list[ImageFailure]) -> TrainingError | None:
    """Return the error of classes of which nothing is left, if there are any.

    Args:
        pictures: All that were to be trained on.
        failures: Those that cannot be, by their places among them.
    """
    failed = {failure.index for failure in failures}
    readable = {sample.category for i, sample in enumerate(pictures) if i not in failed}
    empty = {sample.category for sample in pictures} - readable
    if not empty:
        return None
    reason = next(f.error for f in failures if pictures[f.index].category in empty)
    return TrainingError(f"no training image of {', '.join(sorted(empty))} can be read: {reason}")
