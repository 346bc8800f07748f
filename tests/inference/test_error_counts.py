"""False alarms and misses: what counts as which, and as neither."""

from __future__ import annotations

from rlr_fast.files import file_digest
from rlr_fast.inference.decisions import Decider
from rlr_fast.inference.error_counts import DecisionErrors, ErrorCounts, count_errors
from rlr_fast.training.calibration import Calibration, ClassScores


def rule(files, alpha=0.1):
    """A rule on nine images with the scores 0 to 8, the first of which are given files."""
    names = [file_digest(file) for file in files]
    names += [f"file {i}" for i in range(len(names), 9)]
    scores = ClassScores.of(((i, i, name) for i, name in enumerate(names)), "test")
    return Decider(Calibration({"top_share": 0.0}, {"a": scores}), alpha).rule("a")


def test_errors_are_counted_by_the_rule(tmp_path):
    files = [tmp_path / f"{i}.png" for i in range(7)]
    for file in files:
        file.write_text(file.name)
    # A score above 8 has a p-value of exactly alpha. The first normal image was calibrated on.
    scores = [9.0, 9.0, 8.0, 8.5, 7.0, 8.0, 9.0]
    labels = [False, False, False, False, True, True, True]
    counts = count_errors(rule(files[:1]), scores, labels, files)
    assert counts == ErrorCounts(9, 8.0, normal=3, false_alarms=2, anomalous=3, misses=2)
    assert (counts.false_alarm_rate, counts.miss_rate) == (2 / 3, 2 / 3)
    assert count_errors(rule([], alpha=0.05), scores, labels, files) is None


def test_a_rate_of_no_images_is_none():
    errors = DecisionErrors(
        0.1, False, {"a": ErrorCounts(9, 8.0, 0, 0, 2, 1), "b": ErrorCounts(9, 2.5, 4, 1, 0, 0)}
    )
    values = errors.to_dict()
    assert values["classes"]["a"]["false_alarm_rate"] is None
    assert values["classes"]["a"]["miss_rate"] == 0.5
    assert values["classes"]["b"]["miss_rate"] is None
    assert values["all"] == {
        "calibration_images": None, "threshold": None, "normal": 4, "false_alarms": 1,
        "false_alarm_rate": 0.25, "anomalous": 2, "misses": 1, "miss_rate": 0.5,
    }  # fmt: skip
    assert errors.table().splitlines() == [
        "decisions at alpha 0.1:",
        "class   threshold     false alarms           misses",
        "a               8                -  1 of 2 (50.0 %)",
        "b             2.5  1 of 4 (25.0 %)                -",
        "in all             1 of 4 (25.0 %)  1 of 2 (50.0 %)",
    ]
