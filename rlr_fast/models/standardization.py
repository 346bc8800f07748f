"""The scale in which a level's features are reconstructed and compared."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Standardize(nn.Module):
    """Per-channel standardization of one level's features, ``(f - mean) / deviation``.

    It is the identity until `fit` stores the training set's figures; they are part of the
    checkpoint.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))
        self.mean: Tensor
        self.std: Tensor

    def fit(self, mean: Tensor, std: Tensor) -> None:
        """Store mean and deviation (C,); a channel that never varies is left unscaled."""
        self.mean.copy_(mean)
        self.std.copy_(torch.where(std > 0, std, torch.ones_like(std)))

    def forward(self, tokens: Tensor) -> Tensor:
        """Standardize tokens (..., C)."""
        return (tokens - self.mean) / self.std

    def undo(self, tokens: Tensor) -> Tensor:
        """Return standardized tokens (..., C) in the features' own scale."""
        return tokens * self.std + self.mean


class Components(nn.Module):
    """The principal components of one level's features, ``(f - mean) V / s``.

    V holds the directions of largest variance over the training set, and s² is the mean of their
    variances: the components keep their proportions, and are of order 1 together. Until `fit` they
    are the first channels; mean, V and s are part of the checkpoint.

    Args:
        channels: C of the features.
        count: Components that are kept, at most C.
    """

    def __init__(self, channels: int, count: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("directions", torch.eye(channels, count))
        self.register_buffer("scale", torch.ones(()))
        self.mean: Tensor
        self.directions: Tensor
        self.scale: Tensor

    def fit(self, mean: Tensor, covariance: Tensor) -> None:
        """Take the components of a covariance (C, C) around a mean (C,), both in float64."""
        count = self.directions.shape[1]
        variances, directions = torch.linalg.eigh(covariance)  # rising
        directions = directions[:, -count:].flip(1)
        # Either sign is an eigenvector; the largest entry is taken to be positive.
        largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
        self.mean.copy_(mean)
        self.directions.copy_(directions * largest.sign())
        spread = variances[-count:].mean().clamp_min(0).sqrt()
        self.scale.copy_(torch.where(spread > 0, spread, torch.ones_like(spread)))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the components (..., count) of tokens (..., C)."""
        with torch.autocast(tokens.device.type, enabled=False):  # they are what is compared
            return (tokens - self.mean) @ self.directions / self.scale

    def undo(self, components: Tensor) -> Tensor:
        """Return the tokens (..., C) of components (..., count), with nothing of the others."""
        with torch.autocast(components.device.type, enabled=False):
            return components * self.scale @ self.directions.T + self.mean
