"""Training of a decoder, see `rlr_fast.visualization.decoder`."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence

import torch

from rlr_fast.config import check_seed
from rlr_fast.data import DataSet, ImageFailure, Sample, iterate_images
from rlr_fast.data.contents import describe_images
from rlr_fast.models.rlr import RLRModel
from rlr_fast.training.run_dir import TrainingError
from rlr_fast.visualization.decoder import DecoderResult, decoder_for

_log = logging.getLogger(__name__)


def train_decoder(
    model: RLRModel,
    data: DataSet,
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    seed: int,
    workers: int | None = None,
    progress: Callable[[int, float], object] = lambda images, loss: None,
) -> DecoderResult:
    """Train a decoder on the normal images of all classes.

    Minimizes the mean absolute difference of pixels with Adam; the learning rate falls to 0 on a
    cosine. Features are made from the files in every epoch. On a CPU the same seed gives the same
    decoder, with the same number of threads.

    Args:
        model: Its backbone and neighborhood give the features, on the device where it lies.
        data: Its ``train`` samples are used.
        epochs: Passes over them, positive.
        batch_size: Images per step, positive.
        lr: Adam's learning rate at the start, positive.
        seed: Of weights and order of images, from 0 to 2**29 - 1.
        workers: Threads that decode images.
        progress: Called after each step with its images and loss.

    Raises:
        ValueError: A class has no training images, an argument is out of its range, or the model
            has tiles.
        TrainingError: No image of a class can be read, or the loss is not finite.
    """
    for name, value in (("epochs", epochs), ("batch_size", batch_size), ("lr", lr)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {name}={value}")
    check_seed(seed)
    data.require_train()
    model.config.require_whole("a decoder")
    samples = [sample for group in data.train.values() for sample in group]
    device = model.device
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        decoder = decoder_for(model).to(device)
    failures: dict[int, ImageFailure] = {}
    for batch in iterate_images(samples, model.config.image_size, batch_size, workers):
        failures |= {failure.index: failure for failure in batch.failures}
        if batch.indices:
            with torch.no_grad():
                decoder.fit_normalization(model.tokens(batch.images.to(device)))
    decoder.normalize.eval()
    readable = _readable(samples, failures)
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(decoder.parameters(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    history: list[dict[str, float]] = []
    for epoch in range(1, epochs + 1):
        rows = [readable[i] for i in torch.randperm(len(readable), generator=order).tolist()]
        shuffled = [samples[i] for i in rows]
        total, seen = 0.0, 0
        for batch in iterate_images(shuffled, model.config.image_size, batch_size, workers):
            for failure in batch.failures:
                failures[rows[failure.index]] = ImageFailure(rows[failure.index], failure.error)
            if not batch.indices:
                continue
            images = batch.images.to(device)
            with torch.no_grad():
                tokens = model.tokens(images)
            loss = (decoder(tokens) - images / 255).abs().mean()
            if not torch.isfinite(loss):
                raise TrainingError(f"the decoder's loss is {loss.item()} in epoch {epoch}")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(images)
            seen += len(images)
            progress(len(images) + len(batch.failures), loss.item())
        if seen == 0:
            raise TrainingError(f"no training image can be read: {failures[rows[0]].error}")
        schedule.step()
        history.append({"epoch": epoch, "loss": total / seen})
    left_out = sorted(failures.values(), key=lambda failure: failure.index)
    about = {
        **{"epochs": epochs, "batch_size": batch_size, "lr": lr, "seed": seed},
        **{"data": describe_images(data, data.train), "left_out": len(left_out)},
    }
    return DecoderResult(decoder.eval(), history, left_out, about)


def _readable(samples: Sequence[Sample], failures: Mapping[int, ImageFailure]) -> list[int]:
    """Return the places of the samples to learn from; tell of the others before the long work."""
    readable = [i for i in range(len(samples)) if i not in failures]
    known = {samples[i].category for i in readable}
    for index, failure in failures.items():
        name = samples[index].category
        if name not in known:
            raise TrainingError(f"no training image of {name} can be read: {failure.error}")
        _log.warning("left out: %s", failure.error)
    return readable
