"""Conformal p-values and thresholds: decisions with a false-alarm rate that holds.

Let n normal images, the calibration images, have the scores c_1 ... c_n. A new image with score s
has the p-value

    p = (1 + #{i: c_i >= s}) / (n + 1)

and is called anomalous where p <= alpha. If it is normal, and any order of the n + 1 images was
equally likely (they are exchangeable: the same product, camera and light, and none of them seen in
training), then that happens with probability at most alpha, whatever the distribution of the
scores. The probability is over new images and calibration images together; for a given calibration
the rate over many images varies around alpha, by about sqrt(alpha (1 - alpha) / n). Nothing is
promised of defects: how many are missed is for `rlr_fast.inference.evaluate` to measure.

With k the largest number for which k / (n + 1) <= alpha, p <= alpha is s > t, where t is the k-th
highest calibration score. Where alpha < 1 / (n + 1) there is no such k, and no image can be called
anomalous.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import betabinom, ks_2samp

# A folder without drift is told to have some this often.
_DRIFT_LEVEL = 0.001
MIN_DRIFT_IMAGES = 20
"""Fewer new images than these are not tested for drift."""
_SMALLEST_ALPHA = 1e-9


def check_alpha(alpha: float) -> float:
    """Return ``alpha`` itself.

    Raises:
        ValueError: It is not below 1, or so small that no set of images is large enough for it.
    """
    if not isinstance(alpha, Real) or not _SMALLEST_ALPHA <= alpha < 1:
        raise ValueError(f"alpha must be at least {_SMALLEST_ALPHA:g} and below 1, got {alpha=}")
    return alpha


def p_values(calibration: ArrayLike, scores: ArrayLike) -> NDArray[np.float64]:
    """Return the conformal p-values (m,) of new scores (m,).

    Args:
        calibration: Scores of the calibration images, (n,), in rising order.
        scores: Scores of new images, (m,).
    """
    known = np.asarray(calibration, dtype=np.float64)
    below = np.searchsorted(known, np.asarray(scores, dtype=np.float64), side="left")
    return (1 + len(known) - below) / (len(known) + 1)


def threshold(calibration: Sequence[float], alpha: float) -> float | None:
    """Return the score above which a new image's p-value is at most ``alpha``; None if nowhere.

    Args:
        calibration: Scores of the calibration images, (n,), in rising order.
        alpha: False-alarm rate, in (0, 1).
    """
    rank = _rank(len(calibration), alpha)
    return float(calibration[-rank]) if rank else None


def _rank(images: int, alpha: float) -> int:
    """Return the largest k with ``k / (images + 1) <= alpha``, rounded as p-values are."""
    rank = math.floor(alpha * (images + 1)) + 1
    while rank / (images + 1) > alpha:
        rank -= 1
    return rank


def images_needed(alpha: float) -> int:
    """Return how many calibration images the false-alarm rate ``alpha`` needs at least."""
    images = max(0, math.floor(1 / alpha) - 2)
    while not _rank(images, alpha):
        images += 1
    return images


def smallest_alpha(images: int) -> float:
    """Return the smallest false-alarm rate that so many images allow, rounded up to 4 digits."""
    return math.ceil(1e4 / (images + 1)) / 1e4


def drift(
    calibration: Sequence[float], scores: Sequence[float], alpha: float, tests: int = 1
) -> str | None:
    """Return in words how new images differ from the calibration images, or None.

    Scores at or below the k-th highest calibration score (of alpha; else the highest) are compared
    with the calibration's below it, by the two-sample test of Kolmogorov and Smirnov. If both are
    normal images, exchangeable, the two have one distribution, however many images lie above: so
    defects that are called anomalous do not count. Of tests without drift one in 1,000 reports one.

    It cannot tell drift from defects that score below the threshold, nor see drift of what the
    score does not measure. If all lies above, there is nothing left to compare; that more than half
    does is reported by itself, where it is as rare without drift.

    Args:
        calibration: Scores of the calibration images, (n,), in rising order.
        scores: Scores of new images, (m,).
        alpha: False-alarm rate, in (0, 1).
        tests: How many such tests share the error of one in 1,000.
    """
    rank = _rank(len(calibration), alpha)
    cut = max(1, rank)
    known, new = np.asarray(calibration), np.asarray(scores)
    limit = known[-cut]
    bulk, seen = known[: len(known) - cut], new[new <= limit]
    if len(new) < MIN_DRIFT_IMAGES:
        return None
    above = len(new) - len(seen)
    # How often so many of m lie above the k-th highest of n without drift.
    by_chance = betabinom.sf(above - 1, len(new), cut, len(known) + 1 - cut)
    if 2 * len(seen) < len(new) and by_chance <= _DRIFT_LEVEL / tests:
        what = "threshold" if rank else "highest score of the calibration"
        return f"{above} of {len(new)} score above the {what}"
    if not (len(bulk) and len(seen)) or ks_2samp(bulk, seen).pvalue > _DRIFT_LEVEL / tests:
        return None
    way = "higher" if np.median(seen) > np.median(bulk) else "lower"
    return f"scores of normal images are {way} than in the calibration"
