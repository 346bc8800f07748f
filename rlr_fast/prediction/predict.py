"""Prediction: score image files and decide them; write a row and a heat map for each."""

from __future__ import annotations

import contextlib
import hashlib
import os
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlr_fast.config import InferenceExecution, Sides, Tiles, optional_tiles
from rlr_fast.files import lock_folder
from rlr_fast.inference.conformal import MIN_DRIFT_IMAGES, drift
from rlr_fast.inference.decisions import Decider, Rule
from rlr_fast.models.precision import check_precision
from rlr_fast.models.rlr import RLRModel
from rlr_fast.pictures.batches import check_placed
from rlr_fast.prediction.image_files import ImageFile
from rlr_fast.prediction.results import RESULTS_FILE, ResultsWriter, Row
from rlr_fast.prediction.row_maker import RowMaker
from rlr_fast.prediction.shares import (
    PARTS_FOLDER,
    SETTINGS_FILE,
    PartWriter,
    Share,
    open_results,
    part_rows,
    remove_parts,
)
from rlr_fast.training.calibration import scoring_identity
from rlr_fast.training.distributed import processes
from rlr_fast.visualization import Scale
from rlr_fast.visualization.report import ReportWriter

DRIFTED = "not like the images of the calibration, or full of defects"


@dataclass(frozen=True)
class Prediction:
    """What `predict` did, and an earlier call that it went on with.

    Attributes:
        scored: Number of files with a score.
        failures: What is wrong with the others.
        results: The table, a row per file, columns as in `rlr_fast.prediction.results.COLUMNS`.
        decided: Number of images that were called normal or anomalous.
        anomalous: Number of those called anomalous.
        drift: In words, which classes' images differ from the calibration's, see
            `rlr_fast.inference.conformal.drift`.
    """

    scored: int
    failures: list[str]
    results: Path
    decided: int = 0
    anomalous: int = 0
    drift: tuple[str, ...] = ()


