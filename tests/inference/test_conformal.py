"""Conformal decisions: p-values as defined, thresholds that agree with them, and drift."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import ks_2samp

from rlr_fast.inference.conformal import (
    MIN_DRIFT_IMAGES,
    check_alpha,
    drift,
    images_needed,
    p_values,
    smallest_alpha,
    threshold,
)


@pytest.mark.parametrize("digits", [8, 1, 0], ids=["no-ties", "some-ties", "many-ties"])
def test_p_values_are_those_of_the_definition_and_thresholds_decide_alike(digits):
    rng = np.random.default_rng(digits)
    for images in (1, 2, 9, 19, 20, 57):
        known = np.sort(np.round(rng.normal(size=images), digits))
        scores = np.concatenate([np.round(2 * rng.normal(size=50), digits), known])
        expected = np.array([(1 + (known >= s).sum()) / (images + 1) for s in scores])
        np.testing.assert_array_equal(p_values(known, scores), expected)
        # Every p-value that can occur, and rates between them.
        for alpha in [k / (images + 1) for k in range(1, images + 1)] + [0.003, 0.05, 0.29, 0.99]:
            limit = threshold(known.tolist(), alpha)
            above = scores > limit if limit is not None else np.zeros(len(scores), bool)
            np.testing.assert_array_equal(above, expected <= alpha)


def test_no_threshold_without_enough_images():
    assert [images_needed(alpha) for alpha in (0.5, 0.1, 0.05, 0.01, 0.001)] == [1, 9, 19, 99, 999]
    for alpha in (0.3, 0.1, 0.05, 0.07, 1 / 9):
        needed = images_needed(alpha)
        assert threshold([0.0] * needed, smallest_alpha(needed)) == 0
        assert (
            threshold([0.0] * needed, alpha) == 0 and threshold([0.0] * (needed - 1), alpha) is None
        )
    assert [smallest_alpha(images) for images in (2, 9, 19, 99)] == [0.3334, 0.1, 0.05, 0.01]


@pytest.mark.parametrize("alpha", [0, 1e-309, 1, -0.1, 5, float("nan"), "0.1"])
def test_alpha_is_a_share(alpha):
    assert check_alpha(1e-9) == 1e-9
    with pytest.raises(ValueError, match="alpha must be at least 1e-09 and below 1"):
        check_alpha(alpha)


@pytest.mark.parametrize("alpha", [0.05, 0.2])
def test_defects_above_the_threshold_are_no_drift(alpha):
    rng = np.random.default_rng(0)
    reported = [
        drift(
            sorted(rng.gamma(3, size=60)),
            [*rng.gamma(3, size=100), *rng.uniform(50, 90, size=25)],
            alpha,
        )
        for _ in range(300)
    ]
    assert sum(line is not None for line in reported) <= 3  # one in 1,000 is expected


@pytest.mark.parametrize(("factor", "way"), [(0.7, "lower"), (1.3, "higher")])
def test_a_drift_of_normal_scores_is_told_with_its_direction(factor, way):
    rng = np.random.default_rng(0)
    known, new = sorted(rng.gamma(9, size=100)), factor * rng.gamma(9, size=200)
    assert way in drift(known, [*new, *[99.0] * 50], 0.05)
    assert drift(known, new[: MIN_DRIFT_IMAGES - 1], 0.05) is None


def test_a_folder_that_lies_above_the_threshold_is_told():
    known = [i / 100 for i in range(100)]
    assert drift(known, [5.0] * 30 + [0.5] * 10, 0.05) == "30 of 40 score above the threshold"
    spread = [i / 10 for i in range(10)]
    assert drift(known, [5.0] * 11 + spread[:9], 0.05) == "11 of 20 score above the threshold"
    assert drift(known, [5.0] * 10 + spread, 0.05) is None
    # The threshold itself, 0.95, is not above it.
    told = drift(known, [0.95] * 11 + spread[:9], 0.05)
    assert told == "scores of normal images are higher than in the calibration"


def test_it_is_as_rare_without_drift_that_a_folder_lies_above():
    """Of the 1,771 orders of 3 known scores among 20 new ones, the known come first in one."""
    told = drift([1.0, 2.0, 3.0], [5.0] * 20, 0.05)
    assert told == "20 of 20 score above the highest score of the calibration"
    # In 4 of them at most one new score is below the highest known.
    assert drift([1.0, 2.0, 3.0], [5.0] * 19 + [0.5], 0.05) is None


def test_several_tests_share_the_error():
    assert drift([1.0, 2.0, 3.0], [5.0] * 20, 0.05, tests=2) is None  # 1 / 1,771 is above 1 / 2,000
    known, lower = [i / 100 for i in range(100)], [i / 50 for i in range(25)]
    p_value = ks_2samp(known[:95], lower).pvalue
    assert 2e-5 < p_value < 5e-4
    assert drift(known, lower, 0.05, tests=2) is not None
    assert drift(known, lower, 0.05, tests=50) is None


@pytest.mark.parametrize("images", [1, 2, 3, 8, 19])
def test_few_calibration_images_tell_no_drift_where_there_is_none(images):
    rng = np.random.default_rng(images)
    told = [drift(sorted(rng.normal(size=images)), rng.normal(size=40), 0.05) for _ in range(500)]
    assert sum(line is not None for line in told) <= 3  # one in 1,000 is expected
