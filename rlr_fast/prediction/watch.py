"""Prediction without an end: score files as they arrive in folders."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from rlr_fast.config import InferenceExecution, Sides, optional_tiles
from rlr_fast.data.layouts import find_class
from rlr_fast.files import lock_folder
from rlr_fast.inference.decisions import Decider
from rlr_fast.models.precision import check_precision
from rlr_fast.models.rlr import RLRModel
from rlr_fast.pictures.batches import check_placed
from rlr_fast.prediction.arrivals import Arrivals, check_watched
from rlr_fast.prediction.image_files import (
    ImageFile,
    check_results_folder,
    own_picture_name,
    picture_name,
    picture_place,
)
from rlr_fast.prediction.predict import Prediction, Tally, prediction_settings
from rlr_fast.prediction.results import (
    LINES_FILE,
    RESULTS_FILE,
    ResultsWriter,
    Row,
    left_out_row,
    read_rows,
)
from rlr_fast.prediction.row_maker import RowMaker
from rlr_fast.prediction.shares import SETTINGS_FILE, check_no_parts, check_settings, write_settings
from rlr_fast.visualization import Scale

_PAUSE = 0.2  # seconds between two looks, while nothing comes


def watch(
    model: RLRModel,
    folders: Sequence[Path],
    out: Path,
    scale: Scale | None,
    execution: InferenceExecution = InferenceExecution(),
    *,
    classes: Collection[str] = (),
    category: str | None = None,
    settle: float = 1.0,
    tile: Sides | None = None,
    overlap: Sides | None = None,
    decider: Decider | None = None,
    masks: bool = False,
    relative: bool = False,
    told: Callable[[Row], object] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Prediction:
    """Score image files as they arrive in folders, each once, and add their rows to a table.

    Files that are there already are the first. Each is scored when it was not changed for
    ``settle`` seconds, in the order of these changes. A row is written when its pictures are; so
    after a kill the same call goes on with the files that have no row, and none has two.

    Args:
        model: A trained model, on its device.
        folders: Watched, with all their subfolders.
        out: Folder for the results. What a prediction with the same settings has left is added to.
        scale: See `rlr_fast.prediction.predict.predict`, as for all that is not explained here.
        execution: Batch size: the most files that are scored at once.
        classes: Of the run: a file's class is the one in whose folder it lies.
        category: Class of all files, instead.
        settle: Seconds.
        tile: Side or (height, width) of tiles.
        overlap: Pixels that tiles share.
        decider: Decides images and pixels.
        masks: Write masks.
        relative: Draw relative to pixel thresholds.
        told: Called with each new row, when it is in the table.
        stop: Asked between two looks whether to end.

    Returns:
        What the table holds, when ``stop`` says so or at an interruption (Ctrl+C).

    Raises:
        ValueError: An argument breaks its rule, or ``out`` holds results of other settings; or see
            `rlr_fast.prediction.image_files.check_results_folder`.
        BlockingIOError: Another process works in ``out``.
        OSError: A folder cannot be read, or the results cannot be written.
    """
    check_placed(model, execution)
    check_precision(execution.precision, model.device)
    tiles = optional_tiles(tile, overlap, model.config.tiles)
    settings = prediction_settings(model, execution, tiles, decider, scale, relative, masks)
    maker = RowMaker(model, out, execution, tiles, decider, scale, relative, masks)
    tally = Tally(decider)
    check_watched(folders, settle)
    check_results_folder(out, folders)

    with lock_folder(out):
        rows = []
        check_no_parts(out)
        if check_settings(out, settings, resume=(out / SETTINGS_FILE).exists()):
            rows = [(row["path"], end) for row, end in read_rows(out / LINES_FILE)]
        done, kept = [path for path, _ in rows], rows[-1][1] if rows else 0
        # Files of several folders, now or earlier, may have one name.
        own = len(folders) > 1 or not all(_lies_in(path, folders[0]) for path in done)
        arrivals = Arrivals(folders, out, done, settle)
        with ResultsWriter(out, tally.add, kept) as table:
            write_settings(out, settings, [*folders, *map(Path, done)])

            def write(row: Row) -> None:
                table.write(row)
                table.flush()
                if told is not None:
                    told(row)

            def files(paths: Sequence[Path]) -> Iterator[ImageFile]:
                for path in paths:
                    usual = None if own else picture_name(picture_place(path, folders[0]))
                    file = ImageFile(path, usual or own_picture_name(path), category)
                    try:
                        known = find_class(path, classes) if category is None else category
                    except ValueError as error:
                        write(left_out_row(file, str(error)))
                        continue
                    yield replace(file, category=known)

            with contextlib.suppress(KeyboardInterrupt):
                while not stop():
                    ready = arrivals.poll()
                    maker.run(files(ready), write, table.flush)
                    if not ready:
                        table.flush()  # which sees whether there is a table still
                        time.sleep(_PAUSE)
    return tally.prediction(out / RESULTS_FILE)


def _lies_in(path: str, folder: Path) -> bool:
    return Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder))
