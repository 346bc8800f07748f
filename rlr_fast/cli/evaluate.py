"""``rlr-fast eval``."""

from __future__ import annotations

import contextlib

from rlr_fast.cli import flags
from rlr_fast.config import InferenceExecution, optional_tiles


def evaluate(
    data: flags.Data,
    /,
    *,
    checkpoint: flags.Checkpoint,
    out: flags.Out,
    alpha: flags.Alpha | None = None,
    pool: flags.Pool = False,
    figures: flags.Switch = False,
    per_defect: flags.Positive = 1,
    report: flags.Report = False,
    tile: flags.Sides | None = None,
    overlap: flags.Sides | None = None,
    scale: flags.Scale | None = None,
    config: flags.Config | None = None,
    layout: flags.Layout = "auto",
    classes: flags.Classes = None,
    backbone_weights: flags.BackboneWeights | None = None,
    quiet: flags.Quiet = False,
    execution: flags.InferenceExecution = flags.NONE_GIVEN,
) -> int:
    """Measure a trained model on the test images: seven metrics per class, and their means.

    Args:
        figures: Write a sheet of samples per class.
        per_defect: Samples of each defect in a sheet.
        tile: Score pictures at their own resolution, in tiles: a side in pixels, or 512x1024; by
            default as the model was trained.
        overlap: Pixels that neighboring tiles share at least; by default an eighth of the tile.
    """
    from rlr_fast.cli.common import (
        check_out,
        given_decider,
        given_scale,
        report_failures,
        tell_earlier,
        tell_unmeasured,
    )
    from rlr_fast.data import read_dataset
    from rlr_fast.files import lock_folder, readable_digest, write_atomically
    from rlr_fast.inference.evaluate import METRICS_FILE, FigureOptions, evaluate
    from rlr_fast.inference.report import model_facts
    from rlr_fast.models.checkpoint import (
        CONFIG_FILE,
        WEIGHTS_FILE,
        fetch_checkpoint,
        load_config,
    )
    from rlr_fast.pictures.batches import load_model
    from rlr_fast.training.calibration import scoring_identity, trained_classes
    from rlr_fast.training.distributed import processes
    from rlr_fast.training.progress import progress_bar
    from rlr_fast.training.run_dir import tell_unfinished
    from rlr_fast.visualization.report import REPORT_FILE, ReportWriter, check_report

    with processes() as group, contextlib.ExitStack() as locks:
        with group.together():
            how = InferenceExecution(**execution)
            folder = fetch_checkpoint(checkpoint)
            tiles = optional_tiles(tile, overlap, load_config(folder / CONFIG_FILE).tiles)
            tell_unfinished(folder)
            images = read_dataset(data, layout, classes)
            images.require_test()
            tell_unmeasured(images, trained_classes(folder), folder)
            check_out(out, METRICS_FILE)
            if scale is not None and not (figures or report):
                raise ValueError("--scale is of --figures and --report, and neither is given")
            if per_defect != 1 and not figures:
                raise ValueError("--per-defect is of --figures, which is not given")
            sheets = colors = None
            if report:
                check_report(out)
            if figures or report:
                colors = given_scale(scale, folder)
            if figures and colors is not None:
                sheets = FigureOptions(out / "figures", colors, per_defect)
            weights = readable_digest(folder / WEIGHTS_FILE)
            model = load_model(folder, how, backbone_weights)
            decider = None
            if group.is_main:
                tell_earlier(out, {REPORT_FILE: report, "figures": figures})
                decider = given_decider(
                    folder,
                    scoring_identity(model, how.precision, tiles),
                    images.classes,
                    alpha=alpha,
                    pool=pool,
                    needed=False,
                )
                locks.enter_context(lock_folder(out))
        total = sum(len(samples) for samples in images.test.values())
        with contextlib.ExitStack() as stack:
            page = None
            if group.is_main and report and colors is not None:
                about = f"{images.root}, layout {images.layout}, test images"
                facts = model_facts(model, checkpoint, about, how.precision, tiles)
                rate = None if decider is None else decider.alpha
                page = stack.enter_context(
                    ReportWriter(out, "evaluation", colors, facts, alpha=rate)
                )
            bar = stack.enter_context(progress_bar("eval", total, quiet or not group.is_main))
            result = evaluate(
                model,
                images,
                how,
                tiles=tiles,
                figures=sheets,
                decider=decider,
                report=page,
                progress=bar.update,
            )
            if group.is_main:  # before the report is closed, which may meet a full disk
                bar.close()
                try:
                    write_atomically(out / METRICS_FILE, result.to_json(weights))
                finally:
                    print(result.table(), flush=True)
        if not group.is_main:
            return 0
    print(f"\n{out / METRICS_FILE}")
    if report:
        print(out / REPORT_FILE)
    return report_failures(result.failures)
