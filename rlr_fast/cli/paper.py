"""``rlr-fast paper``: the paper's tables, run."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from rlr_fast.cli.common import (
    ABOUT_PRESETS,
    add_dataset,
    add_machine,
    add_training,
    add_verb,
    execution_from,
    read_data,
    report_failures,
)
from rlr_fast.cli.options import config_from, positive
from rlr_fast.config import PRESETS, RLRConfig, TrainConfig, TrainExecution
from rlr_fast.paper import TABLES, run_table


def add_paper(verbs: Any) -> None:
    """Add the verb ``paper``."""
    about = "; ".join(f"{t.name}: {t.title} ({t.data})" for t in TABLES.values())
    parser = add_verb(
        verbs,
        "paper",
        _paper,
        "train and measure all rows of a table of the paper, beside its figures; the same command "
        "goes on where it was stopped",
        epilog=f"tables: {about}. {ABOUT_PRESETS}",
    )
    parser.add_argument("table", choices=tuple(TABLES), metavar="TABLE", help=", ".join(TABLES))
    add_dataset(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the table (needed)")
    parser.set_defaults(
        needs=("out",),
        less_memory="--grad-checkpointing or a smaller --image-size needs less",
        interrupted="; the same command goes on from the last written epoch",
    )
    parser.add_argument(
        "--seeds", type=positive, default=3, metavar="N", help="runs of each row: --seed and on"
    )
    parser.add_argument("--only", nargs="+", metavar="ROW", help="only these rows")
    add_training(parser)
    add_machine(parser)


def _paper(args: argparse.Namespace) -> int:
    preset = PRESETS[args.preset or "paper"]
    result = run_table(
        TABLES[args.table],
        config_from(args, RLRConfig, preset.model),
        config_from(args, TrainConfig, preset.train),
        read_data(args),
        args.out,
        execution_from(args, TrainExecution),
        seeds=args.seeds,
        only=args.only,
        quiet=args.quiet,
        tell=lambda line: print(line, flush=True),
    )
    print(result.text)
    code = report_failures(result.left_out)
    if result.failed:
        print(
            f"rlr-fast: failed: {'; '.join(result.failed)}. The same command tries again",
            file=sys.stderr,
        )
        code = 1
    return code
