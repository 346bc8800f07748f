"""``rlr-fast predict``."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from rlr_fast.cli import flags
from rlr_fast.config import InferenceExecution

_log = logging.getLogger(__name__)

# Exit code of --fail-on-anomaly, whatever else there is to tell.
_ANOMALY = 3
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
        tile: Score pictures at their own resolution, in tiles: a side in pixels, or 512x1024.
        overlap: Pixels that neighboring tiles share at least; by default an eighth of the tile.
    """
    from rlr_fast.cli.common import (
        check_class,
        check_out,
        given_decider,
        given_scale,
        report_failures,
    )
    from rlr_fast.data.check import counted
    from rlr_fast.inference.batches import load_model
    from rlr_fast.inference.predict import classify_files, find_images, predict
    from rlr_fast.inference.report import model_facts
    from rlr_fast.inference.tiling import optional_tiles
    from rlr_fast.training.calibration import scoring_identity, trained_classes
    from rlr_fast.training.progress import progress_bar
    from rlr_fast.visualization.report import REPORT_FILE, ReportWriter, check_report

    how = InferenceExecution(**execution)
    tiles = optional_tiles(tile, overlap)
    files = find_images(paths, out)
    colors = None if no_pictures and not report else given_scale(scale, checkpoint)
    check_out(out)
    if report:
        check_report(out)
    known = trained_classes(Path(checkpoint))
    if category is not None:
        check_class(category, known, checkpoint)
    elif len(known) == 1:
        [category] = known
    if category is None:
        files = classify_files(files, known)
    else:
        files = [dataclasses.replace(file, category=category) for file in files]
    model = load_model(checkpoint, how, backbone_weights)
    decider = given_decider(
        checkpoint,
        scoring_identity(model, how.precision, *(tiles or (None, None))),
        {file.category for file in files},
        alpha=alpha,
        pool=pool,
        needed=fail_on_anomaly or masks,
    )
    unknown = sum(file.category is None for file in files)
    if decider is not None and unknown and not pool:
        _log.warning(
            "%s in no folder of a class of the run: decided by all classes pooled, so alpha holds "
            "over their mix alone; --class names a class",
            counted(unknown, "image"),
        )
    with contextlib.ExitStack() as stack:
        page = None
        if report and colors is not None:
            told = ", ".join(map(str, paths[:_PATHS_TOLD]))
            if len(paths) > _PATHS_TOLD:
                told += f" and {len(paths) - _PATHS_TOLD} more"
            facts = model_facts(model, checkpoint, told, how.precision)
            if tiles is not None:
                facts["Tiles"] = "{} × {} pixels, {} × {} shared".format(*tiles[0], *tiles[1])
            out.mkdir(parents=True, exist_ok=True)
            page = stack.enter_context(ReportWriter(out, "prediction", colors, facts))
            page.alpha = None if decider is None else decider.alpha
        bar = stack.enter_context(progress_bar("predict", len(files), quiet))
        result = predict(
            model,
            files,
            out,
            None if no_pictures else colors,
            how,
            tile=tile,
            overlap=overlap,
            decider=decider,
            masks=masks,
            relative=scale is None,
            report=page,
            progress=bar.update,
        )
    found = ""
    if decider is not None and result.decided:
        found = f", {result.anomalous} of {result.decided} anomalous at alpha {decider.alpha:g}"
    print(f"{len(result.scores)} of {len(files)} images scored{found}: {result.results}")
    if report:
        print(out / REPORT_FILE)
    if result.drift:
        print(
            "rlr-fast: not like the images of the calibration, or full of defects: "
            f"{', '.join(result.drift)}",
            file=sys.stderr,
        )
    code = report_failures(result.failures)
    return _ANOMALY if fail_on_anomaly and result.anomalous else code
