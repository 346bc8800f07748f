"""Decisions: which scores decide which image, what is marked, and what is said where none can."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from rlr_fast.data.images import resize_mask
from rlr_fast.inference.decisions import Decider, Decision
from rlr_fast.training.calibration import Calibration, ClassScores


def scores(*values, highest=10.0):
    return ClassScores.of(((v, v + highest, f"file {v}") for v in values), "test")


def calibration(scoring=None, **classes):
    return Calibration(scoring or {"top_share": 0.0}, classes)


def test_a_class_is_decided_by_its_own_scores_and_an_unknown_one_by_all():
    decider = Decider(calibration(a=scores(*range(9)), b=scores(*range(100, 109))), 0.1)
    assert decider.rule("a").threshold == 8 and decider.rule("b").threshold == 108
    assert decider.rule(None).name is None and decider.rule(None).threshold == 108
    assert decider.rule("a").pixel_threshold == 18
    assert decider.rule("c") is None
    pooled = Decider(calibration(a=scores(*range(9)), b=scores(*range(100, 109))), 0.1, pool=True)
    assert pooled.rule("a") is pooled.rule("b") is pooled.rule(None)
    assert pooled.rule("c") is None  # of what the pool does not hold, it promises nothing


def test_pooled_scores_count_in_the_units_of_their_classes():
    units = {"a": 2.0, "b": 200.0}
    classes = {"a": scores(0, 1, 2, 3, highest=1), "b": scores(0, 50, 100, 350, 450, highest=100)}
    decider = Decider(calibration(**classes), 0.1, pool=True, units=units)
    a, b = decider.rule("a"), decider.rule("b")
    assert (a.threshold, b.threshold) == (4.5, 450) and (a.name, b.name) == (None, None)
    assert (a.pixel_threshold, b.pixel_threshold) == (5.5, 550)
    assert a.scores is b.scores and a.decide(3.4, [[0.0]]).p_value == 0.3
    assert b.decide(340, [[0.0]]).p_value == 0.3
    assert decider.rule(None).threshold == 450  # whose unit is not known
    own = decider.own_rule("a")  # for drift: a class is no sample of the pool
    assert (own.name, own.unit, len(own.scores.image)) == ("a", 1.0, 4)
    assert decider.own_rule(None) is decider.rule(None) and decider.own_rule("c") is None
    alone = Decider(calibration(**classes), 0.1, pool=True, units={"a": 2.0})
    assert alone.rule("a") is alone.rule("b") and alone.rule("a").threshold == 450
    small = Decider(calibration(**classes), 0.1, pool=True, units={"a": 0.5, "b": 50.0})
    assert (small.rule("a").threshold, small.rule("b").threshold) == (4.5, 450)


def test_image_and_pixels_are_decided():
    rule = Decider(calibration(a=scores(*range(9))), 0.1).rule("a")
    score_map = np.zeros((4, 6), dtype=np.float32)
    normal = rule.decide(8.0, score_map)
    assert (normal.p_value, normal.anomalous, normal.area) == (0.2, False, 0.0)
    assert normal.box((40, 60)) is None
    score_map[0, 0], score_map[1, 2:4] = 18, 19  # the first is not above the threshold
    found = rule.decide(8.5, score_map)
    assert (found.p_value, found.anomalous, found.threshold) == (0.1, True, 8.0)
    assert found.area == 2 / 24 and found.box((40, 60)) == (20, 10, 20, 10)
    assert rule.scale(8.0) == (8.0, 28.0) and rule.scale(18.0) is None


@pytest.mark.parametrize("size", [(24, 32), (100, 37), (25, 333), (12, 16)], ids=str)
def test_the_box_is_that_of_the_mask_in_the_size_of_the_file(size):
    rng = np.random.default_rng(0)
    for _ in range(20):
        mask = np.zeros((24, 32), dtype=bool)
        top, left = rng.integers(0, 20), rng.integers(0, 28)
        mask[top : top + 4, left : left + 4] = True
        x, y, width, height = Decision(0.0, 0.0, True, mask).box(size)
        shown = Image.fromarray(resize_mask(mask, size))
        assert shown.getbbox() == (x, y, x + width, y + height)


def test_a_mark_between_the_pixels_of_a_small_file_has_a_box():
    mask = np.zeros((24, 32), dtype=bool)
    mask[23, 31] = True
    assert Decision(0.0, 0.0, True, mask).box((3, 4)) == (3, 2, 1, 1)
    mask = np.zeros((24, 32), dtype=bool)
    mask[5, 13] = True
    assert Decision(0.0, 0.0, True, mask).box((3, 4)) == (1, 0, 1, 1)


def test_too_few_images_give_p_values_and_a_line_that_says_what_would_do():
    decider = Decider(calibration(a=scores(*range(8)), b=scores(*range(30))), 0.05)
    decision = decider.rule("a").decide(99.0, np.zeros((2, 2)))
    assert decision.p_value == 1 / 9 and decision.threshold is None
    assert decision.anomalous is decision.mask is decision.area is decision.box((2, 2)) is None
    assert decider.undecided(["b"]) is None
    assert decider.undecided(["a", "b"]) == (
        "alpha=0.05 needs 19 calibration images, there are 8 of a; possible is --alpha 0.1112 or "
        "more, or --pool (all 38 together)"
    )
    assert "no calibration images of c" in decider.undecided(["c"])
    assert Decider(calibration(a=scores(*range(8))), 0.1112).undecided(["a"]) is None
    assert "--pool" not in Decider(calibration(a=scores(1, 2)), 0.05).undecided(["a"])
    few = Decider(calibration(a=scores(*range(9)), b=scores(*range(9))), 0.05)
    assert "--pool" not in few.undecided(["a", "b"])  # 18 are too few, too
    just = Decider(calibration(a=scores(*range(9)), b=scores(*range(10))), 0.05)
    assert "or --pool (all 19 together)" in just.undecided(["a", "b"])


def test_scores_of_another_kind_are_refused_by_name():
    decider = Decider(calibration({"top_share": 0.0, "tile": None}, a=scores(1)), 0.5)
    decider.check_scoring({"top_share": 0.0, "tile": None})
    with pytest.raises(
        ValueError, match=r"other scores \(tile was None, now \[64, 64\]; top_share"
    ):
        decider.check_scoring({"top_share": 0.5, "tile": [64, 64]})


def test_alpha_is_checked():
    with pytest.raises(ValueError, match="alpha must be"):
        Decider(calibration(a=scores(1)), 1.0)


def test_threshold_and_p_value_of_a_pool_agree_to_the_last_bit():
    rng = np.random.default_rng(0)
    for _ in range(50):
        units = {"a": float(rng.uniform(0.1, 9)), "b": float(rng.uniform(0.1, 9))}
        values = {name: unit * rng.uniform(0, 1, 12) for name, unit in units.items()}
        classes = {name: scores(*map(float, of)) for name, of in values.items()}
        decider = Decider(calibration(**classes), 0.2, pool=True, units=units)
        for name, of in values.items():
            rule = decider.rule(name)
            above = np.nextafter(np.append(of, rule.threshold), np.inf)
            for score in (*of, rule.threshold, *above):
                assert (rule.p_values(score) <= 0.2) == (score > rule.threshold)
