"""One prediction by several processes, or in several tries: who scores what, and how it is joined.

Files are scored in batches, by their places in the list. Several processes deal the batches out in
turn; each writes the rows of its own as a part, and the first joins the parts to one table. What a
kill leaves, tables or parts, are the rows of whole batches from the first on, and perhaps more; the
next try keeps these and goes on behind them, with any number of processes.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlr_fast.data.check import counted
from rlr_fast.files import write_atomically
from rlr_fast.prediction.image_files import ImageFile, check_results_folder
from rlr_fast.prediction.results import LINES_FILE, ResultsWriter, Row, line, read_rows
from rlr_fast.training.calibration import with_later_settings

if TYPE_CHECKING:
    from typing_extensions import Self

SETTINGS_FILE = "prediction.json"
PARTS_FOLDER = "parts"

_PARTS = "rows-*-*-*.jsonl"
_FOLDER = "folder"  # the setting that says what the paths in the rows are relative to
_ANEW = "without --resume or --watch all files are scored anew"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Share:
    """The files of one process: every ``world_size``-th batch, from its own on.

    Attributes:
        files: Number of all files.
        batch_size: Files of a batch; the last one may have fewer.
        first: First batch that is to be scored by anyone.
        rank: Of the process.
        world_size: Number of processes.
    """

    files: int
    batch_size: int
    first: int
    rank: int
    world_size: int

    def __iter__(self) -> Iterator[int]:
        """Yield the places of the process's files."""
        batches = math.ceil(self.files / self.batch_size)
        for batch in range(self.first + self.rank, batches, self.world_size):
            start = batch * self.batch_size
            yield from range(start, min(start + self.batch_size, self.files))

    @property
    def part(self) -> str:
        """Name of the file with the process's rows."""
        return f"rows-{self.first}-{self.rank}-{self.world_size}.jsonl"


class PartWriter:
    """Writes the rows of one of several processes; a context that closes the file.

    Raises:
        OSError: The file cannot be written.
    """

    def __init__(self, out: Path, share: Share) -> None:
        self._file = open(  # noqa: SIM115
            out / PARTS_FOLDER / share.part, "w", encoding="utf-8", errors="surrogateescape"
        )

    def write(self, row: Row) -> None:
        """Write a row."""
        self._file.write(line(row))

    def flush(self) -> None:
        """Hand what is written to the system."""
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def open_results(
    out: Path,
    settings: Mapping[str, Any],
    told: Callable[[Row], object],
    *,
    resume: bool,
    files: Sequence[ImageFile],
    batch_size: int,
) -> tuple[ResultsWriter, int]:
    """Open the tables of a prediction, and say how many files are done.

    Args:
        out: An existing folder in which nobody else works.
        settings: By name, what decides the rows, as JSON has it; kept in ``prediction.json``.
        told: Called with every row, those that are kept first.
        resume: Keep the rows of whole batches of an earlier prediction with the same settings and
            files; where there is none, which is logged, and without ``resume``, begin anew.
        files: All files.
        batch_size: Files of a batch.

    Raises:
        ValueError: The earlier prediction had other settings or files, or pictures in ``out`` are
            of no prediction.
        OSError: The files cannot be read or written.
    """
    check_results_folder(out)
    done = kept = 0
    if not resume:
        earlier = {row["path"] for row, _ in read_rows(out / LINES_FILE)}
        others = len(earlier.difference(str(file.path) for file in files))
        if others:
            _log.warning(
                "%s held a prediction of other files, too: what was drawn of %s stays there",
                out,
                counted(others, "image"),
            )
    if check_settings(out, settings, resume):
        for row, end in read_rows(out / LINES_FILE):
            _check_row(out, row, files, done)
            done += 1
            if done % batch_size == 0 or done == len(files):
                kept = end
        if done < len(files):
            done -= done % batch_size
    with contextlib.ExitStack() as stack:
        table = stack.enter_context(ResultsWriter(out, told, kept))
        for row in part_rows(out, batch_size, len(files), done):
            _check_row(out, row, files, done)
            table.write(row)
            done += 1
        table.flush()
        remove_parts(out)
        write_settings(out, settings, (file.path for file in files))
        stack.pop_all()
    return table, done


