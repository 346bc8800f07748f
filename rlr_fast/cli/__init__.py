"""The ``rlr-fast`` command: one verb per job.

May import everything; nothing but `__main__` imports it.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence

import torch

from rlr_fast import __version__
from rlr_fast.cli.data import add_data
from rlr_fast.cli.decoder import add_decoder
from rlr_fast.cli.demo import add_demo
from rlr_fast.cli.evaluate import add_eval
from rlr_fast.cli.figures import add_figures
from rlr_fast.cli.info import add_info
from rlr_fast.cli.options import Parser, UsageError, parse
from rlr_fast.cli.paper import add_paper
from rlr_fast.cli.predict import add_predict
from rlr_fast.cli.train import add_train
from rlr_fast.cli.tune import add_tune
from rlr_fast.functional import BackendError
from rlr_fast.models.backbone import BackboneWeightsError
from rlr_fast.models.checkpoint import CheckpointError
from rlr_fast.training.distributed import PeerError, processes_wanted
from rlr_fast.training.feature_cache import CacheError
from rlr_fast.training.run_dir import TrainingError

_USER_ERRORS = (
    UsageError,
    ValueError,
    BackboneWeightsError,
    BackendError,
    CheckpointError,
    CacheError,
    TrainingError,
    OSError,
)
# Where the errors of torch.compile are defined; not imported, for that takes seconds.
_COMPILER = ("torch._dynamo.", "torch._inductor.")
# torchrun ends all processes with the first that ends: let that be the one that says why.
_AFTER_PEER = 1.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        0: done. 1: done, but some files were left out, or a check failed. 2: a mistake of the
        user, or something that stopped the job; it is told in a line on standard error, by one of
        several processes. 130: interrupted.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    args = argparse.Namespace(interrupted="")
    try:
        args = _parse(argv)
        return int(args.run(args))
    except BrokenPipeError:  # an OSError, but nobody is left to read a message
        return 1
    except PeerError as error:
        time.sleep(_AFTER_PEER)
        if not error.told:
            print(f"rlr-fast: error: {error}", file=sys.stderr)
        return 2
    except _USER_ERRORS as error:
        if os.environ.get("RLR_FAST_TRACEBACK"):
            raise
        print(f"rlr-fast: error: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        print(
            f"rlr-fast: error: out of GPU memory ({str(error).splitlines()[0]}); "
            f"{args.less_memory}",
            file=sys.stderr,
        )
        return 2
    except RuntimeError as error:
        if not type(error).__module__.startswith(_COMPILER) or os.environ.get("RLR_FAST_TRACEBACK"):
            raise
        print(
            f"rlr-fast: error: --compile cannot compile here ({str(error).splitlines()[0]}); the "
            "same command without it does the same, to rounding",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        if _tells():
            print(f"\nrlr-fast: interrupted{args.interrupted}", file=sys.stderr)
        return 130


def _tells() -> bool:
    """Whether this process tells what all on its machine meet: the first that torchrun started."""
    return int(os.environ.get("LOCAL_RANK", 0)) == 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    try:
        args = parse(build_parser(), argv)
        if processes_wanted() > 1 and not args.shared:
            raise UsageError(f"{args.parser.prog} works in one process; start it without torchrun")
        return args
    except UsageError as error:
        if not _tells():
            raise PeerError(str(error), told=True) from error
        raise


def build_parser() -> Parser:
    """Return the parser of all verbs."""
    parser = Parser(
        prog="rlr-fast",
        description="Multi-class anomaly detection with a learnable reference (RLR): train one "
        "model on normal images of many product classes, evaluate it, predict with it.",
        epilog="Every verb has its own --help. A data set is read as it is: MVTec-AD, MPDD, VisA, "
        "MVTec LOCO, BTAD, or folders of images.",
    )
    parser.add_argument("--version", action="version", version=f"rlr-fast {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    add_demo(verbs)
    add_data(verbs)
    add_train(verbs)
    add_eval(verbs)
    add_predict(verbs)
    add_decoder(verbs)
    add_figures(verbs)
    add_paper(verbs)
    add_tune(verbs)
    add_info(verbs)
    return parser
