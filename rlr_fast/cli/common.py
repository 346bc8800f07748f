"""What several verbs do at their beginning and at their end."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rlr_fast.models.checkpoint import CheckpointError, check_checkpoint
from rlr_fast.training.calibration import color_scale


def check_out(out: Path) -> None:
    """Refuse a file where results need a folder.

    Raises:
        ValueError: ``out`` is a file.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out must be a folder, {str(out)!r} is a file")


def given_scale(scale: tuple[float, float] | None, checkpoint: str) -> tuple[float, float]:
    """Return the color scale: the one that was given, or the checkpoint's own.

    Raises:
        ValueError: It is no range, or the checkpoint has none.
        CheckpointError: There is no checkpoint.
    """
    check_checkpoint(checkpoint)
    if scale is None:
        try:
            return color_scale(Path(checkpoint))
        except CheckpointError as error:
            reason = str(error)
            if not Path(checkpoint).is_dir():
                reason = f"there is no folder {checkpoint!r}, and a repository has no color scale"
            raise ValueError(f"{reason}; give one by --scale LOW HIGH") from error
    low, high = scale
    if not low < high:
        raise ValueError(f"--scale: LOW must be below HIGH, got {low} {high}")
    return scale


def report_failures(failures: Sequence[str]) -> int:
    """Tell on standard error which files were left out; return the exit code."""
    for failure in failures:
        print(f"rlr-fast: left out: {failure}", file=sys.stderr)
    return 1 if failures else 0
