"""A decoder from feature tokens to images: for pictures of reconstructed features only.

It learns from normal training images and their original features, never from a reconstruction, so
that what it paints of a reconstruction is what the features say. No score depends on it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlr_fast.data import DataSet, ImageFailure, iterate_images
from rlr_fast.files import write_tensors
from rlr_fast.model import CheckpointError, RLRModel, read_weights
from rlr_fast.run_folder import TrainingError

_KIND = "rlr_fast decoder"
_META = "decoder"  # one entry: safetensors writes several in no fixed order
_WIDTH = 96  # channels on the finest feature grid; halved with every doubling of the picture
_LEAST = 16


class Decoder(nn.Module):
    """Convolutions from the tokens of all levels to an image.

    From the coarsest grid to the finest, then in doublings to the image: a level joins where its
    grid is reached. Each channel is first normalised over the training set.

    Args:
        channels: Channels of each level.
        grids: (h, w) of each level.
        image_size: (H, W) of the images.
    """

    def __init__(
        self,
        channels: Sequence[int],
        grids: Sequence[tuple[int, int]],
        image_size: tuple[int, int],
    ) -> None:
        super().__init__()
        self.grids = list(grids)
        self.normalize = nn.ModuleList(
            # Set by a pass over the training set: a plain mean of all batches.
            nn.BatchNorm2d(count, affine=False, momentum=None)
            for count in channels
        )
        self.join = nn.ModuleList(nn.Conv2d(count, _WIDTH, 1) for count in channels)
        finest = max(self.grids)
        self.sizes = sorted(set(self.grids)) + _doublings(finest, image_size)
        widths = [
            max(_LEAST, _WIDTH >> max(0, k - len(set(self.grids)) + 1))
            for k in range(len(self.sizes))
        ]
        self.steps = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(before, after, 3, padding=1),
                nn.GELU(),
            )
            for before, after in pairwise([_WIDTH, *widths])
        )
        self.paint = nn.Conv2d(widths[-1], 3, 3, padding=1)
        for step in self.steps:
            nn.init.kaiming_normal_(step[0].weight, nonlinearity="relu")  # type: ignore[index]
        nn.init.constant_(self.paint.bias, 0.5)  # type: ignore[arg-type]

    def fit_normalization(self, tokens: Sequence[Tensor]) -> None:
        """Count a batch of the training set's tokens [(B, N_j, C_j)] in; in training mode."""
        for t, grid, normalize in zip(tokens, self.grids, self.normalize, strict=True):
            normalize(t.mT.unflatten(2, grid))

    def forward(self, tokens: Sequence[Tensor]) -> Tensor:
        """Return images (B, 3, H, W) of ``tokens`` [(B, N_j, C_j)]; black is 0, white 1."""
        maps = [
            join(normalize(t.mT.unflatten(2, grid)))
            for t, grid, join, normalize in zip(
                tokens, self.grids, self.join, self.normalize, strict=True
            )
        ]
        x = torch.zeros_like(maps[self.grids.index(self.sizes[0])])
        for size, step in zip(self.sizes, self.steps, strict=True):
            if x.shape[2:] != size:
                x = F.interpolate(x, size, mode="nearest")
            for grid, level in zip(self.grids, maps, strict=True):
                if grid == size:
                    x = x + level
            x = step(x)
        painted: Tensor = self.paint(x)
        return painted


def _doublings(start: tuple[int, int], end: tuple[int, int]) -> list[tuple[int, int]]:
    """Sizes after ``start`` up to ``end``, each twice the one before at most."""
    sizes = []
    size = end
    while size[0] > start[0] or size[1] > start[1]:
        sizes.append(size)
        size = (max(start[0], (size[0] + 1) // 2), max(start[1], (size[1] + 1) // 2))
    return sizes[::-1]


def _decoder_for(model: RLRModel) -> Decoder:
    return Decoder(model.backbone.channels, model.backbone.grids, model.config.image_size)


@dataclass(frozen=True)
class DecoderResult:
    """What training a decoder gives.

    Attributes:
        decoder: In eval mode.
        history: A row an epoch, ``{"epoch": …, "loss": …}``.
        failures: Training images that could not be read and were left out.
    """

    decoder: Decoder
    history: list[dict[str, float]]
    failures: list[ImageFailure]


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

    Minimises the mean absolute difference of pixels with Adam; the learning rate falls to 0 on a
    cosine. Features are made from the files in every epoch. On a CPU the same seed gives the same
    decoder, with the same number of threads.

    Args:
        model: Its backbone and neighbourhood give the features, on the device where it lies.
        data: Its ``train`` samples are used.
        epochs: Passes over them, positive.
        batch_size: Images a step, positive.
        lr: Adam's learning rate at the start, positive.
        seed: Of weights and order of images.
        workers: Threads that decode images.
        progress: Called after each step with its images and loss.

    Raises:
        ValueError: A class has no training images, or an argument is not positive.
        TrainingError: No image can be read, or the loss is not finite.
    """
    for name, value in (("epochs", epochs), ("batch_size", batch_size), ("lr", lr)):
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {name}={value}")
    data.require_train()
    samples = [sample for group in data.train.values() for sample in group]
    device = next(model.levels.parameters()).device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        decoder = _decoder_for(model).to(device)
    for batch in iterate_images(samples, model.config.image_size, batch_size, workers):
        if batch.indices:
            with torch.no_grad():
                decoder.fit_normalization(model.tokens(batch.images.to(device)))
    decoder.normalize.eval()
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(decoder.parameters(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    history: list[dict[str, float]] = []
    failures: list[ImageFailure] = []
    for epoch in range(1, epochs + 1):
        rows = torch.randperm(len(samples), generator=order).tolist()
        shuffled = [samples[i] for i in rows]
        total, seen, failed = 0.0, 0, []
        for batch in iterate_images(shuffled, model.config.image_size, batch_size, workers):
            failed += [ImageFailure(rows[f.index], f.error) for f in batch.failures]
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
            raise TrainingError(f"no training image can be read: {failed[0].error}")
        schedule.step()
        failures = sorted(failed, key=lambda failure: failure.index)
        history.append({"epoch": epoch, "loss": total / seen})
    return DecoderResult(decoder.eval(), history, failures)


def save_decoder(decoder: Decoder, model: RLRModel, path: Path) -> None:
    """Write a decoder as a safetensors file that says which features it is for.

    Args:
        decoder: The decoder.
        model: The model that it was trained with.
        path: File to write; its folder must exist.

    Raises:
        OSError: It cannot be written.
    """
    about = {"kind": _KIND, "features": model.feature_identity()}
    write_tensors(path, decoder.state_dict(), {_META: json.dumps(about)})


def load_decoder(path: Path, model: RLRModel) -> Decoder:
    """Read a decoder for the features of a model, to the model's device, in eval mode.

    Raises:
        CheckpointError: The file is missing, damaged, no decoder, or one of other features.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no decoder file {str(path)!r}")
    state, metadata = read_weights(path)
    if _META not in metadata:
        raise CheckpointError(f"{path} is no decoder of `rlr-fast decoder train`")
    trained_on, here = json.loads(metadata[_META])["features"], model.feature_identity()
    wrong = [
        f"{name} {trained_on.get(name)}, here {value}"
        for name, value in here.items()
        if trained_on.get(name) != value
    ]
    if wrong:
        raise CheckpointError(f"{path} was trained on other features: {'; '.join(wrong)}")
    decoder = _decoder_for(model)
    try:
        decoder.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit this version: {error}") from error
    return decoder.to(next(model.levels.parameters()).device).eval()
