"""The images on which an exported file is compared with the model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from rlr_fast.data import iterate_images, read_dataset
from rlr_fast.training.run_dir import read_run

COUNT = 8
"""Images that a file is compared on."""


def run_images(run: Path) -> list[Path]:
    """Return the images that a run was trained and tested on.

    Raises:
        ValueError: The run does not say where they are, or they are not there.
        TrainingError: The run's record is damaged.
    """
    record = read_run(run)
    root = None if record is None else Path(record["data"]["root"])
    if record is None or root is None or not root.is_dir():
        reason = "it does not say where its images are" if root is None else f"{root} is gone"
        raise ValueError(
            f"{run}: {reason}; name a few images, or a folder, by --images to compare on"
        )
    data = read_dataset(root, record["data"]["layout"])
    return [
        sample.path
        for name in data.classes
        for sample in (*data.train[name], *data.validation.get(name, ()), *data.test[name])
    ]


def comparison_images(files: Sequence[Path], size: tuple[int, int]) -> torch.Tensor:
    """Return up to `COUNT` images (n, 3, H, W) uint8, evenly spread over a list of files.

    Args:
        files: Image files, at least one.
        size: (H, W), to which they are resized.

    Raises:
        UnreadableImageError: A file cannot be read.
    """
    count = min(COUNT, len(files))
    chosen = [files[(2 * i + 1) * len(files) // (2 * count)] for i in range(count)]
    [batch] = iterate_images(chosen, size, count)
    if batch.failures:
        raise batch.failures[0].error
    return batch.images