def predict(
    model: RLRModel,
    files: Sequence[ImageFile],
    out: Path,
    scale: Scale | None,
    execution: InferenceExecution = InferenceExecution(),
    *,
    tile: Sides | None = None,
    overlap: Sides | None = None,
    decider: Decider | None = None,
    masks: bool = False,
    relative: bool = False,
    report: Callable[[], ReportWriter] | None = None,
    resume: bool = False,
    progress: Callable[[int], object] | None = None,
) -> Prediction:
    """Score files; write ``results.csv`` and ``results.jsonl`` as scores come, and ``pictures/``.

    Threads decode images ahead, and draw and write pictures behind the model. A row is written when
    its pictures are, so what an error, an interruption or a kill leaves is whole, and ``resume``
    goes on behind it.

    Started by torchrun, all processes call this together, with one ``out`` that all of them see.
    The batches of files are dealt out to them. Each writes its rows into ``parts/``, the first one
    joins them, and every process returns the same result. The batches are those of a single
    process, so the rows are too, on devices of a kind.

    Args:
        model: A trained model, on its device.
        files: From `rlr_fast.prediction.image_files.find_images`.
        out: Folder for the results; other processes that predict into it are refused.
        scale: Fixed color scale (low, high) of the pictures; None writes none.
        execution: Batch size, precision and threads, as many that decode images as that write
            pictures; device, backend and compilation are the model's, which may not contradict it.
        tile: Score every picture at its own resolution, in tiles of this side or (height, width);
            see `rlr_fast.pictures.tiling.predict_tiled`. A picture smaller than a tile is a
            failure. By default pictures are resized to the model's image size.
        overlap: Pixels that neighboring tiles share at least; an eighth of the tile by default.
        decider: Decides images and pixels; None gives scores alone.
        masks: Write what lies above the pixel threshold as PNG into ``masks/``, 255 where it does,
            in the size of the image's file; none where there is no such threshold.
        relative: Draw the pictures of images that have a pixel threshold above the low end of
            ``scale``: that end is 0, and the threshold ½.
        report: Makes a report, once no other process can write into ``out``; it gets a row per
            image, the thresholds and the failures, and is closed. For all files at once in one
            process.
        resume: Keep what an earlier call with the same settings and files has left in ``out``.
        progress: Called with the number of files done since the last call.

    Returns:
        Counts, failures, and what was decided; a file that cannot be read does not stop the others.

    Raises:
        ValueError: An argument breaks its rule; found before any work. Or the earlier prediction
            had other settings or files, or the processes were not given the same.
        BlockingIOError: Another process works in ``out``.
        OSError: The results cannot be written.
        PeerError: Another process met an error.
    """
    with processes() as group, contextlib.ExitStack() as stack:
        with group.together():
            check_placed(model, execution)
            check_precision(execution.precision, model.device)
            tiles = optional_tiles(tile, overlap, model.config.tiles)
            if report is not None:
                check_report_run(resume, group.world_size)
        settings = prediction_settings(model, execution, tiles, decider, scale, relative, masks)
        if group.world_size > 1:
            group.agree(settings | {"digest of the files' names": _digest(files)})
        execution = replace(execution, workers=group.workers(execution.workers))
        tally = Tally(decider)
        table: ResultsWriter | None = None

        def begin() -> int:
            nonlocal table
            stack.enter_context(lock_folder(out))
            table, done = open_results(
                out,
                settings,
                tally.add,
                resume=resume,
                files=files,
                batch_size=execution.batch_size,
            )
            stack.enter_context(table)
            if group.world_size > 1:
                (out / PARTS_FOLDER).mkdir(exist_ok=True)
            return done

        done = group.broadcast(begin)
        with group.together():
            if not (out / SETTINGS_FILE).exists():
                raise ValueError(f"all processes must see the same --out, {out} is not that of all")
        if progress is not None and done:
            progress(done)
        page = None if report is None else stack.enter_context(report())
        if page is not None:
            page.failures = tally.failures  # a report of a stopped prediction has those until then
        maker = RowMaker(model, out, execution, tiles, decider, scale, relative, masks, page)
        first = -(-done // execution.batch_size)
        share = Share(len(files), execution.batch_size, first, group.rank, group.world_size)
        mine = (files[i] for i in share)
        if table is not None and group.world_size == 1:
            maker.run(mine, table.write, table.flush, progress)
        else:
            # An error ends this process, and with it the others: they need not wait for the rest.
            with PartWriter(out, share) as part:
                maker.run(mine, part.write, part.flush, progress)
            group.all_gather(None)

        def finish() -> Prediction:
            assert table is not None
            if group.world_size > 1:
                for row in part_rows(out, execution.batch_size, len(files), done):
                    table.write(row)
                table.flush()
                remove_parts(out)
            return tally.prediction(out / RESULTS_FILE)

        prediction = group.broadcast(finish)
        if page is not None and prediction.drift:
            page.notes.append(f"{DRIFTED[0].upper()}{DRIFTED[1:]}: {', '.join(prediction.drift)}")
        return prediction


def check_report_run(resume: bool, processes: int) -> None:
    """Refuse a report of a part of the files: the rows of all are needed in one process.

    Raises:
        ValueError: The prediction goes on with an earlier one, or several processes share it.
    """
    if resume or processes > 1:
        what = "with --resume" if resume else "under torchrun"
        raise ValueError(f"--report needs all files in one run of one process: not {what}")


def prediction_settings(
    model: RLRModel,
    execution: InferenceExecution,
    tiles: Tiles | None,
    decider: Decider | None,
    scale: Scale | None,
    relative: bool,
    masks: bool,
) -> dict[str, Any]:
    """Return by name what decides the row of a file and its pictures, as JSON has it."""
    return scoring_identity(model, execution.precision, tiles) | {
        "batch_size": execution.batch_size,
        "decisions": None if decider is None else decider.identity(),
        "scale": None if scale is None else list(scale),
        "relative": relative,
        "masks": masks,
    }


def _digest(files: Sequence[ImageFile]) -> str:
    names = hashlib.sha256()
    for file in files:
        names.update(os.fsencode(f"{file.category}\0{file.path}\n"))
    return names.hexdigest()[:12]


class Tally:
    """Counts what the rows of a prediction say.

    Args:
        decider: What they were decided by.

    Attributes:
        failures: What is wrong with the files that have no score.
    """

    def __init__(self, decider: Decider | None) -> None:
        self._decider = decider
        self._scored = 0
        self.failures: list[str] = []
        self._decisions: Counter[str | None] = Counter()
        self._groups: dict[int, tuple[Rule, array[float]]] = {}

    def add(self, row: Row) -> None:
        """Count a row."""
        if row["failure"] is not None:
            self.failures.append(row["failure"])
            return
        self._scored += 1
        self._decisions[row["decision"]] += 1
        # A few classes of a pool are no sample of it.
        rule = None if self._decider is None else self._decider.own_rule(row["class"])
        if rule is not None:
            _, scores = self._groups.setdefault(id(rule.scores), (rule, array("d")))
            scores.append(row["score"] / rule.unit)

    def prediction(self, results: Path) -> Prediction:
        """Return the counts of a prediction whose table is ``results``."""
        counts = self._decisions
        return Prediction(
            self._scored,
            self.failures,
            results,
            counts["anomalous"] + counts["normal"],
            counts["anomalous"],
            self._drift(),
        )

    def _drift(self) -> tuple[str, ...]:
        """Say of which images, decided by one list of scores, the scores differ from these."""
        tested = [group for group in self._groups.values() if len(group[1]) >= MIN_DRIFT_IMAGES]
        told = []
        for rule, scores in tested:
            found = drift(rule.scores.image, scores, rule.alpha, len(tested))
            if found is not None:
                told.append(f"{rule.name or 'all classes'} ({found})")
        return tuple(told)
