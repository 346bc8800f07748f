"""Tuning of the Triton kernels for a configuration: ``rlr-fast tune``."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, get_args

import torch

from rlr_fast.cli.common import add_machine, add_verb
from rlr_fast.cli.options import UsageError, add_fields, config_from, positive
from rlr_fast.config import PRESETS, Precision, RLRConfig
from rlr_fast.data.files import write_atomically
from rlr_fast.functional import kernels, unsupported_reason, window_pair
from rlr_fast.models.environment import choose_device
from rlr_fast.models.rlr import RLRModel
from rlr_fast.training.progress import progress_bar

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def tune(
    config: RLRConfig,
    batch_size: int,
    precision: str,
    device: torch.device,
    progress: Callable[[int], object],
    **options: Any,
) -> Iterator[str]:
    """Search for the fastest tiles of every level's kernels, and keep each as it is found.

    Args:
        config: Its levels are tuned for.
        batch_size: Images a step; counts as the next power of two.
        precision: Of a run: fp32, bf16 or fp16.
        device: Where the kernels run.
        progress: Called with 1 after each candidate.
        options: For `rlr_fast.kernels.search`.

    Yields:
        A line a kernel and level.

    Raises:
        ValueError: The file of tuned tiles is damaged, or the kernels fit no level.
        OSError: It cannot be written.
    """
    path = kernels.tuned_file()
    kernels.read_tuned()
    path.parent.mkdir(parents=True, exist_ok=True)
    # The shapes do not depend on the backbone's weights.
    model = RLRModel(dataclasses.replace(config, backbone_weights="random"))
    levels: Any = model.levels
    shapes = []
    for j, level in enumerate(levels):
        width = level.hidden // level.heads
        reason = kernels.unsupported_width(width)
        if reason is None:
            window = window_pair(level.blocks[0].window)
            shapes.append(kernels.Shape(level.grid, window, level.heads, width))
        else:
            yield f"level {j} is left out: {reason}"
    if not shapes:
        raise ValueError("hidden, heads: the Triton kernels fit none of these levels")
    search = kernels.search(
        shapes, batch_size, _DTYPES[precision], device, progress=progress, **options
    )
    for finding in search:
        write_atomically(path, kernels.with_tuned(finding.problem, finding.tiles))
        kernels.forget_tuned()
        gain = finding.shipped_milliseconds / finding.milliseconds
        yield (
            f"{finding.problem.key()}: {finding.milliseconds:.4f} ms, {gain:.2f} times the shipped "
            f"tiles' speed ({finding.tried} tried, {finding.refused} did not fit)"
        )
    yield f"kept in {path}"


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
    parser.add_argument("--precision", default="bf16", choices=get_args(Precision), help="of a run")
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
