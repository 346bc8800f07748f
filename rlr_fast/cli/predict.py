"""``rlr-fast predict``."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from rlr_fast.cli import flags
from rlr_fast.config import InferenceExecution

if TYPE_CHECKING:
    from rlr_fast.inference.decisions import Decider
    from rlr_fast.prediction.predict import Prediction

_log = logging.getLogger(__name__)

# Exit code of --fail-on-anomaly, whatever else there is to tell.
_ANOMALY = 3
# How images of unknown class are decided.
_POOLED = (
    "decided by all classes pooled, their scores as they are, so alpha holds over their mix alone; "
    "--class names a class"
)
_PATHS_TOLD = 3  # at the top of a report


def predict(
    paths: Annotated[tuple[Path, ...], Parameter(name="IMAGES", required=True)],
    /,
    *,
    checkpoint: flags.Checkpoint,
    out: flags.Out,
    alpha: flags.Alpha | None = None,
    category: flags.Class | None = None,
    pool: flags.Pool = False,
    fail_on_anomaly: Annotated[flags.Switch, Parameter(negative=())] = False,
    masks: Annotated[flags.Switch, Parameter(negative=())] = False,
    no_pictures: Annotated[flags.Switch, Parameter(negative=())] = False,
    report: flags.Report = False,
    resume: Annotated[flags.Switch, Parameter(negative=())] = False,
    watch: Annotated[flags.Switch, Parameter(negative=())] = False,
    settle: Annotated[float | None, Parameter(show_default="1.0")] = None,
    tile: flags.Sides | None = None,
    overlap: flags.Sides | None = None,
    scale: flags.Scale | None = None,
    config: flags.Config | None = None,
    backbone_weights: flags.BackboneWeights | None = None,
    quiet: flags.Quiet = False,
    execution: flags.InferenceExecution = flags.NONE_GIVEN,
) -> int:
    """Score images and decide them: a table, and a heat map of each image.

    Args:
        paths: Images, or folders of images.
        fail_on_anomaly: Exit with code 3 if an image is called anomalous.
        masks: Write what lies above the pixel threshold of each image as PNG.
        no_pictures: Write no heat maps.
        resume: Go on behind the last image of a stopped prediction with the same settings.
        watch: Score images as they arrive in the folders, until Ctrl+C; images that have a row in
            the table already are left out.
        settle: With --watch, seconds for which a file must not have changed.
        tile: Score pictures at their own resolution, in tiles: a side in pixels, or 512x1024; by
            default as the model was trained.
        overlap: Pixels that neighboring tiles share at least; by default an eighth of the tile.
    """
    from rlr_fast.cli.common import (
        check_class,
        check_out,
        given_decider,
        given_scale,
        tell_earlier,
    )
    from rlr_fast.config import optional_tiles
    from rlr_fast.data.check import counted
    from rlr_fast.inference.report import model_facts
    from rlr_fast.models.checkpoint import CONFIG_FILE, fetch_checkpoint, load_config
    from rlr_fast.pictures.batches import load_model
    from rlr_fast.prediction.arrivals import check_watched
    from rlr_fast.prediction.image_files import check_results_folder, find_images
    from rlr_fast.prediction.predict import check_report_run, predict
    from rlr_fast.prediction.watch import watch as watch_folders
    from rlr_fast.training.calibration import scoring_identity, trained_classes
    from rlr_fast.training.distributed import processes
    from rlr_fast.training.progress import progress_bar
    from rlr_fast.training.run_dir import tell_unfinished
    from rlr_fast.visualization.report import REPORT_FILE, ReportWriter, check_report

    with processes() as group:
        with group.together():
            how = InferenceExecution(**execution)
            if report:
                check_report_run(resume, group.world_size)
            if watch:
                settle = 1.0 if settle is None else settle
                if report or resume or group.world_size > 1:
                    raise ValueError(
                        "--watch works in one process, always goes on with what --out holds, and "
                        "makes no report: not with torchrun, --resume or --report"
                    )
                check_watched(paths, settle)
                check_results_folder(out, paths)
            elif settle is not None:
                raise ValueError("--settle is of --watch, which is not given")
            files = None if watch else find_images(paths, out)
            folder = fetch_checkpoint(checkpoint)
            # Refuses what is no run before its parts are missed.
            tiles = optional_tiles(tile, overlap, load_config(folder / CONFIG_FILE).tiles)
            tell_unfinished(folder)
            drawn = report or not no_pictures
            if scale is not None and not drawn:
                raise ValueError("--scale is of the pictures: not with --no-pictures alone")
            colors = given_scale(scale, folder) if drawn else None
            check_out(out)
            if report:
                check_report(out)
            known = trained_classes(folder)
            if category is not None:
                check_class(category, known, checkpoint)
            elif len(known) == 1:
                [category] = known
            if files is not None:
                files = files.classified(known) if category is None else files.of_class(category)
            categories = set(known) if category is None else {category}
            model = load_model(folder, how, backbone_weights)
            if group.is_main and not (resume or watch):
                tell_earlier(out, {REPORT_FILE: report})
            decider = given_decider(
                folder,
                scoring_identity(model, how.precision, tiles),
                (categories or {None}) if files is None else files.categories,
                alpha=alpha,
                pool=pool,
                needed=fail_on_anomaly or masks,
            )
        pictures = None if no_pictures else colors
        options: dict[str, Any] = {
            "tile": tile,
            "overlap": overlap,
            "decider": decider,
            "masks": masks,
            "relative": scale is None,
        }
        if decider is not None and files is None and category is None and len(known) > 1:
            _log.warning("images that arrive in no folder of a class of the run: %s", _POOLED)
        if files is None:
            options |= {"classes": known, "category": category, "settle": settle}
            options["told"] = None if quiet else _tell
            result = watch_folders(model, paths, out, pictures, how, **options)
            return _end(result, decider, fail_on_anomaly)
        unknown = files.count(None)
        if decider is not None and unknown and group.is_main:
            _log.warning(
                "%s in no folder of a class of the run: %s", counted(unknown, "image"), _POOLED
            )
        with contextlib.ExitStack() as stack:
            if report and colors is not None:
                facts = model_facts(model, checkpoint, _told(paths), how.precision, tiles)
                rate = None if decider is None else decider.alpha
                options["report"] = partial(
                    ReportWriter, out, "prediction", colors, facts, alpha=rate
                )
            shown = progress_bar("predict", len(files), quiet or not group.is_main)
            options["resume"] = resume
            options["progress"] = stack.enter_context(shown).update
            result = predict(model, files, out, pictures, how, **options)
    return _end(result, decider, fail_on_anomaly, report) if group.is_main else 0


def _told(paths: Sequence[Path]) -> str:
    """Return the first of the paths in words."""
    told = ", ".join(map(str, paths[:_PATHS_TOLD]))
    return told + (f" and {len(paths) - _PATHS_TOLD} more" if len(paths) > _PATHS_TOLD else "")


def _tell(row: Mapping[str, Any]) -> None:
    """Tell what became of a file that was watched for."""
    if row["failure"] is None:
        path = row["path"] if row["path"].isprintable() else repr(row["path"])  # in one line
        print(f"{row['decision'] or 'scored'} {row['score']:.4g} {path}", flush=True)
    else:
        print(f"left out: {row['failure']}", flush=True)


def _end(
    result: Prediction, decider: Decider | None, fail_on_anomaly: bool, report: bool = False
) -> int:
    """Tell what was done; return the exit code."""
    from rlr_fast.cli.common import report_failures
    from rlr_fast.prediction.predict import DRIFTED
    from rlr_fast.visualization.report import REPORT_FILE

    found = ""
    if decider is not None and result.decided:
        found = f", {result.anomalous} of {result.decided} anomalous at alpha {decider.alpha:g}"
    total = result.scored + len(result.failures)
    print(f"{result.scored} of {total} images scored{found}: {result.results}")
    if report:
        print(result.results.with_name(REPORT_FILE))
    if result.drift:
        print(
            f"rlr-fast: {DRIFTED}: {', '.join(result.drift)}",
            file=sys.stderr,
        )
    code = report_failures(result.failures)
    return _ANOMALY if fail_on_anomaly and result.anomalous else code
