"""Makes of image files their rows, and the pictures and masks beside them."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rlr_fast.config import InferenceExecution, Tiles
from rlr_fast.data.images import ImageFailure, resize_mask
from rlr_fast.data.threads import BackgroundWriter, default_workers
from rlr_fast.files import replacing
from rlr_fast.inference.decisions import Decider
from rlr_fast.inference.report import add_prediction
from rlr_fast.models.rlr import RLRModel
from rlr_fast.pictures.scored_files import ScoredImage, score_files
from rlr_fast.prediction.image_files import MASKS_FOLDER, PICTURES_FOLDER, ImageFile
from rlr_fast.prediction.results import Row, image_row, left_out_row
from rlr_fast.visualization import Scale, prediction_picture
from rlr_fast.visualization.report import ReportWriter

if TYPE_CHECKING:
    from typing_extensions import Self

# Pixels of the pictures that wait to be drawn and written, in all; one larger waits alone.
_PIXELS_WAITING = 2**24


class RowMaker:
    """Scores and decides files; hands over each one's row when its pictures are written.

    So whoever finds a row finds its pictures, whatever stopped the process.

    Args:
        model: A trained model, on its device.
        out: Folder of the pictures and masks.
        execution: Batch size, precision and threads, as many that decode images as that write
            pictures.
        tiles: Score every picture at its own resolution in tiles.
        decider: Decides images and pixels; None gives scores alone.
        scale: Color scale (low, high) of the pictures; None writes none.
        relative: Draw the pictures of images that have a pixel threshold above the low end of
            ``scale``: that end is 0, and the threshold ½.
        masks: Write what lies above the pixel threshold, in the size of the image's file.
        report: Gets a row per image, and the thresholds.
    """

    def __init__(
        self,
        model: RLRModel,
        out: Path,
        execution: InferenceExecution,
        tiles: Tiles | None = None,
        decider: Decider | None = None,
        scale: Scale | None = None,
        relative: bool = False,
        masks: bool = False,
        report: ReportWriter | None = None,
    ) -> None:
        self._model, self._out, self._execution, self._tiles = model.eval(), out, execution, tiles
        self._decider, self._scale, self._relative = decider, scale, relative
        self._masks, self._report = masks, report

    def run(
        self,
        files: Iterable[ImageFile],
        write: Callable[[Row], object],
        flush: Callable[[], object],
        progress: Callable[[int], object] | None = None,
    ) -> None:
        """Make the rows of files, in their order.

        Threads decode images ahead, and draw and write pictures behind the model. What is scored
        when an error or an interruption ends it is handed over, if its pictures could be written.

        Args:
            files: Taken from an iterator as they are needed.
            write: Called with each row.
            flush: Called after the rows of a batch.
            progress: Called with the number of files scored since the last call.

        Raises:
            ValueError: The precision does not exist, or not on this device.
            OSError: A picture cannot be written.
        """
        workers = self._execution.workers or default_workers()
        ahead, behind = itertools.tee(files)
        paths = (file.path for file in ahead)
        done = score_files(self._model, paths, self._execution, self._tiles)
        with (
            _InOrder(write, flush) as rows,
            BackgroundWriter(workers, 2 * workers, _PIXELS_WAITING) as jobs,
        ):
            for outcomes in done:
                batch: list[Row] = []
                waiting: list[Future[None]] = []
                for outcome in outcomes:
                    file = next(behind)
                    if isinstance(outcome, ImageFailure):
                        batch.append(left_out_row(file, str(outcome.error)))
                        continue
                    row, work = self._outcome(file, outcome)
                    pixels = outcome.score_map.numel()
                    batch.append(row)
                    waiting += [jobs.submit(job, pixels) for job in work]
                rows.add(batch, waiting)
                if progress is not None:
                    progress(len(outcomes))

    def _outcome(self, file: ImageFile, image: ScoredImage) -> tuple[Row, list[Callable[[], None]]]:
        """Return the row of an image, and what is to be drawn and written for it."""
        rule = None if self._decider is None else self._decider.rule(file.category)
        decision = None if rule is None else rule.decide(image.score, image.score_map.numpy())
        low = self._scale if self._report is None else self._report.scale
        own = None
        if low is not None and self._relative and rule is not None:
            own = rule.scale(low[0])
        work: list[Callable[[], None]] = []
        if self._report is not None:
            if rule is not None:
                pooled = rule.name is None
                self._report.set_threshold(file.category, rule.threshold, pooled)
            about = (file.path, file.category, image, decision, own)
            work.append(partial(add_prediction, self._report, *about))
        if self._scale is not None:
            target = self._out / PICTURES_FOLDER / file.picture
            work.append(partial(_draw, image, self._scale, own, target))
        if self._masks and decision is not None and decision.mask is not None:
            target = self._out / MASKS_FOLDER / file.picture
            work.append(partial(_write_mask, decision.mask, image.size, target))
        return image_row(file, image, decision), work


class _InOrder:
    """Hands over rows in the order in which they came, each batch when its pictures are written.

    A context; what must be waited for is waited for within it.
    """

    def __init__(self, write: Callable[[Row], object], flush: Callable[[], object]) -> None:
        self._write, self._flush = write, flush
        self._waiting: deque[tuple[Sequence[Row], Sequence[Future[None]]]] = deque()
        self._is_broken = False  # within a batch: an interruption must not write it twice

    def add(self, rows: Sequence[Row], pictures: Sequence[Future[None]]) -> None:
        """Take the rows of a batch, and what tells that their pictures are written."""
        self._waiting.append((rows, pictures))
        self._hand_over()

    def _hand_over(self) -> None:
        while self._waiting and not self._is_broken and all(f.done() for f in self._waiting[0][1]):
            rows, pictures = self._waiting[0]
            if any(picture.exception() is not None for picture in pictures):
                return  # which is raised where the pictures are waited for
            self._is_broken = True
            for row in rows:
                self._write(row)
            self._flush()
            self._waiting.popleft()
            self._is_broken = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._hand_over()


def _draw(image: ScoredImage, scale: Scale, own: Scale | None, target: Path) -> None:
    """Write a picture on the scale, or relative to its own one, whose low is 0 and high 1."""
    score_map = image.score_map
    if own is not None:
        score_map, scale = (score_map - own[0]) / (own[1] - own[0]), (0.0, 1.0)
    picture = prediction_picture(image.image.permute(1, 2, 0).numpy(), score_map, scale)
    # Level 1 takes a quarter of the time of the default for a file a seventh larger.
    _save(picture, target, compress_level=1)


def _write_mask(mask: NDArray[np.bool_], size: tuple[int, int], target: Path) -> None:
    _save(Image.fromarray(resize_mask(mask, size).astype(np.uint8) * 255), target)


def _save(picture: Image.Image, target: Path, **options: int) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as partial_file:
        picture.save(partial_file, format="PNG", **options)
