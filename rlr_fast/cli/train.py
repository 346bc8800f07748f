"""``rlr-fast train``."""

from __future__ import annotations

import argparse
import logging
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
from rlr_fast.cli.options import config_from
from rlr_fast.config import PRESETS, RLRConfig, TrainConfig, TrainExecution
from rlr_fast.data.words import counted
from rlr_fast.training.distributed import processes
from rlr_fast.training.run_dir import read_run
from rlr_fast.training.train import train

_log = logging.getLogger(__name__)


def add_train(verbs: Any) -> None:
    """Add the verb ``train``."""
    parser = add_verb(
        verbs,
        "train",
        _train,
        "train one model on the normal images of all classes",
        shared=True,
        epilog=ABOUT_PRESETS,
    )
    add_dataset(parser)
    parser.add_argument("--out", type=Path, metavar="RUN", help="folder of the run (needed)")
    parser.set_defaults(
        needs=("out",),
        less_memory="--grad-checkpointing or a smaller --image-size needs less",
        interrupted="; --resume goes on from the last written epoch",
    )
    parser.add_argument("--resume", action="store_true", help="go on from the run's last epoch")
    add_training(parser)
    add_machine(parser)


def _train(args: argparse.Namespace) -> int:
    with processes() as group:
        previous = group.broadcast(lambda: read_run(args.out) if args.resume else None)
        with group.together():
            # A preset that is given counts, so that one that is not the run's is refused.
            preset = PRESETS[args.preset or "paper"]
            kept = None if args.preset else previous
            model = config_from(args, RLRConfig, kept["model"] if kept else preset.model)
            recipe = config_from(args, TrainConfig, kept["recipe"] if kept else preset.train)
            if args.resume and previous is None and group.is_main:
                _log.warning("there is no run in %s to resume; a new one begins", args.out)
            data = read_data(args)
            execution = execution_from(args, TrainExecution)
        result = train(
            model,
            recipe,
            data,
            args.out,
            execution,
            resume=args.resume,
            quiet=args.quiet,
        )
        if not group.is_main:
            return 0
    figures = ""
    if result.history:
        loss = result.history[-1]["loss"]
        figures = f", loss {loss:.4f}, {result.images_per_s:.0f} images/s"
    print(f"trained {counted(recipe.epochs, 'epoch')}{figures}: {result.out}")
    return report_failures([str(f.error) for f in result.failures])
