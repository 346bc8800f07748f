"""A trained model over batches of images: precision, compilation, a device that need not wait."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlr_fast.config import InferenceExecution
from rlr_fast.models.environment import start_device
from rlr_fast.models.precision import autocast, check_precision
from rlr_fast.models.rlr import RLRModel

# Batches that a device works on while the caller uses the one before.
_AHEAD = {"cuda": 1}

T = TypeVar("T")


class Scores(NamedTuple):
    """What the model says of a batch, on the host.

    Attributes:
        maps: (B, H, W) float32 score maps.
        scores: B image scores.
    """

    maps: NDArray[np.float32]
    scores: list[float]


def load_model(
    checkpoint: str | Path, execution: InferenceExecution, backbone_weights: str | None = None
) -> RLRModel:
    """Load a trained model for scoring: on its device, with its backend, compiled if asked for.

    Args:
        checkpoint: Folder of a run, or name of a repository on the hub.
        execution: Where the model lies and how it scores.
        backbone_weights: Where to take the backbone's weights from now.

    Raises:
        ValueError: The device is not available here, or does not have the precision.
        BackendError: The backend cannot run on the device.
        CheckpointError: A file is missing or damaged, or was trained on other backbone weights.
        BackboneWeightsError: The backbone's weights cannot be had.
    """
    device = start_device(execution)
    check_precision(execution.precision, device)  # before the weights are read
    model: RLRModel = RLRModel.from_pretrained(
        checkpoint, backend=execution.backend, backbone_weights=backbone_weights
    )
    model.to(device)
    if execution.compile:
        compile_model(model, execution.batch_size)
    return model


def check_placed(model: RLRModel, execution: InferenceExecution) -> None:
    """Refuse an execution that a given model contradicts; its defaults mean the model's own.

    Raises:
        ValueError: The model lies on another device, has another backend, or is not compiled.
    """
    if execution.device != "auto":
        device = torch.device(execution.device)
        if device.type != model.device.type or device.index not in (None, model.device.index):
            raise ValueError(
                f"device must be the model's, {model.device}, got device={execution.device!r}"
            )
    if execution.backend not in ("auto", model.backend):
        raise ValueError(
            f"backend must be the model's, {model.backend!r}, got backend={execution.backend!r}"
        )
    if execution.compile and model.compiled_batch is None:
        raise ValueError("compile needs a compiled model, see load_model, got an eager one")


def compile_model(model: RLRModel, batch_size: int) -> None:
    """Compile a model in place, from images to scores, with CUDA graphs on a GPU.

    The first batch takes a minute or more for it. Results are those of the eager model to rounding.

    Args:
        model: A trained model, on its device.
        batch_size: Images in a batch; `score_batches` fills smaller ones up to it, so that one
            compilation serves all.

    Raises:
        ValueError: The batch size is not positive.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be positive, got {batch_size=}")
    mode = "reduce-overhead" if model.device.type == "cuda" else "default"
    model.eval().compile(mode=mode, dynamic=False)
    model.compiled_batch = batch_size


def score_batches(
    model: RLRModel, batches: Iterable[tuple[T, Tensor]], precision: str = "fp32"
) -> Iterator[tuple[T, Scores]]:
    """Score batches of images in their order.

    A GPU works on a batch while the results of the one before it are read and used. The model is
    prepared for inference, see `RLRModel.prepare_for_inference`, where it is not yet.

    Args:
        model: A trained model, on its device.
        batches: Pairs of anything, which comes back with the scores, and images (B, 3, H, W) on the
            host, as `RLRModel.tokens` takes them; B may be 0.
        precision: Of backbone and reconstructors: ``fp32``, ``bf16`` or ``fp16`` (autocast); score
            maps are float32.

    Raises:
        ValueError: The precision does not exist, or not on this device.
    """
    check_precision(precision, model.device)
    return _score_batches(model, batches, precision, model.device)


def _score_batches(
    model: RLRModel, batches: Iterable[tuple[T, Tensor]], precision: str, device: torch.device
) -> Iterator[tuple[T, Scores]]:
    started: deque[tuple[T, _Started]] = deque()

    def down_to(left: int) -> Iterator[tuple[T, Scores]]:
        while len(started) > left:
            what, batch = started.popleft()
            yield what, batch.read()

    source = iter(batches)
    while True:
        try:
            item = next(source, None)
            if item is not None:
                started.append((item[0], _Started(model, item[1], precision, device)))
        except KeyboardInterrupt:
            yield from down_to(0)  # what is computed is not lost
            raise
        if item is None:
            break
        yield from down_to(_AHEAD.get(device.type, 0))
    yield from down_to(0)


class _Started:
    """A batch on its way through the device; `read` waits for it."""

    @torch.inference_mode()
    def __init__(
        self, model: RLRModel, images: Tensor, precision: str, device: torch.device
    ) -> None:
        self.done: torch.cuda.Event | None = None
        if len(images) == 0:
            self.maps = torch.empty(0, *model.config.image_size)
            self.scores = torch.empty(0)
            return
        cuda = device.type == "cuda"
        count = len(images)
        if model.compiled_batch is not None:
            images = _filled(images, model.compiled_batch)
            torch.compiler.cudagraph_mark_step_begin()
        if cuda:
            images = images.pin_memory()
        with autocast(device, precision):
            if not model.is_prepared():
                model.prepare_for_inference()
            out = model(images.to(device, non_blocking=cuda))
        # Without blocking a CUDA device copies to pinned memory of its own choice.
        self.maps = out.score_map[:count, 0].float().to("cpu", non_blocking=cuda)
        self.scores = out.score[:count].float().to("cpu", non_blocking=cuda)
        if cuda:
            self.done = torch.cuda.Event()
            self.done.record(torch.cuda.current_stream(device))

    def read(self) -> Scores:
        if self.done is not None:
            self.done.synchronize()
        return Scores(self.maps.numpy(), self.scores.tolist())


def _filled(images: Tensor, count: int) -> Tensor:
    """Repeat the last image until there are ``count``: a compiled model takes as many.

    A copy even where none is missing: tensors of inference mode and others are compiled apart.
    """
    missing = max(0, count - len(images))
    return torch.cat((images, images[-1:].expand(missing, -1, -1, -1)))
