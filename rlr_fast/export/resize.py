"""Pillow's Lanczos resize, to the bit, as products with constant matrices."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rlr_fast.data.images import resize_image

_LOBES = 3.0
_BITS = 22  # Pillow's weights are whole multiples of 2**-22
_LOW = 2.0 ** (_BITS // 2)


class LanczosResize(nn.Module):
    """Resize images (..., H, W) of whole numbers from 0 to 255 as Pillow does, rounding included.

    Pillow sums in integers, along one side after the other, and keeps bytes in between. A float32
    cannot hold such a sum. So a weight is two whole numbers of 11 bits, whose products add up
    exactly, as long as fewer than about a hundred pixels make one: down to a fifteenth of the size.
    Which side comes first depends on Pillow's version and on both sizes, so Pillow is asked.

    Args:
        source: (H, W) of the images.
        target: (h, w) of the result.
    """

    def __init__(self, source: tuple[int, int], target: tuple[int, int]) -> None:
        super().__init__()
        high, low = _halves(lanczos_weights(source[0], target[0]))
        self.rows = nn.Buffer(torch.stack([high, low]))
        high, low = _halves(lanczos_weights(source[1], target[1]).T)
        self.columns = nn.Buffer(torch.stack([high, low]))
        generator = torch.Generator().manual_seed(0)
        probe = torch.randint(256, (3, *source), dtype=torch.uint8, generator=generator)
        expected = resize_image(probe, target)
        differences = {}
        for self.columns_first in (False, True):
            differences[self.columns_first] = int((self(probe) != expected).sum())
        self.columns_first = differences[True] < differences[False]

    def forward(self, images: Tensor) -> Tensor:
        """Return images (..., h, w), float32, of whole numbers from 0 to 255."""
        if self.columns_first:
            return self._along_rows(self._along_columns(images.float()))
        return self._along_columns(self._along_rows(images.float()))

    def _along_rows(self, images: Tensor) -> Tensor:
        return _to_bytes(images @ self.columns[0], images @ self.columns[1])

    def _along_columns(self, images: Tensor) -> Tensor:
        return _to_bytes(self.rows[0] @ images, self.rows[1] @ images)


def lanczos_weights(source: int, target: int) -> Tensor:
    """Return Pillow's weights (target, source) of the Lanczos filter along a side, float64.

    They are whole numbers, in units of 2**-22.

    Args:
        source: Pixels of the side.
        target: Pixels that it gets.
    """
    scale = source / target
    stretch = max(scale, 1.0)
    weights = torch.zeros(target, source, dtype=torch.float64)
    for i in range(target):
        center = (i + 0.5) * scale
        first = max(0, int(center - _LOBES * stretch + 0.5))
        last = min(source, int(center + _LOBES * stretch + 0.5))
        x = (torch.arange(first, last, dtype=torch.float64) - center + 0.5) / stretch
        row = torch.where(x.abs() < _LOBES, torch.sinc(x) * torch.sinc(x / _LOBES), 0)
        row = row / row.sum() * 2.0**_BITS
        weights[i, first:last] = torch.trunc(row + 0.5 * row.sign())
    return weights


def _halves(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Part whole numbers into ``high * 2**11 + low``."""
    high = torch.round(weights / _LOW)
    return high.float().contiguous(), (weights - high * _LOW).float().contiguous()


def _to_bytes(high: Tensor, low: Tensor) -> Tensor:
    """Return floor of half more than the sum ``(high * 2**11 + low) / 2**22``, as a byte."""
    whole = high + torch.floor(low / _LOW)  # exact: what low has beyond it rounds no sum up
    return torch.floor((whole + _LOW / 2) / _LOW).clamp(0, 255)