def check_settings(out: Path, settings: Mapping[str, Any], resume: bool) -> bool:
    """Return whether an earlier prediction in a folder goes on; otherwise forget what it was.

    Raises:
        ValueError: It had other settings, its record is damaged, or its paths are relative to
            another folder than the present one: they are of other files here.
        OSError: The files cannot be read or removed.
    """
    path = out / SETTINGS_FILE
    if resume and path.exists():
        try:
            earlier = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}; {_ANEW}") from None
        if not isinstance(earlier, dict):
            raise ValueError(f"{path} is damaged: it must be an object; {_ANEW}")
        start = earlier.pop(_FOLDER, None)
        if start not in (None, os.getcwd()):
            raise ValueError(
                f"the paths in {out} are relative to {start!r}: go on there, or choose another "
                f"--out; {_ANEW}"
            )
        earlier, now = with_later_settings(earlier), json.loads(json.dumps(settings))
        names = sorted(earlier.keys() | now.keys())
        pairs = [(name, earlier.get(name), now.get(name)) for name in names]
        changed = [f"{name} was {old}, now {new}" for name, old, new in pairs if old != new]
        if changed:
            told = "; ".join(changed)
            raise ValueError(f"{out} cannot be resumed with other settings ({told}); {_ANEW}")
        return True
    if resume:
        _log.warning("there is no prediction in %s to resume; a new one begins", out)
    # In this order: rows must never stand beside settings of another prediction.
    path.unlink(missing_ok=True)
    remove_parts(out)
    return False


def write_settings(out: Path, settings: Mapping[str, Any], paths: Iterable[Path]) -> None:
    """Write the record of a prediction, whose earlier rows are gone or its own.

    Args:
        out: The folder of the results.
        settings: By name, what decides the rows.
        paths: Of the rows; where one is relative, the record says to which folder.

    Raises:
        OSError: It cannot be written.
    """
    start = None if all(path.is_absolute() for path in paths) else os.getcwd()
    record = {**settings, _FOLDER: start}
    write_atomically(out / SETTINGS_FILE, json.dumps(record, indent=2) + "\n")


def part_rows(out: Path, batch_size: int, files: int, done: int) -> Iterator[Row]:
    """Yield the rows in the parts that follow the first ``done`` ones, up to the first gap.

    Only rows of whole batches.

    Raises:
        OSError: A part cannot be read.
    """
    names = [path.stem.split("-") for path in (out / PARTS_FOLDER).glob(_PARTS)]
    if not names:
        return
    first, _, world_size = map(int, names[0][1:])
    parts = []
    for rank in range(world_size):
        share = Share(files, batch_size, first, rank, world_size)
        parts.append(row for row, _ in read_rows(out / PARTS_FOLDER / share.part))
    for batch in range(first, math.ceil(files / batch_size)):
        start = batch * batch_size
        wanted = min(batch_size, files - start)
        rows = list(itertools.islice(parts[(batch - first) % world_size], wanted))
        if len(rows) < wanted:
            return
        if start >= done:
            yield from rows


def check_no_parts(out: Path) -> None:
    """Refuse a folder with rows that several processes have left and nobody has joined.

    Raises:
        ValueError: There are some.
    """
    if any((out / PARTS_FOLDER).glob(_PARTS)):
        raise ValueError(
            f"{out} holds a prediction that several processes have not finished; finish it by "
            "predict --resume, or choose another --out"
        )


def remove_parts(out: Path) -> None:
    """Remove the parts, and their folder if nothing else is in it.

    Raises:
        OSError: A part cannot be removed.
    """
    for path in (out / PARTS_FOLDER).glob(_PARTS):
        path.unlink()
    with contextlib.suppress(OSError):
        (out / PARTS_FOLDER).rmdir()


def _check_row(out: Path, row: Row, files: Sequence[ImageFile], index: int) -> None:
    now = "not there"
    if index < len(files):
        file = files[index]
        if (row["path"], row["class"]) == (str(file.path), file.category):
            return
        now = f"{str(file.path)!r} of class {file.category}"
    raise ValueError(
        f"{out} cannot be resumed with other files: file {index + 1} was {row['path']!r} of class "
        f"{row['class']} and is {now}; {_ANEW}"
    )
