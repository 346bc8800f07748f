"""``rlr-fast eval``."""

from __future__ import annotations

import argparse
from typing import Any

from rlr_fast.cli.common import (
    add_checkpoint,
    add_dataset,
    add_inference,
    add_machine,
    add_verb,
    execution_from,
    given_scale,
    load_model,
    read_data,
    report_failures,
)
from rlr_fast.cli.options import positive
from rlr_fast.config import InferenceExecution
from rlr_fast.data.files import write_atomically
from rlr_fast.inference.evaluate import FigureOptions, evaluate
from rlr_fast.training.distributed import processes
from rlr_fast.training.progress import progress_bar


def add_eval(verbs: Any) -> None:
    """Add the verb ``eval``."""
    parser = add_verb(
        verbs,
        "eval",
        _eval,
        "measure a checkpoint on the test images: seven metrics a class and mean",
        shared=True,
    )
    add_dataset(parser)
    add_checkpoint(parser)
    parser.add_argument("--figures", action="store_true", help="write a sheet of samples a class")
    parser.add_argument(
        "--per-defect",
        type=positive,
        default=1,
        metavar="N",
        help="samples of each defect in a sheet",
    )
    add_inference(parser)
    add_machine(parser)


def _eval(args: argparse.Namespace) -> int:
    with processes() as group:
        with group.together():
            data = read_data(args)
            data.require_test()
            figures = None
            if args.figures:
                figures = FigureOptions(args.out / "figures", given_scale(args), args.per_defect)
            model = load_model(args)
            if group.is_main:
                args.out.mkdir(parents=True, exist_ok=True)
        total = sum(len(samples) for samples in data.test.values())
        with progress_bar("eval", total, args.quiet or not group.is_main) as bar:
            result = evaluate(
                model,
                data,
                execution_from(args, InferenceExecution),
                figures=figures,
                progress=bar.update,
            )
        if not group.is_main:
            return 0
    print(result.table(), flush=True)
    write_atomically(args.out / "metrics.json", result.to_json())
    print(f"\n{args.out / 'metrics.json'}")
    return report_failures(result.failures)
