"""``rlr-fast demo``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rlr_fast.cli.common import add_machine, add_verb, chosen_device
from rlr_fast.demo import run_demo


def add_demo(verbs: Any) -> None:
    """Add the verb ``demo``."""
    parser = add_verb(
        verbs,
        "demo",
        _demo,
        "make a synthetic data set, train a small model on it, evaluate it and write pictures: "
        "minutes on a CPU",
    )
    parser.add_argument("--out", type=Path, default=Path("rlr-fast-demo"), help="folder of results")
    parser.add_argument("--seed", type=int, default=0, help="seed of data and training")
    add_machine(parser)


def _demo(args: argparse.Namespace) -> int:
    result = run_demo(
        args.out,
        seed=args.seed,
        device=chosen_device(args),
        backend=args.backend,
        workers=args.workers,
        quiet=args.quiet,
    )
    print(result)
    return 0
