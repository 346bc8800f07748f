"""``rlr-fast figures``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from rlr_fast.cli import flags
from rlr_fast.config import InferenceExecution


def figures(
    data: flags.Data,
    /,
    *,
    checkpoint: tuple[str, ...],
    out: flags.Out,
    decoder: Path | None = None,
    level: flags.Level | None = None,
    per_defect: flags.Positive = 1,
    config: flags.Config | None = None,
    layout: flags.Layout = "auto",
    classes: flags.Classes = None,
    backbone_weights: flags.BackboneWeights | None = None,
    quiet: flags.Quiet = False,
    execution: flags.Execution = flags.NONE_GIVEN,
) -> int:
    """Make reconstructed features visible: a sheet per class.

    Args:
        checkpoint: Folder of a run, or OWNER/NAME on the hub; two runs stand side by side.
        decoder: File written by decoder train: also paint the features as pictures.
        level: Level of out_indices whose features are shown; by default the first.
        per_defect: Samples of each defect in a sheet.
    """
    from rlr_fast.cli.common import check_out, report_failures
    from rlr_fast.data import read_dataset
    from rlr_fast.data.check import counted
    from rlr_fast.pictures.batches import load_model
    from rlr_fast.training.calibration import color_scale
    from rlr_fast.training.progress import progress_bar
    from rlr_fast.visualization.decoder import load_decoder
    from rlr_fast.visualization.reconstructions import Run, check_runs, reconstruction_sheets

    how = InferenceExecution(**execution)
    if len(checkpoint) > 2:
        raise ValueError(f"--checkpoint takes one or two runs, got {len(checkpoint)}")
    names = _names(checkpoint)
    images = read_dataset(data, layout, classes)
    images.require_test()
    check_out(out)
    runs = [
        Run(name, load_model(run, how, backbone_weights), color_scale(Path(run)))
        for name, run in zip(names, checkpoint, strict=True)
    ]
    check_runs(runs, level)
    painter = None if decoder is None else load_decoder(decoder, runs[0].model)
    with progress_bar("figures", None, quiet) as bar:
        sheets, failures = reconstruction_sheets(
            runs,
            images,
            out,
            decoder=painter,
            level=level,
            per_defect=per_defect,
            workers=how.workers,
            progress=bar.update,
        )
    print(f"{counted(len(sheets), 'sheet')}: {out}")
    return report_failures(failures)


def _names(checkpoints: Sequence[str]) -> list[str]:
    """Return the last parts of the paths, as few as tell them apart."""
    parts = [Path(os.path.abspath(checkpoint)).parts for checkpoint in checkpoints]
    for count in range(1, max(map(len, parts)) + 1):
        names = [os.path.join(*some[-count:]) for some in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"--checkpoint names the same run twice: {' '.join(checkpoints)}")
