"""Feature tokens as colors: their first three principal components as red, green and blue."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_CLIPPED = 0.01  # share of the tokens beyond each end of a color's range


class PrincipalColors:
    """A basis and a range of colors, fitted on original tokens and used for reconstructions too.

    Nothing of a reconstruction enters basis or range: equal tokens have equal colors, and what
    lies outside the originals' range gets the color of its end.

    Args:
        tokens: Original tokens (n, C), n and C at least 3.

    Raises:
        ValueError: Another shape, or values that are NaN or infinite.
    """

    def __init__(self, tokens: Tensor) -> None:
        if tokens.dim() != 2 or min(tokens.shape) < 3:
            raise ValueError(
                f"tokens must be (n, C) with n and C at least 3, got {tuple(tokens.shape)}"
            )
        if not torch.isfinite(tokens).all():
            raise ValueError("tokens must be finite, got NaN or infinite values")
        # It takes a second to import, for which whoever draws anything else would wait.
        from sklearn.decomposition import PCA

        # The covariance is small where the tokens are many; this solver also fixes the signs.
        self._pca = PCA(3, svd_solver="covariance_eigh")
        with np.errstate(invalid="ignore"):  # constant tokens have no shares of variance
            projected = self._pca.fit_transform(_as_doubles(tokens))
        self._low, self._high = np.quantile(projected, (_CLIPPED, 1 - _CLIPPED), axis=0)

    def paint(self, tokens: Tensor, grid: tuple[int, int]) -> NDArray[np.uint8]:
        """Return the colors (h, w, 3) of tokens (h·w, C) on their grid (h, w)."""
        projected = self._pca.transform(_as_doubles(tokens))
        span = np.maximum(self._high - self._low, np.finfo(np.float64).tiny)
        place = np.clip((projected - self._low) / span, 0, 1)
        return np.rint(255 * place).astype(np.uint8).reshape(*grid, 3)


def _as_doubles(tokens: Tensor) -> NDArray[np.float64]:
    return np.asarray(tokens.detach().cpu().double())
