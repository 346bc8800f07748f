"""Writes a report row by row, with memory for one row at a time."""

from __future__ import annotations

import base64
import contextlib
import datetime
import math
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote_from_bytes

import torch
from numpy.typing import ArrayLike

from rlr_fast.files import put_in_place
from rlr_fast.visualization.heat_maps import Scale
from rlr_fast.visualization.report.page import embedded, page_parts
from rlr_fast.visualization.report.thumbnails import Thumbnails, color_tables, thumbnails

if TYPE_CHECKING:
    from typing_extensions import Self

REPORT_FILE = "report.html"
REPORT_FOLDER = "report"
EMBED_LIMIT = 20_000_000
"""Most bytes of small pictures in the page itself, as they stand there; others become files."""


@dataclass(frozen=True)
class ReportImage:
    """An image of a report.

    Attributes:
        path: Its file, as it is told.
        category: Its class; None if it is not known.
        score: Image score.
        image: The picture, (H, W, 3), uint8, in any size.
        score_map: Pixel scores, (h, w).
        size: (height, width) of the file.
        defect: The kind of defect, ``"good"`` for a normal image; None where there are no labels.
        mask: What view 4 shows, (h, w), bool: ground truth, or what lies above a pixel threshold;
            None for nothing.
        p_value: See `rlr_fast.inference.conformal`; None where nothing is calibrated.
        calibrated: Whether the image's score is among those that its threshold rests on.
        scale: The scale of its map; the report's own by default.
    """

    path: Path
    category: str | None
    score: float
    image: ArrayLike
    score_map: ArrayLike | torch.Tensor
    size: tuple[int, int]
    defect: str | None = None
    mask: ArrayLike | torch.Tensor | None = None
    p_value: float | None = None
    calibrated: bool = False
    scale: Scale | None = None


def check_report(out: Path) -> None:
    """Refuse a folder in which no report can be written.

    Raises:
        ValueError: A folder is where the page would be, or a file where its pictures would be.
    """
    if (out / REPORT_FILE).is_dir():
        raise ValueError(f"--report writes a file, {str(out / REPORT_FILE)!r} is a folder")
    if (out / REPORT_FOLDER).exists() and not (out / REPORT_FOLDER).is_dir():
        raise ValueError(f"--report may need a folder, {str(out / REPORT_FOLDER)!r} is a file")


