"""The synthetic data set: reproducible bytes, exact masks, MVTec-AD's layout, safe restarts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rlr_fast.data import read_dataset
from rlr_fast.data.synthetic import CLASS_NAMES, DEFECT_KINDS, make, make_dataset, render_sample
from rlr_fast.data.synthetic.noise import Stream, smooth
from rlr_fast.data.synthetic.render import PRODUCTS
from rlr_fast.files import LOCK_FILE

SMALL = dict(size=48, train_per_class=2, good_per_class=1, defects_per_kind=1)
CASES = [(name, kind) for name in CLASS_NAMES for kind in PRODUCTS[name].kinds]


def contents(root: Path) -> dict[str, bytes]:
    files = (p for p in root.rglob("*") if p.is_file() and p.name != LOCK_FILE)
    return {str(p.relative_to(root)): p.read_bytes() for p in files}


def forbid_rendering(monkeypatch):
    def render(*args, **kwargs):
        raise AssertionError("rendered a picture of a complete set")

    monkeypatch.setattr(make, "render_sample", render)


def test_set_is_rich_enough():
    assert len(CLASS_NAMES) >= 10
    assert {kind for _, kind in CASES} == set(DEFECT_KINDS)
    assert all(len(PRODUCTS[name].kinds) >= 6 for name in CLASS_NAMES)
    assert all(len(set(p.kinds)) == len(p.kinds) for p in PRODUCTS.values())


def test_worker_count_changes_no_byte(tmp_path):
    options = dict(SMALL, classes=["circuit_board", "cloth"])
    one = contents(make_dataset(tmp_path / "one", workers=1, **options))
    three = contents(make_dataset(tmp_path / "three", workers=3, **options))
    assert one == three


def test_other_classes_and_more_pictures_change_no_picture(tmp_path):
    small = contents(make_dataset(tmp_path / "small", classes=["tile"], **SMALL))
    more = dict(SMALL, train_per_class=3, good_per_class=2, defects_per_kind=2)
    large = contents(make_dataset(tmp_path / "large", classes=["washer", "tile"], **more))
    del small["dataset.json"]
    assert small.items() <= large.items()


def test_seed_changes_every_picture(tmp_path):
    sets = [
        contents(make_dataset(tmp_path / str(seed), seed=seed, classes=["capsule"], **SMALL))
        for seed in (0, 1)
    ]
    assert all(sets[0][path] != sets[1][path] for path in sets[0] if "ground_truth" not in path)


def test_a_second_command_does_not_write_into_the_same_set(tmp_path):
    second = []

    def meet(done, total):
        with pytest.raises(BlockingIOError, match="another process works in"):
            make_dataset(tmp_path / "set", **few)
        second.append(done)

    few = {"size": 32, "train_per_class": 2, "classes": ["wood"]}
    make_dataset(tmp_path / "set", **few, progress=meet)
    assert second
    assert make_dataset(tmp_path / "set", **few) == tmp_path / "set"


def test_stream_does_not_use_salted_hash():
    # A value from another process: `hash` of a string would differ from run to run.
    assert Stream(0, "washer", "test", "scratch", 3).key == 4330893826817143163


def test_stream_tells_number_from_text_and_keeps_path_parts_apart():
    keys = {Stream(*path).key for path in [(1,), ("1",), ("a", "b"), ("ab",), ("b", "a")]}
    assert len(keys) == 5


def test_noise_value_does_not_depend_on_extent():
    near, far = np.linspace(-1, 1, 9), np.linspace(-7, 7, 57)
    inner = smooth(5, near, near)
    assert np.array_equal(inner, smooth(5, far, far)[24:33, 24:33])


@pytest.mark.parametrize(("name", "kind"), CASES, ids=lambda value: value)
def test_picture_differs_from_its_good_twin_inside_mask_only(name, kind):
    sample = render_sample(name, "test", kind, 0, size=(64, 64))
    changed = (sample.image != sample.good).any(axis=2)
    assert sample.mask.sum() >= 3
    assert not (changed & ~sample.mask).any()
    change = np.abs(sample.image.astype(int) - sample.good).max(axis=2)[sample.mask]
    assert np.quantile(change, 0.75) > 0.06 * 255, "hardly visible"
    # Tight as well as complete: a filled box around the defect would be mostly unchanged pixels.
    assert changed[sample.mask].mean() > 0.6


@pytest.mark.parametrize("name", CLASS_NAMES)
def test_good_picture_has_no_mask_and_varies(name):
    first, second = (render_sample(name, "train", "good", i, size=(48, 48)) for i in (0, 1))
    assert not first.mask.any()
    assert np.array_equal(first.image, first.good)
    assert (first.image != second.image).mean() > 0.5


def test_train_and_test_pictures_differ():
    pictures = [
        render_sample("wood", split, "good", 0, size=(48, 48)).image for split in ("train", "test")
    ]
    assert not np.array_equal(*pictures)


def test_severity_covers_subtle_to_obvious():
    drawn = [render_sample("wood", "test", "stain", i, size=(32, 32)).severity for i in range(8)]
    assert min(drawn) < 0.3
    assert max(drawn) > 0.7
    assert max(drawn) <= 1


@pytest.mark.parametrize("name", CLASS_NAMES)
def test_larger_picture_shows_the_same_object_and_defect(name):
    kind = PRODUCTS[name].kinds[1]
    small, other = (render_sample(name, "test", kind, i, size=(96, 96)) for i in (1, 2))
    large = render_sample(name, "test", kind, 1, size=(192, 192))
    shrunk = large.image.reshape(96, 2, 96, 2, 3).mean(axis=(1, 3))
    apart = np.abs(other.good.astype(float) - small.good).mean()
    assert np.abs(shrunk - small.image).mean() < 0.5 * apart
    share = large.mask.reshape(96, 2, 96, 2).mean(axis=(1, 3))
    overlap = np.minimum(share, small.mask).sum() / np.maximum(share, small.mask).sum()
    assert overlap > 0.5


@pytest.mark.parametrize("size", [(40, 72), (72, 40), (33, 47)], ids=["wide", "tall", "odd-sides"])
def test_non_square_picture_and_mask_have_the_size(size):
    for name, kind in (("washer", "missing_part"), ("tile", "crack"), ("circuit_board", "stain")):
        sample = render_sample(name, "test", kind, 0, size=size)
        assert sample.image.shape == (*size, 3)
        assert sample.mask.shape == size
        assert sample.mask.any()


def test_layout_is_mvtec(tmp_path):
    root = make_dataset(tmp_path / "set", classes=["hex_bolt"], **dict(SMALL, size=(40, 56)))
    kinds = PRODUCTS["hex_bolt"].kinds
    expected = {"hex_bolt/train/good/000.png", "hex_bolt/train/good/001.png"}
    expected |= {"hex_bolt/test/good/000.png", "dataset.json"}
    expected |= {f"hex_bolt/test/{kind}/000.png" for kind in kinds}
    expected |= {f"hex_bolt/ground_truth/{kind}/000_mask.png" for kind in kinds}
    assert set(contents(root)) == expected
    for path in root.rglob("*.png"):
        with Image.open(path) as image:
            assert image.size == (56, 40)
            assert image.mode == ("L" if path.stem.endswith("_mask") else "RGB")
            if image.mode == "L":
                assert set(np.unique(np.asarray(image))) == {0, 255}


def test_files_hold_the_rendered_sample(tmp_path):
    root = make_dataset(tmp_path / "set", seed=3, classes=["leather"], **SMALL)
    sample = render_sample("leather", "test", "hole", 0, size=(48, 48), seed=3)
    image = np.asarray(Image.open(root / "leather/test/hole/000.png"))
    mask = np.asarray(Image.open(root / "leather/ground_truth/hole/000_mask.png"))
    assert np.array_equal(image, sample.image)
    assert np.array_equal(mask > 0, sample.mask)


def test_manifest_is_no_class(tmp_path):
    root = make_dataset(tmp_path / "set", classes=["tile", "wood"], **SMALL)
    assert list(read_dataset(root).classes) == ["tile", "wood"]


def test_complete_set_is_left_alone(tmp_path, monkeypatch):
    root = make_dataset(tmp_path / "set", classes=["wood"], **SMALL)
    forbid_rendering(monkeypatch)
    assert make_dataset(root, classes=["wood"], **SMALL) == root


def test_interrupted_set_is_not_complete_and_is_made_again(tmp_path):
    options = dict(SMALL, classes=["wood"], workers=1)
    whole = contents(make_dataset(tmp_path / "whole", **options))
    root = tmp_path / "cut"

    def stop(done, total):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_dataset(root, progress=stop, **options)
    assert not (root / "dataset.json").exists()
    # As if the power had failed in the middle of a file.
    (root / "wood/train/good/000.png").write_bytes(b"\x89PNG")
    make_dataset(root, **options)
    assert contents(root) == whole


def test_lost_picture_is_made_again(tmp_path):
    root = make_dataset(tmp_path / "set", classes=["wood"], **SMALL)
    whole = contents(root)
    (root / "wood/ground_truth/hole/000_mask.png").unlink()
    make_dataset(root, classes=["wood"], **SMALL)
    assert contents(root) == whole


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed"),
        ({"size": 56}, "size"),
        ({"train_per_class": 3}, "train_per_class"),
        ({"classes": ["tile"]}, "classes"),
    ],
    ids=["other-seed", "other-size", "more-pictures", "other-classes"],
)
def test_another_set_is_refused_and_kept(tmp_path, change, named):
    options = dict(SMALL, classes=["wood"])
    root = make_dataset(tmp_path / "set", **options)
    before = contents(root)
    with pytest.raises(ValueError, match=rf"root must be empty.*differs in {named}:"):
        make_dataset(root, **{**options, **change})
    assert contents(root) == before


def test_set_of_another_version_is_refused(tmp_path):
    root = make_dataset(tmp_path / "set", classes=["wood"], **SMALL)
    manifest = json.loads((root / "dataset.json").read_text())
    manifest["version"] += 1
    (root / "dataset.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="differs in version:"):
        make_dataset(root, classes=["wood"], **SMALL)


def test_folder_with_other_files_is_refused_and_kept(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="root must be empty or hold this very set"):
        make_dataset(tmp_path, **SMALL)
    assert contents(tmp_path) == {"thesis.txt": b"years of work"}


def test_damaged_manifest_is_refused(tmp_path):
    (tmp_path / "dataset.json").write_text('{"seed": ')
    with pytest.raises(ValueError, match=r"damaged dataset\.json"):
        make_dataset(tmp_path, **SMALL)


def test_file_as_root_is_refused(tmp_path):
    path = tmp_path / "file"
    path.write_text("")
    with pytest.raises(NotADirectoryError, match="root must be a folder"):
        make_dataset(path, **SMALL)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "size must be .*at least 32, got size=0"),
        ({"size": (64, 31)}, r"size must be .*got size=\(64, 31\)"),
        ({"size": (64, 64, 3)}, "size must be .*height, width"),
        ({"size": 64.5}, "size must be an integer"),
        ({"seed": -1}, "seed must be .*got seed=-1"),
        ({"train_per_class": -1}, "train_per_class must be .*got train_per_class=-1"),
        ({"good_per_class": 1.5}, "good_per_class must be an integer"),
        ({"defects_per_kind": -2}, "defects_per_kind must be"),
        ({"classes": ["screw"]}, "out of bottle_cap, brushed_metal, .*got classes="),
        ({"classes": []}, "classes must name"),
        ({"classes": ["wood", "wood"]}, "classes must name each class once"),
        ({"workers": 0}, "workers must be positive or None, got workers=0"),
    ],
    ids=[
        "no-pixels",
        "one-side-too-small",
        "three-sides",
        "fractional-size",
        "negative-seed",
        "negative-count",
        "fractional-count",
        "negative-defects",
        "unknown-class-lists-the-known",
        "no-class",
        "class-twice",
        "no-worker",
    ],
)
def test_bad_argument_is_named_and_nothing_written(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_dataset(tmp_path / "set", **{**SMALL, **arguments})
    assert not (tmp_path / "set").exists()


def test_progress_counts_every_picture(tmp_path):
    calls = []
    make_dataset(
        tmp_path / "set",
        classes=["wood"],
        progress=lambda done, total: calls.append((done, total)),
        **SMALL,
    )
    total = 2 + 1 + len(PRODUCTS["wood"].kinds)
    assert calls == [(i, total) for i in range(1, total + 1)]
