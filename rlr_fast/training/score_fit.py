"""What turns distances into scores: fitted on normal images after training."""

from __future__ import annotations

import math

import numpy as np
import torch

from rlr_fast.config import RLRConfig, TrainConfig
from rlr_fast.models.rlr import RLRModel
from rlr_fast.training.distributed import Processes
from rlr_fast.training.features import Features
from rlr_fast.training.uncertainty import fit_uncertainty

# The median of normal distances becomes 0, their 99 % quantile 1.
_QUANTILES = (0.5, 0.99)
_BATCH = 16
# Distances per level and process that the quantiles are taken of, evenly spread over all.
_SAMPLE = 2**20


def score_is_fitted(config: RLRConfig, recipe: TrainConfig) -> bool:
    """Return whether `fit_score` has anything to fit."""
    return config.uncertainty > 0 or recipe.score_fit == "scaled"


def fit_score(
    model: RLRModel, recipe: TrainConfig, features: Features, processes: Processes
) -> None:
    """Fit what model and recipe ask for: first the uncertainty, then the scales of the levels.

    Args:
        model: The trained model.
        recipe: That it was trained by.
        features: Its training features, this process's share.
        processes: Those that share the images.
    """
    fit_uncertainty(model, features, processes, recipe.seed)
    if recipe.score_fit == "scaled":
        offsets, weights = level_scales(model, features, processes)
        model.set_score(level_offsets=offsets, level_weights=weights)


@torch.no_grad()
def level_scales(
    model: RLRModel, features: Features, processes: Processes
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return ``level_offsets`` and ``level_weights`` that put the levels on one scale.

    A level's distances d become ``s (d - median) / (q99 - median)`` over normal tokens, so that the
    level with the widest spread does not decide the score alone. s is the side of its grid over
    that of the finest level: a coarse level smears what it finds, and counts the less for it.

    Args:
        model: The trained model.
        features: Normal images' features, this process's share.
        processes: Those that share the images.
    """
    model.eval().prepare_for_inference()
    with processes.together():
        rows = torch.arange(len(features)).split(_BATCH)
        parts: list[list[torch.Tensor]] = [[] for _ in model.levels]
        for tokens in features.batches(rows, model.device):
            for part, distances in zip(parts, model.scored_distances(tokens), strict=True):
                part.append(distances.float().flatten().cpu())
        share = [_thinned(torch.cat(part)) if part else torch.empty(0) for part in parts]
    shares = processes.all_gather(share)
    sides = [math.sqrt(height * width) for height, width in model.backbone.grids]
    offsets, weights = [], []
    for side, level in zip(sides, zip(*shares, strict=True), strict=True):
        low, high = map(float, np.quantile(torch.cat(level).double().numpy(), _QUANTILES))
        offsets.append(low)
        weights.append(side / max(sides) / (high - low if high > low else 1.0))
    return tuple(offsets), tuple(weights)


def _thinned(values: torch.Tensor) -> torch.Tensor:
    # No fixed stride, which would take the same few columns of a grid from every image.
    places = torch.linspace(0, len(values) - 1, min(len(values), _SAMPLE), dtype=torch.float64)
    return values[places.long()]
