"""What several verbs do at their beginning and at their end."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlr_fast.config import suggest
from rlr_fast.data import DataSet
from rlr_fast.inference.decisions import ALPHA, CALIBRATE, Decider
from rlr_fast.models.checkpoint import CheckpointError
from rlr_fast.training.calibration import color_scale, read_calibration, trained_classes
from rlr_fast.training.run_dir import unfinished

_log = logging.getLogger(__name__)


def check_out(out: Path, *files: str) -> None:
    """Refuse a file where results need a folder, and a folder where one of ``files`` is written.

    Raises:
        ValueError: ``out`` is a file, or one of ``files`` a folder in it.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out must be a folder, {str(out)!r} is a file")
    for path in (out / name for name in files):
        if path.is_dir():
            raise ValueError(f"{str(path)!r} is a folder, where a file of results belongs")


def tell_earlier(out: Path, written: Mapping[str, bool]) -> None:
    """Tell what an earlier command left in ``out`` and this one, which does not write it, leaves.

    Args:
        out: Folder of the results.
        written: Whether this command writes it, by name.
    """
    for name, new in written.items():
        if not new and (out / name).exists():
            _log.warning("%s stays there, and is of an earlier command", out / name)


def given_scale(scale: tuple[float, float] | None, checkpoint: Path) -> tuple[float, float]:
    """Return the color scale: the one that was given, or the checkpoint's own.

    Raises:
        ValueError: It is no range of finite numbers, or the checkpoint has none.
    """
    if scale is None:
        try:
            return color_scale(checkpoint)
        except CheckpointError as error:
            raise ValueError(f"{error}; give one by --scale LOW HIGH") from error
    low, high = scale
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"--scale: LOW must be below HIGH, both finite, got {low} {high}")
    return scale


def refuse_unfinished(run: Path) -> None:
    """Refuse what only a finished run is for.

    Raises:
        ValueError: Training was stopped before its end.
    """
    if (told := unfinished(run)) is not None:
        raise ValueError(told)


def check_class(name: str, known: Collection[str], run: str | Path) -> None:
    """Refuse a class that a run was not trained on, if it says on which it was.

    Raises:
        ValueError: It is none of ``known``.
    """
    if known and name not in known:
        raise ValueError(f"{run} was not trained on a class {name!r}; {suggest(name, known)}")


def tell_unmeasured(data: DataSet, known: Collection[str], run: Path) -> None:
    """Warn of classes that a run was not trained on, and of those without one kind of image.

    Args:
        data: With test images.
        known: Classes that the run was trained on; none where it does not say.
        run: Its folder.
    """
    strange = [name for name in data.classes if known and name not in known]
    if strange:
        _log.warning("%s was not trained on %s", run, ", ".join(strange))
    for kind, is_anomaly in (("defective", True), ("normal", False)):
        lack = [n for n in data.classes if all(s.is_anomaly != is_anomaly for s in data.test[n])]
        if lack:
            _log.warning(
                "no %s test image of %s: what needs both kinds has no value there, and the mean is "
                "that of the other classes",
                kind,
                ", ".join(lack),
            )


def given_decider(
    checkpoint: Path,
    scoring: Mapping[str, Any],
    categories: Collection[str | None],
    *,
    alpha: float | None,
    pool: bool,
    needed: bool,
    whole: bool = False,
) -> Decider | None:
    """Return what decides by a checkpoint's calibration.

    What stands in the way is an error where a flag asks for decisions, and else a warning.

    Args:
        checkpoint: Folder of a run.
        scoring: How the images are scored, from `scoring_identity`.
        categories: Classes of the images; None is one that is not known.
        alpha: Of ``--alpha``, if given.
        pool: Of ``--pool``.
        needed: Whether another flag needs decisions.
        whole: Whether one that cannot decide some of ``categories`` is of no use.

    Raises:
        ValueError: Decisions are asked for and cannot be made; the message says what would help.
        CheckpointError: The calibration is damaged.
    """
    calibration = read_calibration(checkpoint)
    decider = None
    try:
        if calibration is None:
            raise ValueError(f"{checkpoint} has no calibration: {CALIBRATE}")
        units = trained_classes(checkpoint)
        decider = Decider(calibration, ALPHA if alpha is None else alpha, pool, units)
        decider.check_scoring(scoring)
        reason = decider.undecided(categories)
    except ValueError as error:
        decider, reason = None, str(error)
    if reason is not None:
        if needed or pool or alpha is not None:
            raise ValueError(reason)
        _log.warning("not decided: %s", reason)
    return decider if reason is None or not whole else None


def report_failures(failures: Sequence[str]) -> int:
    """Tell on standard error which files were left out; return the exit code."""
    for failure in failures:
        print(f"rlr-fast: left out: {failure}", file=sys.stderr)
    return 1 if failures else 0
