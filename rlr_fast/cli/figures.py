"""``rlr-fast figures``."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlr_fast.cli.common import (
    add_backbone_weights,
    add_dataset,
    add_machine,
    add_verb,
    check_out,
    read_data,
    read_model,
    report_failures,
)
from rlr_fast.cli.options import UsageError, positive
from rlr_fast.data.words import counted
from rlr_fast.training.calibration import color_scale
from rlr_fast.training.progress import progress_bar
from rlr_fast.visualization.decoder import load_decoder
from rlr_fast.visualization.reconstructions import Run, check_runs, reconstruction_sheets


def add_figures(verbs: Any) -> None:
    """Add the verb ``figures``."""
    parser = add_verb(
        verbs,
        "figures",
        _figures,
        "make reconstructed features visible: a sheet a class, of one run or of two side by side",
    )
    add_dataset(parser)
    parser.add_argument(
        "--checkpoint",
        nargs="+",
        metavar="RUN",
        help="folder of a run; two stand side by side (needed)",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the sheets (needed)")
    parser.set_defaults(
        needs=("checkpoint", "out"), less_memory="a smaller --per-defect needs less"
    )
    add_backbone_weights(parser)
    parser.add_argument(
        "--decoder", type=Path, metavar="FILE", help="also paint the features, by `decoder train`"
    )
    parser.add_argument(
        "--level",
        type=int,
        metavar="INDEX",
        help="level of out_indices whose features are shown (default: the first)",
    )
    parser.add_argument(
        "--per-defect", type=positive, default=1, metavar="N", help="samples of each defect"
    )
    add_machine(parser)


def _figures(args: argparse.Namespace) -> int:
    if len(args.checkpoint) > 2:
        raise UsageError(f"--checkpoint takes one or two runs, got {len(args.checkpoint)}")
    names = _names(args.checkpoint)
    data = read_data(args)
    data.require_test()
    check_out(args.out)
    runs = [
        Run(name, read_model(args, checkpoint), color_scale(Path(checkpoint)))
        for name, checkpoint in zip(names, args.checkpoint, strict=True)
    ]
    check_runs(runs, args.level)
    decoder = None if args.decoder is None else load_decoder(args.decoder, runs[0].model)
    with progress_bar("figures", None, args.quiet) as bar:
        sheets, failures = reconstruction_sheets(
            runs,
            data,
            args.out,
            decoder=decoder,
            level=args.level,
            per_defect=args.per_defect,
            workers=args.workers,
            progress=bar.update,
        )
    print(f"{counted(len(sheets), 'sheet')}: {args.out}")
    return report_failures(failures)


def _names(checkpoints: Sequence[str]) -> list[str]:
    """Return the last parts of the paths, as few as tell them apart."""
    parts = [Path(os.path.abspath(checkpoint)).parts for checkpoint in checkpoints]
    for count in range(1, max(map(len, parts)) + 1):
        names = [os.path.join(*some[-count:]) for some in parts]
        if len(set(names)) == len(names):
            return names
    raise UsageError(f"--checkpoint names the same run twice: {' '.join(checkpoints)}")
