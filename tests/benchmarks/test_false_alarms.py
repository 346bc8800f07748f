"""The promised false-alarm rate holds over random splits, and the measurement can find more."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.false_alarms import measure, read_results, simulated, table
from rlr_fast.inference import decisions


@pytest.mark.parametrize("images", [40, 160])
def test_false_alarms_are_at_most_alpha_per_class_and_pooled(images):
    found = measure(simulated(images), {}, (0.05, 0.1), splits=300)
    assert len(found) == 2 * (5 + 1)
    assert all(each.holds and each.false_alarms is not None for each in found)
    # Of scores without ties, as many as promised are used, but for the step of 1 / (n + 1).
    for each in found:
        if each.group != "all" and each.group != "ties":
            step = 1 / (each.images + 1)
            assert each.false_alarms > each.alpha - step - 4 * each.error


def test_a_threshold_that_promises_too_much_is_found(monkeypatch):
    def naive(calibration, alpha):
        return float(np.quantile(calibration, 1 - alpha))

    monkeypatch.setattr(decisions, "threshold", naive)
    found = measure(simulated(40), {}, (0.05,), splits=300)
    assert not all(each.holds for each in found)


def test_too_few_images_are_not_decided():
    found = measure(simulated(20), {}, (0.01,), splits=2)
    assert all(each.false_alarms is None for each in found)
    assert "| light | per class | 10 | 1.00 | - | - | - |" in table(found)


def test_results_of_predict_are_read(tmp_path):
    rows = ["path,score,class", "a/test/good/0.png,1.5,a", "a/test/hole/0.png,3,a"]
    (tmp_path / "results.csv").write_text("\n".join(rows))
    normal, defects = read_results(tmp_path / "results.csv")
    assert normal["a"].tolist() == [1.5] and defects["a"].tolist() == [3.0]
