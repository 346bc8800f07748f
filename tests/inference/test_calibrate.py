"""Calibration after training: which images it takes, and what it leaves in the checkpoint."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
from conftest import SMALL, save_picture

from rlr_fast import RLRModel, TrainConfig
from rlr_fast.cli import main
from rlr_fast.config import InferenceExecution, Tiles, TrainExecution
from rlr_fast.data import load_image, read_dataset
from rlr_fast.data.contents import describe_images
from rlr_fast.data.hold_out import hold_out
from rlr_fast.inference.calibrate import calibrate, calibration_images
from rlr_fast.training.calibration import color_scale, read_calibration
from rlr_fast.training.train import train


@pytest.fixture
def model(small):
    return RLRModel(small).eval()


def paths(images):
    return {name: [s.path for s in samples] for name, samples in images.items()}


def run_on(data, share=0.0):
    recipe = {"calibration_share": share, "seed": 0}
    return {"recipe": recipe, "data": describe_images(data, data.train)}


def test_images_that_training_took_are_refused_and_those_it_kept_out_are_taken(tmp_path):
    for i in range(50):
        save_picture(tmp_path / "set/bolt" / f"{i:02d}.png", i)
    data = read_dataset(tmp_path / "set")
    held = hold_out(data, 0.2, 0)
    assert calibration_images(data, run_on(data, 0.2)) == held.validation
    with pytest.raises(ValueError, match="was trained on all of them"):
        calibration_images(data, run_on(data))
    with pytest.raises(ValueError, match="was trained on the images of"):
        calibration_images(data, run_on(data), "train")
    save_picture(tmp_path / "set/bolt/50.png", 50)
    other = read_dataset(tmp_path / "set")
    assert calibration_images(other, run_on(data)) == calibration_images(other, None) == other.train


def test_a_split_is_named_where_there_is_a_choice(dataset):
    with pytest.raises(ValueError, match="say by --split train or test"):
        calibration_images(dataset, None)
    assert calibration_images(dataset, None, "train") == dataset.train
    test = calibration_images(dataset, run_on(dataset), "test")
    assert {name: [s.defect for s in samples] for name, samples in test.items()} == {
        "bolt": ["good"] * 2,
        "cloth": ["good"] * 2,
    }
    validation = {"bolt": dataset.train["bolt"][:1], "cloth": []}
    data = dataclasses.replace(dataset, validation=validation)
    assert calibration_images(data, None) == {"bolt": validation["bolt"]}


def test_scores_are_those_of_the_model_and_the_rest_of_the_file_stays(model, dataset, tmp_path):
    (tmp_path / "calibration.json").write_text('{"pixel": {"0.5": 1, "0.999": 2}, "more": 3}')
    images = paths(dataset.train)
    result, failures = calibrate(model, images, tmp_path, None, source="here")
    assert read_calibration(tmp_path) == result and not failures
    outs = [model(load_image(p, model.config.image_size)[None]) for p in images["bolt"]]
    bolt = result.classes["bolt"]
    assert bolt.image == pytest.approx(sorted(o.score.item() for o in outs), rel=1e-5)
    assert bolt.pixel == pytest.approx(sorted(o.score_map.max().item() for o in outs), rel=1e-5)
    assert bolt.source == "here" and color_scale(tmp_path) == (1, 7)
    assert json.loads((tmp_path / "calibration.json").read_text())["more"] == 3


def test_classes_without_new_images_keep_scores_of_the_same_kind(model, dataset, tmp_path):
    images = paths(dataset.train)
    first, _ = calibrate(model, images, tmp_path, None, source="first")
    low, high = color_scale(tmp_path)  # a checkpoint without a file has one now
    assert low < high
    few = {"bolt": images["bolt"][:2]}
    second, _ = calibrate(model, few, tmp_path, first, source="second")
    assert second.classes["cloth"] == first.classes["cloth"]
    assert len(second.classes["bolt"].image) == 2
    tiled, _ = calibrate(
        model, few, tmp_path, second, source="tiles", tiles=Tiles((32, 32), (4, 4))
    )
    assert list(tiled.classes) == ["bolt"] and tiled.scoring["tile"] == [32, 32]


def test_unreadable_images_are_left_out_and_a_class_of_them_is_refused(model, dataset, tmp_path):
    images = paths(dataset.train)
    images["bolt"][0].write_bytes(b"no image")
    result, failures = calibrate(model, images, tmp_path, None, source="x")
    assert len(result.classes["bolt"].image) == 4 and "000.png" in failures[0]
    before = (tmp_path / "calibration.json").read_bytes()
    with pytest.raises(ValueError, match=r"no image of bolt can be read: .*000\.png"):
        calibrate(
            model,
            {"bolt": images["bolt"][:1]},
            tmp_path,
            None,
            InferenceExecution(batch_size=2),
            source="x",
        )
    assert (tmp_path / "calibration.json").read_bytes() == before


def test_kept_out_copies_of_trained_images_are_left_out_and_told(tmp_path, capsys):
    root = tmp_path / "data"
    for i in range(50):
        save_picture(root / "bolt" / f"{i:02d}.png", i)
    held = hold_out(read_dataset(root), 0.2, 0)
    copy = held.validation["bolt"][0].path
    shutil.copy(held.train["bolt"][0].path, copy)
    data, recipe = read_dataset(root), TrainConfig(epochs=1, calibration_share=0.2)
    train(SMALL, recipe, data, tmp_path / "run", TrainExecution(cache="none"), quiet=True)
    command = ["calibrate", str(root), "--checkpoint", str(tmp_path / "run"), "--quiet"]
    capsys.readouterr()
    assert main(command) == 1
    told = capsys.readouterr()
    assert f"{copy}: the run was trained on a copy of it" in told.err.replace("'", "")
    assert len(read_calibration(tmp_path / "run").classes["bolt"].image) == 9
