"""The tables of a prediction: a row per image in ``results.csv``, a line in ``results.jsonl``."""

from __future__ import annotations

import contextlib
import csv
import errno
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlr_fast.inference.decisions import Decision
from rlr_fast.pictures.scored_files import ScoredImage
from rlr_fast.prediction.image_files import LINES_FILE, RESULTS_FILE, ImageFile

if TYPE_CHECKING:
    from typing_extensions import Self

_BOX = ("x", "y", "width", "height")
COLUMNS = ("path", "score", "class", "p_value", "threshold", "decision", *_BOX, "area", "failure")
"""Of ``results.csv``; what is not known is empty there, and null in ``results.jsonl``."""

Row = dict[str, Any]
"""Values by their columns."""

_WORDS = {True: "anomalous", False: "normal", None: None}

# A file's name need not be text: its other bytes are escaped, as JSON does it.
_TEXT: dict[str, Any] = {"encoding": "utf-8", "errors": "backslashreplace"}


def image_row(file: ImageFile, image: ScoredImage, decision: Decision | None) -> Row:
    """Return the row of a file that was scored."""
    row = _row(file) | {"score": image.score}
    if decision is not None:
        row |= {
            "p_value": decision.p_value,
            "threshold": decision.threshold,
            "decision": _WORDS[decision.anomalous],
            **dict(zip(_BOX, decision.box(image.size) or (None,) * 4, strict=True)),
            "area": decision.area,
        }
    return row


def left_out_row(file: ImageFile, reason: str) -> Row:
    """Return the row of a file that could not be scored."""
    return _row(file) | {"failure": reason}


def _row(file: ImageFile) -> Row:
    return dict.fromkeys(COLUMNS) | {"path": str(file.path), "class": file.category}


def line(row: Row) -> str:
    """Return a row as a line of ``results.jsonl``."""
    return json.dumps(row) + "\n"


def read_rows(path: Path) -> Iterator[tuple[Row, int]]:
    """Yield the rows of a file of lines, and how many bytes there are up to the end of each.

    The first line that is not whole, as a kill or a power cut leaves it, is the end. So is that of
    a file that does not exist.

    Raises:
        OSError: The file cannot be read.
    """
    end = 0
    try:
        file = open(path, "rb")  # noqa: SIM115
    except FileNotFoundError:
        return
    with file:
        for text in file:
            end += len(text)
            try:
                row = json.loads(text) if text.endswith(b"\n") else None
            except ValueError:
                return
            if not isinstance(row, dict) or tuple(row) != COLUMNS:
                return
            yield row, end


# Where a cell begins with one of these, a spreadsheet takes it for a formula, and runs it.
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


def _inert(text: str | None, lead: str) -> str | None:
    """Return a cell of ``results.csv`` that no spreadsheet takes for a formula."""
    return lead + text if text is not None and text.startswith(_FORMULA) else text


def _cells(row: Row) -> list[Any]:
    """Return the cells of ``results.csv``."""
    inert = {"path": _inert(row["path"], "./"), "class": _inert(row["class"], "'")}
    return list((row | inert).values())


class ResultsWriter:
    """Writes the rows of images as they come; a context that closes the files.

    Args:
        out: An existing folder.
        told: Called with every row, those that are kept first.
        kept: Bytes of ``results.jsonl`` that are kept, whole rows of an earlier prediction; the
            rest of the earlier tables is overwritten.

    Raises:
        OSError: The files cannot be written.
    """

    def __init__(self, out: Path, told: Callable[[Row], object], kept: int = 0) -> None:
        self._told, self._out = told, out
        with contextlib.ExitStack() as stack:
            self._csv = stack.enter_context(open(out / RESULTS_FILE, "w", newline="", **_TEXT))
            self._table = csv.writer(self._csv)
            self._table.writerow(COLUMNS)
            self._lines = stack.enter_context(open(out / LINES_FILE, "a", **_TEXT))
            os.truncate(out / LINES_FILE, kept)
            for row, _ in read_rows(out / LINES_FILE):
                self._table.writerow(_cells(row))
                told(row)
            self._files = stack.pop_all()

    def write(self, row: Row) -> None:
        """Write a row."""
        self._lines.write(line(row))
        self._table.writerow(_cells(row))
        self._told(row)

    def flush(self) -> None:
        """Hand what is written to the system, so that an interruption does not lose it.

        Raises:
            OSError: It cannot be written, or a table was removed, moved or replaced meanwhile.
        """
        for file, name in ((self._lines, LINES_FILE), (self._csv, RESULTS_FILE)):
            file.flush()
            path = self._out / name
            if not (path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno()))):
                what = "removed, moved or replaced while rows were written to it"
                raise FileNotFoundError(errno.ENOENT, what, str(path))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._files.close()
