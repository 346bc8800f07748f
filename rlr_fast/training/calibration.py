"""What scores normal images get: quantiles over the training set, kept beside the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlr_fast.data.records import read_record
from rlr_fast.models.checkpoint import CheckpointError
from rlr_fast.models.rlr import RLRModel
from rlr_fast.training.distributed import Processes
from rlr_fast.training.features import Features

CALIBRATION_FILE = "calibration.json"
_QUANTILES = (0.5, 0.9, 0.99, 0.999)
_BATCH = 16


@dataclass(frozen=True)
class _Calibration:
    """What `color_scale` needs of the file."""

    pixel: dict[str, float]


@torch.no_grad()
def calibrate(
    model: RLRModel, features: Features, categories: Sequence[str], processes: Processes
) -> dict[str, Any]:
    """Score the training images and return quantiles of their pixels' and images' scores.

    Each process scores its own images; the quantiles are those of all.

    Args:
        model: The trained model.
        features: Its training features, this process's share.
        categories: Class of each row of ``features``.
        processes: Those that share the training set.

    Returns:
        ``{"pixel": {quantile: score}, "image": {"max": score, "classes": {name: {"max": …}}}}``;
        the scores are those of `RLRModel.forward`. Pixel quantiles are means over the images' own.
    """
    model.eval().prepare_for_inference()
    device = model.device
    wanted = torch.tensor(_QUANTILES, device=device)
    pixels, scores = [], []
    with processes.together():
        for tokens in features.batches(torch.arange(len(features)).split(_BATCH), device):
            out = model.predict_tokens(tokens)
            pixels += [torch.quantile(m.flatten().float(), wanted) for m in _thinned(out.score_map)]
            scores.append(out.score.float())
        # A share may be empty: all its images unreadable.
        quantiles = torch.stack(pixels) if pixels else torch.empty(0, len(wanted))
        share = quantiles.cpu(), torch.cat(scores).cpu(), list(categories)
    shares = processes.all_gather(share)
    means = torch.cat([pixel for pixel, _, _ in shares]).mean(0)
    score = torch.cat([score for _, score, _ in shares])
    names = [name for _, _, categories in shares for name in categories]
    per_class = {
        name: {"max": float(score[[n == name for n in names]].max())} for name in sorted(set(names))
    }
    return {
        "pixel": {str(q): float(v) for q, v in zip(_QUANTILES, means, strict=True)},
        "image": {"max": float(score.max()), "classes": per_class},
    }


def _thinned(score_map: torch.Tensor) -> torch.Tensor:
    """Return every k-th pixel of each axis, 512² at most: torch.quantile has a limit."""
    step = max(1, max(score_map.shape[-2:]) // 512)
    return score_map[..., ::step, ::step]


def color_scale(checkpoint: Path) -> tuple[float, float]:
    """Return the fixed color scale (low, high) of a checkpoint's heat maps.

    Low is the median pixel of normal training images; high lies three times as far above it as
    their highest pixels (quantile 0.999). Normal images stay dark, whatever is shown beside them.

    Raises:
        CheckpointError: The checkpoint has no calibration (training has not finished), or a
            damaged one.
    """
    path = checkpoint / CALIBRATION_FILE
    try:
        pixel = read_record(_Calibration, path).pixel
        low, high = pixel[str(_QUANTILES[0])], pixel[str(_QUANTILES[-1])]
        if not -math.inf < low < high < math.inf:
            raise ValueError(f"its quantiles must rise, got {low} and {high}")
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{checkpoint} has no {CALIBRATION_FILE} (written when training ends), so heat maps "
            "have no color scale"
        ) from error
    except (OSError, ValueError, KeyError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        raise CheckpointError(f"{path} cannot be read: {reason}") from error
    return low, low + 3 * (high - low)
