"""Feature tokens as colours: their first three principal components as red, green and blue."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_CLIPPED = 0.01  # share of the tokens beyond each end of a colour's range


class PrincipalColours:
    """A basis and a range of colours, fitted on original tokens and used for reconstructions too.

    Nothing of a reconstruction enters basis or range: equal tokens have equal colours, and what
    lies outside the originals' range gets the colour of its end.

    Args:
        tokens: Original tokens (n, C), C at least 3.

    Raises:
        ValueError: Another shape, or values that are NaN or infinite.
    """

    def __init__(self, tokens: Tensor) -> None:
        if tokens.dim() != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 3:
            raise ValueError(f"tokens must be (n, C) with C at least 3, got {tuple(tokens.shape)}")
        if not torch.isfinite(tokens).all():
            raise ValueError("tokens must be finite, got NaN or infinite values")
        values = tokens.detach().cpu().double()
        self._mean = values.mean(0)
        centred = values - self._mean
        vectors = torch.linalg.eigh(centred.mT @ centred).eigenvectors[:, -3:].flip(1)
        # The sign of an eigenvector is chance: let its largest entry be positive.
        largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
        self._basis = vectors * torch.where(largest < 0, -1.0, 1.0)
        ends = torch.tensor([_CLIPPED, 1 - _CLIPPED], dtype=torch.float64)
        projected = np.asarray(centred @ self._basis)  # torch.quantile has a limit of 2**24 values
        self._low, self._high = torch.from_numpy(np.quantile(projected, ends.numpy(), axis=0))

    def paint(self, tokens: Tensor, grid: tuple[int, int]) -> NDArray[np.uint8]:
        """Return the colours (h, w, 3) of tokens (h·w, C) on their grid (h, w)."""
        projected = (tokens.detach().cpu().double() - self._mean) @ self._basis
        span = (self._high - self._low).clamp_min(torch.finfo(torch.float64).tiny)
        place = ((projected - self._low) / span).clamp(0, 1)
        return (255 * place).round().to(torch.uint8).unflatten(0, grid).numpy()