class ReportWriter:
    """Writes ``report.html``, and small pictures beyond a size into ``report/`` beside it.

    A context: on leaving it the page is there, also after an error or an interruption, when it says
    that it ends early. The page of an earlier report, and its pictures, are removed at the start.
    `add` may be called by several threads.

    Args:
        out: An existing folder.
        kind: Whether the images have labels (``evaluation``) or not (``prediction``).
        scale: Fixed color scale (low, high) of the maps.
        facts: What is said of model and data at the top, by name.
        alpha: The false-alarm rate of the thresholds.
        normal: What `ReportImage.defect` is of a normal image.
        embed_limit: Most bytes of small pictures in the page.

    Attributes:
        failures: What is wrong with files that were left out.
        metrics: ``{"headings": {key: heading}, "classes": {name: {key: fraction}}, "mean": …}``;
            None where there are none, and for a metric without meaning.
        decisions: Errors at calibrated thresholds, as `rlr_fast.inference.error_counts` has them.
        notes: Sentences that stand at the top.
        scale: The color scale.

    Raises:
        ValueError: For a wrong scale.
        OSError: The files cannot be written.
    """

    def __init__(
        self,
        out: Path,
        kind: Literal["evaluation", "prediction"],
        scale: Scale,
        facts: Mapping[str, str],
        *,
        alpha: float | None = None,
        normal: str = "good",
        embed_limit: int = EMBED_LIMIT,
    ) -> None:
        self.failures: Sequence[str] = []
        self.metrics: dict[str, Any] | None = None
        self.decisions: dict[str, Any] | None = None
        self._alpha = alpha
        self.notes: list[str] = []
        self._out, self._kind, self.scale, self._facts = out, kind, scale, dict(facts)
        self._normal, self._embed_limit = normal, embed_limit
        self._thresholds: dict[str | None, tuple[float | None, bool]] = {}
        self._tables = color_tables(scale)
        self._count = self._embedded = 0
        self._relative = False
        self._lock = threading.Lock()
        self._remove_old()
        self._partial = out / f".{REPORT_FILE}.partial"
        before, self._between, self._after = page_parts()
        self._file = open(self._partial, "w", encoding="utf-8", newline="")  # noqa: SIM115
        self._file.write(before + "[")

    def set_threshold(
        self, category: str | None, threshold: float | None, pooled: bool = False
    ) -> None:
        """Say above which score an image of a class is called anomalous.

        Args:
            category: The class; None for images whose class is not known.
            threshold: Image score; None where nothing is decided.
            pooled: Whether it rests on all classes, so that its rate holds over their mix alone.
        """
        self._thresholds[category] = threshold, pooled

    def add(self, index: int, image: ReportImage) -> None:
        """Write the row of an image.

        Args:
            index: Its place among the files; rows may come in any order.
            image: The image.

        Raises:
            ValueError: For a wrong shape or dtype, or a score that is NaN or infinite.
            OSError: The files cannot be written.
        """
        if not math.isfinite(image.score):
            raise ValueError(f"score must be finite, got {image.score} of {image.path}")
        small = thumbnails(
            image.image, image.score_map, image.mask, image.size, image.scale or self.scale
        )
        with self._lock:
            row = [
                index,
                str(image.path),
                self._link(image.path),
                image.category,
                image.defect,
                image.score,
                image.p_value,
                int(image.calibrated),
                *image.size,
                *self._places(index, small),
            ]
            self._file.write((",\n" if self._count else "\n") + embedded(row))
            self._count += 1
            self._relative |= image.scale is not None

    def _places(self, index: int, small: Thumbnails) -> list[str | None]:
        """Return where the browser finds the small pictures, which are written if it is a file."""
        parts = {
            "jpg": (small.picture, "image/jpeg"),
            "map.jpg": (small.score_map, "image/jpeg"),
            "mask.png": (small.mask, "image/png"),
        }
        uris = [
            None if data is None else f"data:{kind};base64,{base64.b64encode(data).decode()}"
            for data, kind in parts.values()
        ]
        size = sum(len(uri) for uri in uris if uri is not None)
        if self._embedded + size <= self._embed_limit:
            self._embedded += size
            return list(uris)
        self._embed_limit = self._embedded  # what follows are files as well, however small
        places: list[str | None] = []
        # A thousand images a folder: file managers choke on a hundred thousand files.
        folder = self._out / REPORT_FOLDER / f"{index // 1000:04d}"
        folder.mkdir(parents=True, exist_ok=True)
        for suffix, (data, _) in parts.items():
            name = f"{index:07d}.{suffix}"
            if data is not None:
                (folder / name).write_bytes(data)
            places.append(None if data is None else f"{REPORT_FOLDER}/{folder.name}/{name}")
        return places

    def _link(self, path: Path) -> str | None:
        """Return the image's file as a relative link; None where there is no such way."""
        try:
            way = os.path.relpath(os.path.abspath(path), os.path.abspath(self._out))
        except ValueError:  # another drive of Windows
            return None
        # "./" keeps a name such as "a:b.png" from being read as a protocol.
        return "./" + quote_from_bytes(os.fsencode(Path(way).as_posix()))

    def _remove_old(self) -> None:
        """Remove an earlier report: its rows and pictures would belong to other scores."""
        (self._out / REPORT_FILE).unlink(missing_ok=True)
        for file in (self._out / REPORT_FOLDER).glob("[0-9]" * 4 + "/" + "[0-9]" * 7 + ".[jm]*"):
            file.unlink()

    def _finish(self, stopped: bool) -> None:
        thresholds = [[name, *limit] for name, limit in self._thresholds.items()]
        facts = {
            "kind": self._kind,
            "facts": list(self._facts.items()),
            "date": datetime.datetime.now().astimezone().isoformat(" ", "minutes"),
            "notes": self.notes,
            "stopped": stopped,
            "failures": list(self.failures),
            "metrics": self.metrics,
            "decisions": self.decisions,
            "alpha": self._alpha,
            "thresholds": thresholds,
            "normal": self._normal,
            "scale": list(self.scale),
            "relative": self._relative,
            "tables": self._tables,
        }
        self._file.write("\n]" + self._between + embedded(facts) + self._after)
        self._file.close()
        put_in_place(self._partial, self._out / REPORT_FILE)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._finish(stopped=error is not None)
        except OSError as failure:
            with contextlib.suppress(OSError):
                self._file.close()
                self._partial.unlink(missing_ok=True)
            if error is None:  # the block's own error comes first
                if failure.filename is None:
                    failure.filename = str(self._out / REPORT_FILE)
                raise
