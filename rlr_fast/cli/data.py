"""``rlr-fast data``: check a data set, or make one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from rlr_fast.cli import flags


def check(
    data: flags.Data,
    /,
    *,
    config: flags.Config | None = None,
    layout: flags.Layout = "auto",
    classes: flags.Classes = None,
    image_size: flags.Pixels | None = None,
    workers: flags.Positive | None = None,
) -> int:
    """Decode every file of a data set; say what would stop a run or spoil its numbers.

    Args:
        image_size: Also tell defects that vanish at this size: a side, or height and width.
        workers: Threads that decode images; by default one for each processor.
    """
    from rlr_fast.data import check_dataset, format_report

    size = None if image_size is None else flags.pair("--image-size", image_size)
    report = check_dataset(data, layout, classes, size, workers)
    print(format_report(report))
    return 0 if report.ok else 1


def make(
    out: Path,
    /,
    *,
    config: flags.Config | None = None,
    size: Annotated[flags.Pixels, Parameter(show_default="256")] = (256,),
    seed: flags.Whole = 0,
    classes: flags.Classes = None,
    train: flags.Positive = 48,
    quiet: flags.Quiet = False,
) -> int:
    """Make the synthetic inspection set, in the layout of MVTec-AD.

    Args:
        out: Folder to write.
        size: Side in pixels, or height and width.
        seed: The same seed gives the same files to the bit.
        train: Training images per class.
    """
    from rlr_fast.data.synthetic import make_dataset
    from rlr_fast.training.progress import follow, progress_bar

    with progress_bar("images", None, quiet) as bar:
        make_dataset(
            out,
            size=flags.pair("--size", size),
            seed=seed,
            train_per_class=train,
            classes=classes,
            progress=follow(bar),
        )
    print(out)
    return 0
