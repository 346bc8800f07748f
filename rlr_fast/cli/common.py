"""What several verbs of the command line share."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from rlr_fast.cli.options import Parser, UsageError, add_fields, positive
from rlr_fast.config import (
    PRESETS,
    Cache,
    ExecutionConfig,
    InferenceExecution,
    Precision,
    RLRConfig,
    TrainConfig,
)
from rlr_fast.data import LAYOUTS, DataSet, read_dataset
from rlr_fast.functional import Backend
from rlr_fast.inference import batches
from rlr_fast.models.checkpoint import CheckpointError
from rlr_fast.models.rlr import RLRModel
from rlr_fast.training.calibration import color_scale

ABOUT_PRESETS = "presets: " + "; ".join(f"{name}: {p.about}" for name, p in PRESETS.items())


def add_verb(
    verbs: Any, name: str, run: Any, help: str, *, shared: bool = False, **options: Any
) -> Parser:
    """Add a verb; ``shared`` says that several processes under torchrun can share its work."""
    parser: Parser = verbs.add_parser(name, help=help, description=help, **options)
    parser.set_defaults(
        run=run,
        parser=parser,
        shared=shared,
        less_memory="a smaller --batch-size or --image-size needs less",
        interrupted="",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of flags; flags given here win")
    return parser


def add_dataset(parser: argparse.ArgumentParser) -> None:
    """Add the data set and which of it is read."""
    parser.add_argument("data", type=Path, help="root folder of the data set")
    parser.add_argument(
        "--layout", default="auto", metavar="NAME", help=f"auto, {', '.join(LAYOUTS)}"
    )
    parser.add_argument("--classes", nargs="+", metavar="CLASS", help="only these classes")


def add_machine(parser: argparse.ArgumentParser) -> None:
    """Add the flags of device, backend and threads."""
    group = parser.add_argument_group("machine")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    group.add_argument(
        "--backend", default="auto", choices=get_args(Backend), help="of the attention operators"
    )
    group.add_argument("--workers", type=positive, metavar="N", help="threads that decode images")
    group.add_argument("--quiet", action="store_true", help="no progress bars")


def add_training(parser: argparse.ArgumentParser) -> None:
    """Add the flags of training: where they start, how it is done, model and recipe."""
    parser.add_argument("--preset", choices=tuple(PRESETS), help="where the settings start (paper)")
    parser.add_argument(
        "--cache-dir", type=Path, metavar="DIR", help="folder of feature caches (~/.cache/rlr_fast)"
    )
    parser.add_argument(
        "--cache",
        default="auto",
        choices=get_args(Cache),
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
        "--micro-batch-size",
        type=positive,
        metavar="N",
        help="images of a step in memory at once: less memory, the same result to rounding",
    )
    add_fields(parser, RLRConfig)
    add_fields(parser, TrainConfig)


E = TypeVar("E", bound=ExecutionConfig)


def execution_from(args: argparse.Namespace, cls: type[E]) -> E:
    """Return how the flags say that the work is done."""
    names = [field.name for field in dataclasses.fields(cls)]
    return cls(**{name: getattr(args, name) for name in names if hasattr(args, name)})


def read_data(args: argparse.Namespace) -> DataSet:
    """Read the data set that the command names."""
    return read_dataset(args.data, args.layout, args.classes)


def report_failures(failures: Sequence[str]) -> int:
    """Tell on standard error which files were left out; return the exit code."""
    for failure in failures:
        print(f"rlr-fast: left out: {failure}", file=sys.stderr)
    return 1 if failures else 0


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Add the checkpoint, the results' folder and the colour scale."""
    parser.add_argument(
        "--checkpoint", metavar="RUN", help="folder of a run, or a name on the hub (needed)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of results (needed)")
    parser.set_defaults(needs=("checkpoint", "out"))
    add_backbone_weights(parser)
    parser.add_argument(
        "--scale",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="scores of the first and last colour (default: from the run's normal images)",
    )


def add_backbone_weights(parser: argparse.ArgumentParser) -> None:
    """Add where a checkpoint's backbone gets its weights."""
    parser.add_argument(
        "--backbone-weights", metavar="FROM", help="where to take the backbone's weights from now"
    )


def add_inference(parser: argparse.ArgumentParser) -> None:
    """Add the flags of scoring."""
    group = parser.add_argument_group("inference")
    group.add_argument(
        "--batch-size",
        type=positive,
        default=InferenceExecution.batch_size,
        metavar="N",
        help="images, or tiles, scored at once",
    )
    group.add_argument(
        "--precision",
        default="fp32",
        choices=get_args(Precision),
        help="of backbone and reconstructors: fp32, bf16, or fp16 (GPU only); score maps are fp32",
    )
    group.add_argument(
        "--compile",
        action="store_true",
        help="compile the model (CUDA graphs on a GPU): minutes at first, faster then",
    )
    parser.set_defaults(
        less_memory="a smaller --batch-size needs less, and so does --precision bf16"
    )


def load_model(args: argparse.Namespace) -> RLRModel:
    """Load the model of ``--checkpoint`` onto its device."""
    check_out(args.out)
    execution = execution_from(args, InferenceExecution)
    return batches.load_model(args.checkpoint, execution, args.backbone_weights)


def check_out(out: Path) -> None:
    """Refuse a file where results need a folder."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out must be a folder, {str(out)!r} is a file")


def read_model(args: argparse.Namespace, checkpoint: str) -> RLRModel:
    """Load a checkpoint's model, as the flags say, onto its device."""
    execution = InferenceExecution(device=args.device, backend=args.backend)
    return batches.load_model(checkpoint, execution, args.backbone_weights)


def given_scale(args: argparse.Namespace) -> tuple[float, float]:
    """Return the colour scale: ``--scale``, or the checkpoint's own."""
    if args.scale is None:
        try:
            return color_scale(Path(args.checkpoint))
        except CheckpointError as error:
            raise UsageError(f"{error}; give one by --scale LOW HIGH") from error
    low, high = args.scale
    if not low < high:
        raise UsageError(f"--scale: LOW must be below HIGH, got {low} {high}")
    return low, high
