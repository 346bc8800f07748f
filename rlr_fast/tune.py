"""Tuning of the Triton kernels for a configuration: ``rlr-fast tune``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch

from rlr_fast.config import RLRConfig
from rlr_fast.files import write_atomically
from rlr_fast.functional import kernels, window_pair
from rlr_fast.model import RLRModel

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
