"""``rlr-fast train``."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from rlr_fast.cli.common import (
    add_dataset,
    add_machine,
    add_verb,
    chosen_device,
    read_data,
    report_failures,
)
from rlr_fast.config import PRESETS, RLRConfig, TrainConfig
from rlr_fast.distributed import processes
from rlr_fast.options import add_fields, config_from, positive
from rlr_fast.run_folder import read_run
from rlr_fast.train import CACHES, train

_log = logging.getLogger(__name__)


def add_train(verbs: Any) -> None:
    """Add the verb ``train``."""
    parser = add_verb(
        verbs,
        "train",
        _train,
        "train one model on the normal images of all classes",
        shared=True,
        epilog="presets: " + "; ".join(f"{name}: {p.about}" for name, p in PRESETS.items()),
    )
    add_dataset(parser)
    parser.add_argument("--out", type=Path, metavar="RUN", help="folder of the run (needed)")
    parser.set_defaults(
        needs=("out",),
        less_memory="--grad-checkpointing or a smaller --image-size needs less",
        interrupted="; --resume goes on from the last written epoch",
    )
    parser.add_argument("--preset", choices=tuple(PRESETS), help="where the settings start (paper)")
    parser.add_argument("--resume", action="store_true", help="go on from the run's last epoch")
    parser.add_argument(
        "--cache-dir", type=Path, metavar="DIR", help="folder of feature caches (~/.cache/rlr_fast)"
    )
    parser.add_argument(
        "--cache",
        default="auto",
        choices=CACHES,
        help="where cached features lie while training; none makes them again in every epoch",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the reconstructors (CUDA graphs on a GPU): a minute at first, faster then",
    )
    parser.add_argument(
        "--grad-checkpointing",
        action="store_true",
        help="compute blocks again in backward: less memory, a third more time, the same result",
    )
    parser.add_argument(
        "--piece",
        type=positive,
        metavar="N",
        help="images of a step in memory at once: less memory, the same result to rounding",
    )
    add_fields(parser, RLRConfig)
    add_fields(parser, TrainConfig)
    add_machine(parser)


def _train(args: argparse.Namespace) -> int:
    with processes() as group:
        previous = group.from_leader(lambda: read_run(args.out) if args.resume else None)
        with group.together():
            # A preset that is given counts, so that one that is not the run's is refused.
            preset = PRESETS[args.preset or "paper"]
            kept = None if args.preset else previous
            model = config_from(args, RLRConfig, kept["model"] if kept else preset.model)
            recipe = config_from(args, TrainConfig, kept["recipe"] if kept else preset.train)
            if args.resume and previous is None and group.leads:
                _log.warning("there is no run in %s to resume; a new one begins", args.out)
            data = read_data(args)
            device = chosen_device(args)
        result = train(
            model,
            recipe,
            data,
            args.out,
            device=device,
            resume=args.resume,
            backend=args.backend,
            cache_root=args.cache_dir,
            cache=args.cache,
            compiled=args.compile,
            grad_checkpointing=args.grad_checkpointing,
            piece=args.piece,
            workers=args.workers,
            quiet=args.quiet,
        )
        if not group.leads:
            return 0
    figures = ""
    if result.history:
        loss = result.history[-1]["loss"]
        figures = f", loss {loss:.4f}, {result.images_per_s:.0f} images/s"
    print(f"trained {recipe.epochs} epochs{figures}: {result.out}")
    return report_failures([str(f.error) for f in result.failures])
