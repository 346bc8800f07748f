"""The tables of a prediction: a row per image in ``results.csv``, a line in ``results.jsonl``."""

from __future__ import annotations

import contextlib
import csv
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlr_fast.inference.decisions import Decision

if TYPE_CHECKING:
    from typing_extensions import Self

RESULTS_FILE = "results.csv"
LINES_FILE = "results.jsonl"

_BOX = ("x", "y", "width", "height")
COLUMNS = ("path", "score", "class", "p_value", "threshold", "decision", *_BOX, "area")
"""Of ``results.csv``; what is not known is empty there, and null in ``results.jsonl``."""

_WORDS = {True: "anomalous", False: "normal", None: None}


# Where a cell begins with one of these, a spreadsheet takes it for a formula, and runs it.
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


def _inert(text: str | None, lead: str) -> str | None:
    """Return a cell of ``results.csv`` that no spreadsheet takes for a formula."""
    return lead + text if text is not None and text.startswith(_FORMULA) else text


class ResultsWriter:
    """Writes the rows of images as they come; a context that closes the files.

    Args:
        out: An existing folder; tables of an earlier prediction are overwritten.

    Raises:
        OSError: The files cannot be written.
    """

    def __init__(self, out: Path) -> None:
        with contextlib.ExitStack() as stack:
            # A file's name need not be text; its bytes are kept.
            text: dict[str, Any] = {"encoding": "utf-8", "errors": "surrogateescape"}
            self._csv = stack.enter_context(open(out / RESULTS_FILE, "w", newline="", **text))
            self._lines = stack.enter_context(open(out / LINES_FILE, "w", **text))
            self._table = csv.writer(self._csv)
            self._table.writerow(COLUMNS)
            self._files = stack.pop_all()

    def write(
        self,
        path: Path,
        score: float,
        category: str | None,
        decision: Decision | None,
        size: tuple[int, int],
    ) -> None:
        """Write the row of an image whose file has ``size`` (height, width)."""
        box = None if decision is None else decision.box(size)
        values: dict[str, Any] = {
            "path": str(path),
            "score": score,
            "class": category,
            "p_value": None if decision is None else decision.p_value,
            "threshold": None if decision is None else decision.threshold,
            "decision": None if decision is None else _WORDS[decision.anomalous],
            **dict(zip(_BOX, box or (None,) * 4, strict=True)),
            "area": None if decision is None else decision.area,
        }
        inert = {"path": _inert(values["path"], "./"), "class": _inert(values["class"], "'")}
        self._table.writerow((values | inert).values())
        self._lines.write(json.dumps(values) + "\n")

    def flush(self) -> None:
        """Hand what is written to the system, so that an interruption does not lose it."""
        self._csv.flush()
        self._lines.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._files.close()
