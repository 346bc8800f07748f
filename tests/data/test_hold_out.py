"""Images kept out of training: which, how many, and of which classes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from rlr_fast.data import DataSet, Sample
from rlr_fast.data.hold_out import MIN_IMAGES, hold_out


def dataset(root="data", **counts):
    root = Path(root)
    train = {
        name: [Sample(root / name / f"train/good/{i:03d}.png", name, "good") for i in range(count)]
        for name, count in counts.items()
    }
    return DataSet(root, "mvtec", train, {name: [] for name in train})


def test_a_share_of_each_large_class_is_kept_out():
    data = dataset(small=MIN_IMAGES - 1, large=MIN_IMAGES, larger=103)
    held = hold_out(data, 0.2, seed=0)
    assert {name: len(samples) for name, samples in held.validation.items()} == {
        "large": 10,
        "larger": 21,
    }
    for name in data.classes:
        kept = [*held.train[name], *held.validation.get(name, [])]
        assert sorted(kept, key=lambda s: s.path) == data.train[name]
    assert held.test == data.test and hold_out(data, 0.0, seed=0) == data


def test_the_choice_is_that_of_seed_and_names_alone():
    data = dataset(bolt=50)
    held = hold_out(data, 0.2, seed=3).validation["bolt"]
    shuffled = dataclasses.replace(data, train={"bolt": data.train["bolt"][::-1]})
    assert set(hold_out(shuffled, 0.2, seed=3).validation["bolt"]) == set(held)
    moved = hold_out(dataset("elsewhere", bolt=50), 0.2, seed=3).validation["bolt"]
    assert [s.path.name for s in moved] == [s.path.name for s in held]
    assert set(hold_out(data, 0.2, seed=4).validation["bolt"]) != set(held)
    assert held != data.train["bolt"][:10]


def test_validation_images_of_a_layout_are_taken_instead():
    data = dataset(bolt=50, nut=50)
    given = [Sample(Path("data/bolt/validation/good/0.png"), "bolt", "good")]
    data = dataclasses.replace(data, validation={"bolt": given, "nut": []})
    held = hold_out(data, 0.2, seed=0)
    assert held.validation["bolt"] == given and len(held.train["bolt"]) == 50
    assert len(held.validation["nut"]) == 10


@pytest.mark.parametrize(("share", "stay"), [(0.5, MIN_IMAGES // 2), (1.0, 1)])
def test_an_image_stays_to_train_on(share, stay):
    assert len(hold_out(dataset(bolt=MIN_IMAGES), share, seed=0).train["bolt"]) == stay
