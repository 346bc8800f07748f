"""What a runtime makes of an exported file, beside what the model itself gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rlr_fast.export.runtimes import Outputs
from rlr_fast.inference.batches import score_batches
from rlr_fast.inference.decisions import Rule
from rlr_fast.models.rlr import RLRModel

TOLERANCE = 1e-4
"""Largest difference of a score map or a score, as a share of the model's largest one.

Float32 in another order of the sums gives a tenth of it at most; a wrong graph, or bfloat16, gives
more. P-values and decisions must be those of the score beside them.
"""
_P_VALUE_ROUNDING = 1e-6  # of float32


@dataclass(frozen=True)
class Comparison:
    """The largest differences between a runtime's outputs and the model's.

    Attributes:
        runtime: In words.
        score_map: As a share of the model's largest value; NaN where the runtime gives NaN.
        score: Likewise.
        decisions: Number of p-values and decisions that are not those of the runtime's own scores.
    """

    runtime: str
    score_map: float
    score: float
    decisions: int

    @property
    def agrees(self) -> bool:
        """Whether all differences are within `TOLERANCE`."""
        # No comparison holds for NaN.
        within = self.score_map <= TOLERANCE and self.score <= TOLERANCE
        return within and self.decisions == 0

    def __str__(self) -> str:
        text = f"{self.runtime}: map within {self.score_map:.1e}, score within {self.score:.1e}"
        wrong = f", {self.decisions} p-values or decisions are not those of their scores"
        return text + (wrong if self.decisions else "")


def model_outputs(model: RLRModel, images: Tensor) -> Outputs:
    """Return the score maps and scores that prediction has of images (n, 3, H, W)."""
    [(_, scores)] = score_batches(model.eval(), [(None, images)])
    return {"score_map": scores.maps, "score": np.asarray(scores.scores, dtype=np.float32)}


def compare(
    name: str,
    run: Callable[[NDArray[np.uint8]], Outputs],
    images: Tensor,
    expected: Outputs,
    rules: Sequence[Rule] = (),
) -> Comparison:
    """Run images one by one, and together in a larger batch; return the largest differences.

    Args:
        name: Of the runtime.
        run: Return the outputs of images (B, H, W, 3), uint8.
        images: (n, 3, H, W) uint8.
        expected: From `model_outputs`.
        rules: Columns of the decisions, if there are any.
    """
    pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
    rows = np.arange(len(pixels))
    batches = [*rows[:, None], np.append(rows, 0)]  # 1 and n + 1 images
    parts = [run(pixels[batch]) for batch in batches]
    rows = np.concatenate(batches)
    found = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}

    def difference(key: str) -> float:
        largest = np.abs(expected[key]).max()
        return float(np.abs(found[key] - expected[key][rows]).max() / largest)

    wrong = 0
    if rules:
        p_values = np.stack([rule.p_values(found["score"]) for rule in rules], 1)
        anomalous = p_values <= [rule.alpha for rule in rules]
        close = np.abs(found["p_value"] - p_values) <= _P_VALUE_ROUNDING
        wrong = int(np.count_nonzero(~close) + np.count_nonzero(found["anomalous"] != anomalous))
    return Comparison(name, difference("score_map"), difference("score"), wrong)
