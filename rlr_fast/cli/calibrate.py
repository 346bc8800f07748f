"""``rlr-fast calibrate``."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from rlr_fast.cli import flags
from rlr_fast.config import InferenceExecution

_log = logging.getLogger(__name__)


def calibrate(
    data: Annotated[Path, Parameter(help="Data set, or folder of normal images.")],
    /,
    *,
    checkpoint: Annotated[
        str, Parameter(help="Folder of a run, into which the calibration is written.")
    ],
    split: Literal["train", "test"] | None = None,
    category: flags.Class | None = None,
    tile: flags.Sides | None = None,
    overlap: flags.Sides | None = None,
    config: flags.Config | None = None,
    layout: flags.Layout = "auto",
    classes: flags.Classes = None,
    backbone_weights: flags.BackboneWeights | None = None,
    quiet: flags.Quiet = False,
    execution: flags.InferenceExecution = flags.NONE_GIVEN,
) -> int:
    """Score normal images that the model has not seen, for predict and eval to decide by.

    Args:
        split: Take the normal images to train on, or to test on; by default those of validation,
            those that training kept out, or all of a plain folder.
        tile: As predict will be told to; by default as the model was trained.
        overlap: As predict will be told to.
    """
    from rlr_fast.cli.common import check_class, refuse_unfinished, report_failures
    from rlr_fast.config import optional_tiles
    from rlr_fast.data import UnscoredImageError, read_dataset
    from rlr_fast.data.layouts import find_class
    from rlr_fast.files import lock_folder
    from rlr_fast.inference.calibrate import (
        calibrate,
        calibration_images,
        check_not_trained_on,
        is_trained_on,
        without_copies,
    )
    from rlr_fast.inference.conformal import smallest_alpha
    from rlr_fast.models.checkpoint import CONFIG_FILE, check_checkpoint, load_config
    from rlr_fast.pictures.batches import load_model
    from rlr_fast.training.calibration import (
        CALIBRATION_FILE,
        read_calibration,
        trained_classes,
    )
    from rlr_fast.training.progress import progress_bar
    from rlr_fast.training.run_dir import read_run

    how = InferenceExecution(**execution)
    check_checkpoint(checkpoint)
    run = Path(checkpoint)
    if not run.is_dir():
        raise ValueError(f"calibrate writes into the run: there is no folder {checkpoint!r}")
    tiles = optional_tiles(tile, overlap, load_config(run / CONFIG_FILE).tiles)
    refuse_unfinished(run)
    known = trained_classes(run)
    found, record = read_dataset(data, layout), read_run(run)
    if classes is not None:
        read_dataset(data, layout, classes)  # names those that it does not have
    chosen = {
        name: [sample.path for sample in samples]
        for name, samples in calibration_images(found, record, split).items()
        if classes is None or name in classes
    }
    copies: list[Path] = []
    kept_out = split is None and is_trained_on(found, record)
    if kept_out:  # which the user did not choose
        chosen, copies = without_copies(chosen, run)
        if copies and not chosen:
            raise ValueError(f"the run was trained on copies of all images kept out of {data}")
    missing = [name for name in classes or () if name not in chosen]
    if missing:
        raise ValueError(f"there are no images to calibrate on of {', '.join(missing)} in {data}")
    if len(chosen) == 1:
        [(name, paths)] = chosen.items()
        if category is None and name not in known:  # the folder of one split or kind, perhaps
            name = find_class(paths[0].absolute(), known) or name
        chosen = {category or name: paths}
    elif category is not None:
        raise ValueError(f"--class is for images of one class, there are {len(chosen)}")
    for name in chosen:
        check_class(name, known, run)
    if not kept_out:
        check_not_trained_on(chosen, run)
    model = load_model(checkpoint, how, backbone_weights)
    with (
        lock_folder(run),
        progress_bar("calibrate", sum(map(len, chosen.values())), quiet) as bar,
    ):
        previous = read_calibration(run)
        calibration, failures = calibrate(
            model, chosen, run, previous, how, source=str(data), tiles=tiles, progress=bar.update
        )
    lost = [] if previous is None else sorted(previous.classes.keys() - calibration.classes.keys())
    if lost:
        _log.warning(
            "the scores of %s are dropped: they were made with other weights, tiles, precision or "
            "score settings than these; calibrate them again",
            ", ".join(lost),
        )
    counts = {name: len(scores.image) for name, scores in calibration.classes.items()}
    width = max(map(len, counts))
    print(f"{'class':<{width}}  images  smallest alpha")
    for name, count in counts.items():
        print(f"{name:<{width}}  {count:6d}  {smallest_alpha(count):.4f}")
    total = sum(counts.values())
    print(f"\nall pooled: {total} images, smallest alpha {smallest_alpha(total):.4f}")
    print(run / CALIBRATION_FILE)
    told = [str(UnscoredImageError(p, "the run was trained on a copy of it")) for p in copies]
    return report_failures([*told, *failures])
