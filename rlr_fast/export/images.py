"""The images on which an exported file is compared with the model."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from rlr_fast.data import iterate_images, read_dataset
from rlr_fast.training.run_dir import read_run

_log = logging.getLogger(__name__)

COUNT = 8
"""Images that a file is compared on."""
HALF_COUNT = 64
"""Where its weights are in float16: so many that their order says something, and half of it."""


def run_images(run: Path) -> list[Path]:
    """Return the images that a run was trained and tested on.

    Raises:
        ValueError: The run does not say where they are, or they are not there.
        TrainingError: The run's record is damaged.
    """
    record = read_run(run)
    reason = "it does not say where its images are"
    if record is not None:
        root = Path(record["data"]["root"])
        here = "" if root.is_absolute() else f", seen from {Path.cwd()}"
        reason = f"its images are no longer in {root}{here}"
        try:
            data = read_dataset(root, record["data"]["layout"], record["data"]["classes"])
        except ValueError as error:
            reason += f" ({error})"
        else:
            found = [
                sample.path
                for name in data.classes
                for sample in (*data.train[name], *data.validation.get(name, ()), *data.test[name])
            ]
            if found:
                return found
    raise ValueError(f"{run}: {reason}; name a few images, or a folder, by --images to compare on")


def comparison_images(
    files: Sequence[Path], size: tuple[int, int], half: bool = False
) -> torch.Tensor:
    """Return `COUNT` or `HALF_COUNT` images (n, 3, H, W) uint8, evenly spread over a list of files.

    Args:
        files: Image files, at least one; of fewer all are taken.
        size: (H, W), to which they are resized.
        half: Whether the order of their scores is to be compared, too.

    A file that cannot be read is left out with a warning.

    Raises:
        UnreadableImageError: None of the files can be read.
        ValueError: They are too few to say anything of their order.
    """
    count = min(HALF_COUNT if half else COUNT, len(files))
    chosen = [files[(2 * i + 1) * len(files) // (2 * count)] for i in range(count)]
    [batch] = iterate_images(chosen, size, count)
    for failure in batch.failures:
        _log.warning("left out of the comparison: %s", failure.error)
    if not batch.indices:
        raise batch.failures[0].error
    if half and len(batch.indices) < HALF_COUNT // 2:
        raise ValueError(
            f"--half compares the order of at least {HALF_COUNT // 2} images, got "
            f"{len(batch.indices)}"
        )
    return batch.images
