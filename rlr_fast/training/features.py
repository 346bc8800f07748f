"""Features of the training images, from wherever they come: kept, or made again each time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Protocol

import torch
from torch import Tensor

from rlr_fast.data.images import ImageFailure, iterate_images
from rlr_fast.data.layouts import Sample
from rlr_fast.models.rlr import RLRModel

_BATCH = 8


class Features(Protocol):
    """Pooled feature tokens of a list of images, rounded to bfloat16.

    Attributes:
        failures: Images of the list that could not be read; they have no row.
    """

    @property
    def failures(self) -> list[ImageFailure]:
        """Images of the list that could not be read."""

    def __len__(self) -> int:
        """Return the number of images."""

    def batches(self, rows: Sequence[Tensor], device: torch.device) -> Iterator[list[Tensor]]:
        """Yield the tokens [(B, N_j, C_j)], float32 on ``device``, of each group of rows (B,)."""


class FreshFeatures:
    """Features made from the files whenever they are asked for, by threads and the backbone.

    For sets whose features neither memory nor disk can hold. Every file is read once at the start,
    to find those that cannot be.

    Args:
        model: Its backbone and neighborhood give the features, on the device where it lies.
        samples: The images.
        workers: Threads that decode images.
        progress: Called with the number of images looked at since the last call.
    """

    def __init__(
        self,
        model: RLRModel,
        samples: Sequence[Sample],
        workers: int | None = None,
        progress: Callable[[int], object] = lambda _: None,
    ) -> None:
        self._model, self._workers = model, workers
        self.failures: list[ImageFailure] = []
        for batch in iterate_images(samples, (1, 1), _BATCH, workers):
            self.failures += batch.failures
            progress(len(batch.indices) + len(batch.failures))
        failed = {failure.index for failure in self.failures}
        self._samples = [sample for i, sample in enumerate(samples) if i not in failed]

    def __len__(self) -> int:
        return len(self._samples)

    def batches(self, rows: Sequence[Tensor], device: torch.device) -> Iterator[list[Tensor]]:
        """Yield the tokens [(B, N_j, C_j)], float32 on ``device``, of each group of rows (B,).

        Raises:
            UnreadableImageError: An image can no longer be read.
        """
        order = [self._samples[int(i)] for i in chain.from_iterable(rows)]
        size = self._model.config.image_size
        decoded = iterate_images(order, size, 1, self._workers)
        for group in rows:
            images = torch.empty(len(group), 3, *size, dtype=torch.uint8)
            for place in range(len(group)):
                batch = next(decoded)
                if batch.failures:
                    raise batch.failures[0].error
                images[place] = batch.images[0]
            tokens = self._model.tokens(images.to(device)) if len(group) else self._none(device)
            # As a cache keeps them, so that the same run needs no cache to be the same.
            yield [t.to(torch.bfloat16).float() for t in tokens]

    def _none(self, device: torch.device) -> list[Tensor]:
        backbone = self._model.backbone
        return [
            torch.empty(0, height * width, channels, device=device)
            for (height, width), channels in zip(backbone.grids, backbone.channels, strict=True)
        ]
