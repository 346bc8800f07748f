"""``rlr-fast tune``."""

from __future__ import annotations

import argparse
from typing import Any

from rlr_fast.cli.common import add_machine, add_verb
from rlr_fast.config import PRECISIONS, PRESETS, RLRConfig
from rlr_fast.environment import choose_device
from rlr_fast.functional import unsupported_reason
from rlr_fast.options import UsageError, add_fields, config_from, positive
from rlr_fast.progress import progress_bar
from rlr_fast.tune import tune


def add_tune(verbs: Any) -> None:
    """Add the verb ``tune``."""
    parser = add_verb(
        verbs,
        "tune",
        _tune,
        "search for the fastest tiles of the Triton kernels on this GPU, and keep them",
    )
    parser.add_argument(
        "--preset", default="paper", choices=tuple(PRESETS), help="the configuration"
    )
    parser.add_argument("--batch-size", type=positive, default=64, metavar="N", help="images")
    parser.add_argument("--precision", default="bf16", choices=tuple(PRECISIONS), help="of a run")
    add_fields(parser, RLRConfig)
    add_machine(parser)


def _tune(args: argparse.Namespace) -> int:
    config = config_from(args, RLRConfig, PRESETS[args.preset].model)
    device = choose_device(args.device)
    reason = unsupported_reason("triton", device)
    if reason is not None:
        raise UsageError(f"tuning cannot run on {device}: {reason}")
    with progress_bar("tiles", None, args.quiet) as bar:
        for line in tune(config, args.batch_size, args.precision, device, bar.update):
            print(line, flush=True)
    return 0
