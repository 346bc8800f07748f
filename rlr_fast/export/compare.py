"""What a runtime makes of an exported file, beside what the model itself gives."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor

from rlr_fast.export.runtimes import Outputs
from rlr_fast.inference.decisions import Rule
from rlr_fast.models.rlr import RLRModel
from rlr_fast.pictures.batches import score_batches

TOLERANCE = 1e-4
"""Largest difference of a score map or a score, as a share of the model's largest one.

Float32 in another order of the sums gives a tenth of it at most; a wrong graph, or bfloat16, gives
more. P-values and decisions must be those of the score beside them.
"""
HALF_TOLERANCE = 1e-2
"""The same where weights are kept in float16, which moves scores by a thousandth or so."""
LEAST_RANK_CORRELATION = 0.999
"""Of Spearman, between the scores of the file and of the model, where weights are in float16."""
_P_VALUE_ROUNDING = 1e-6  # of float32
_TOGETHER = 8  # images at once; with the first of them again, those of the larger batch


@dataclass(frozen=True)
class Comparison:
    """The largest differences between a runtime's outputs and the model's.

    Attributes:
        runtime: In words.
        score_map: As a share of the model's largest value; NaN where the runtime gives NaN.
        score: Likewise.
        decisions: Number of p-values and decisions that are not those of the runtime's own scores.
        rank_correlation: Spearman's, of the scores; NaN where all of them are equal.
        half: Whether the file has weights in float16.
    """

    runtime: str
    score_map: float
    score: float
    decisions: int
    rank_correlation: float
    half: bool = False

    @property
    def tolerance(self) -> float:
        """Largest difference that is allowed."""
        return HALF_TOLERANCE if self.half else TOLERANCE

    @property
    def agrees(self) -> bool:
        """Whether all differences are within the tolerance, and images keep their order."""
        # No comparison holds for NaN.
        within = self.score_map <= self.tolerance and self.score <= self.tolerance
        ordered = not self.half or self.rank_correlation >= LEAST_RANK_CORRELATION
        return within and ordered and self.decisions == 0

    def __str__(self) -> str:
        if math.isnan(self.score_map + self.score):
            return f"{self.runtime}: gives NaN, no scores at all"
        text = f"{self.runtime}: map within {self.score_map:.1e}, score within {self.score:.1e}"
        if self.half:
            text += f", rank correlation {self.rank_correlation:.5f}"
        wrong = f", {self.decisions} p-values or decisions are not those of their scores"
        return text + (wrong if self.decisions else "")


def model_outputs(model: RLRModel, images: Tensor) -> Outputs:
    """Return the score maps and scores that prediction has of images (n, 3, H, W)."""
    batches = [(None, part) for part in images.split(_TOGETHER)]
    training = model.training
    try:
        parts = [scores for _, scores in score_batches(model.eval(), batches)]
    finally:
        model.train(training)
    scores = np.concatenate([part.scores for part in parts])
    return {
        "score_map": np.concatenate([part.maps for part in parts]),
        "score": scores.astype(np.float32),
    }


def compare(
    name: str,
    run: Callable[[NDArray[np.uint8]], Outputs],
    images: Tensor,
    expected: Outputs,
    rules: Sequence[Rule] = (),
    *,
    half: bool = False,
) -> Comparison:
    """Run images one by one, and some in a larger batch; return the largest differences.

    Args:
        name: Of the runtime.
        run: Return the outputs of images (B, H, W, 3), uint8.
        images: (n, 3, H, W) uint8, of the file's size.
        expected: From `model_outputs`.
        rules: Columns of the decisions, if there are any.
        half: Whether the file has weights in float16.
    """
    pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
    rows = np.arange(len(pixels))
    batches = [*rows[:, None], np.append(rows[:_TOGETHER], 0)]
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
    scores = found["score"], expected["score"][rows]
    varies = all(np.ptp(each) > 0 for each in scores)
    correlation = float(spearmanr(*scores).statistic) if varies else math.nan
    return Comparison(name, difference("score_map"), difference("score"), wrong, correlation, half)
