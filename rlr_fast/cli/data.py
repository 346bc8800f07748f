"""``rlr-fast data``: check a data set, or make one."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlr_fast.cli.common import add_dataset, add_verb
from rlr_fast.cli.options import Parser, UsageError, positive
from rlr_fast.data import check_dataset, format_report
from rlr_fast.data.synthetic import make_dataset
from rlr_fast.training.progress import follow, progress_bar


def add_data(verbs: Any) -> None:
    """Add the verb ``data``."""
    parser: Parser = verbs.add_parser("data", help="check a data set, or make a synthetic one")
    jobs = parser.add_subparsers(title="jobs", metavar="JOB", required=True)
    check = add_verb(
        jobs,
        "check",
        _data_check,
        "decode every file of a data set; say what would stop a run or spoil its numbers",
    )
    add_dataset(check)
    check.add_argument(
        "--image-size",
        type=int,
        nargs="+",
        metavar="PIXELS",
        help="also tell defects that vanish here",
    )
    check.add_argument("--workers", type=positive, metavar="N", help="threads that decode images")
    make = add_verb(
        jobs, "make", _data_make, "make the synthetic inspection set, in MVTec-AD's layout"
    )
    make.add_argument("out", type=Path, metavar="DIR", help="folder to write")
    make.add_argument(
        "--size", type=int, nargs="+", default=[256], help="pixels: side, or height width"
    )
    make.add_argument("--seed", type=int, default=0, help="same seed, same files to the bit")
    make.add_argument("--classes", nargs="+", metavar="CLASS", help="only these classes")
    make.add_argument("--train", type=positive, metavar="N", help="training images a class")
    make.add_argument("--quiet", action="store_true", help="no progress bar")


def _pair(values: Sequence[int], name: str) -> tuple[int, int]:
    if len(values) > 2:
        raise UsageError(f"{name} takes one side, or height and width, got {len(values)} values")
    return values[0], values[-1]


def _data_check(args: argparse.Namespace) -> int:
    size = None if args.image_size is None else _pair(args.image_size, "--image-size")
    report = check_dataset(args.data, args.layout, args.classes, size, args.workers)
    print(format_report(report))
    return 0 if report.ok else 1


def _data_make(args: argparse.Namespace) -> int:
    counts = {} if args.train is None else {"train_per_class": args.train}
    with progress_bar("images", None, args.quiet) as bar:
        make_dataset(
            args.out,
            size=_pair(args.size, "--size"),
            seed=args.seed,
            classes=args.classes,
            progress=follow(bar),
            **counts,
        )
    print(args.out)
    return 0
