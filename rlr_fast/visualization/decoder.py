"""A decoder from feature tokens to images: for pictures of reconstructed features only.

It learns from normal training images and their original features, never from a reconstruction, so
that what it paints of a reconstruction is what the features say. No score depends on it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlr_fast.data import ImageFailure
from rlr_fast.files import check_writable, write_atomically, write_tensors
from rlr_fast.models.checkpoint import CheckpointError, read_weights, sealed
from rlr_fast.models.rlr import RLRModel

_KIND = "rlr_fast decoder"
_META = "decoder"
_WIDTH = 96  # channels on the finest feature grid; halved with every doubling of the picture
_LEAST = 16

HISTORY_SUFFIX = ".jsonl"

_log = logging.getLogger(__name__)


class Decoder(nn.Module):
    """Convolutions from the tokens of all levels to an image.

    From the coarsest grid to the finest, then in doublings to the image: a level joins where its
    grid is reached. Each channel is first normalized over the training set.

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
    """Return the sizes after ``start`` up to ``end``, each twice the one before at most."""
    sizes = []
    size = end
    while size[0] > start[0] or size[1] > start[1]:
        sizes.append(size)
        size = (max(start[0], (size[0] + 1) // 2), max(start[1], (size[1] + 1) // 2))
    return sizes[::-1]


def decoder_for(model: RLRModel) -> Decoder:
    """Return an untrained decoder for the features of a model."""
    return Decoder(model.backbone.channels, model.backbone.grids, model.config.image_size)


@dataclass(frozen=True)
class DecoderResult:
    """What training a decoder gives.

    Attributes:
        decoder: In eval mode.
        history: A row per epoch, ``{"epoch": …, "loss": …}``.
        failures: Training images that could not be read and were left out.
        training: How it was made: arguments, data.
    """

    decoder: Decoder
    history: list[dict[str, float]]
    failures: list[ImageFailure]
    training: dict[str, Any]


def check_decoder_file(path: Path) -> None:
    """Refuse a place where a decoder and its history cannot or should not be written.

    Raises:
        ValueError: Another suffix, or the place is taken by anything but an earlier decoder.
        OSError: The folder cannot be written.
    """
    if path.suffix != ".safetensors" or path.is_dir():
        raise ValueError(f"a decoder is a file named *.safetensors, got {str(path)!r}")
    history = path.with_suffix(HISTORY_SUFFIX)
    if history.is_dir():
        raise ValueError(f"the loss is written to {str(history)!r}, which is a folder")
    if path.exists():
        if _META not in read_weights(path)[1]:
            raise ValueError(f"{str(path)!r} holds something else than a decoder; choose another")
    elif history.exists():
        raise ValueError(
            f"the loss would be written over {str(history)!r}, which belongs to no decoder; choose "
            f"another name than {path.name!r}"
        )
    check_writable(path.parent)


def save_decoder(result: DecoderResult, model: RLRModel, path: Path) -> None:
    """Write a decoder as a safetensors file that says how it was made and for which features.

    The losses are written beside it, a line per epoch.

    Args:
        result: What `rlr_fast.training.decoder.train_decoder` gave.
        model: The model that it was trained with.
        path: File to write, see `check_decoder_file`; its folder is made.

    Raises:
        OSError: It cannot be written.
    """
    about = {"kind": _KIND, "features": model.feature_identity(), "training": result.training}
    path.parent.mkdir(parents=True, exist_ok=True)
    state = result.decoder.state_dict()
    write_tensors(path, state, sealed(state, {_META: json.dumps(about)}))
    history = "".join(json.dumps(row) + "\n" for row in result.history)
    write_atomically(path.with_suffix(HISTORY_SUFFIX), history)


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
    try:
        trained_on = dict(json.loads(metadata[_META])["features"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} does not say which features it is for") from error
    here = model.feature_identity()
    wrong = [
        f"{name} {trained_on.get(name)}, here {value}"
        for name, value in here.items()
        if trained_on.get(name) != value
    ]
    if wrong:
        raise CheckpointError(f"{path} was trained on other features: {'; '.join(wrong)}")
    decoder = decoder_for(model)
    try:
        decoder.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit this version: {error}") from error
    return decoder.to(model.device).eval()
