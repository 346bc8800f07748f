"""The scores that a run keeps: of which images, and what a damaged file is told."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
from conftest import BRIEF, SMALL, make_tree

from rlr_fast import RLRModel
from rlr_fast.config import TrainExecution
from rlr_fast.data import load_image, read_dataset
from rlr_fast.data.hold_out import hold_out
from rlr_fast.inference.decisions import Decider
from rlr_fast.models.checkpoint import CheckpointError
from rlr_fast.training import score_fit
from rlr_fast.training.calibration import (
    Calibration,
    ClassScores,
    color_scale,
    pixel_quantiles,
    read_calibration,
    scoring_identity,
    trained_classes,
    with_later_settings,
    write_calibration,
)
from rlr_fast.training.train import train


def run(data, tmp_path, **options):
    execution = TrainExecution(device="cpu", cache_dir=tmp_path / "cache")
    recipe = dataclasses.replace(BRIEF, epochs=1, calibration_share=0.2)
    return train(SMALL, recipe, data, tmp_path / "run", execution, **{"quiet": True} | options)


def test_kept_out_images_are_not_trained_on_and_scored_as_prediction_does(tmp_path, capsys):
    data = read_dataset(make_tree(tmp_path / "data", ("bolt",), train=50))
    broken = hold_out(data, 0.2, BRIEF.seed).validation["bolt"][0]
    broken.path.write_bytes(b"no image")
    result = run(data, tmp_path, quiet=False)
    told = capsys.readouterr().err
    assert "40 images, classes: 1" in told
    assert "10 images not trained on, to calibrate decisions" in told
    assert [failure.error.path for failure in result.failures] == [broken.path]
    model = RLRModel.from_pretrained(tmp_path / "run")
    calibration = read_calibration(tmp_path / "run")
    assert calibration.scoring == scoring_identity(model)
    held = hold_out(data, 0.2, BRIEF.seed).validation["bolt"][1:]
    outs = [model(load_image(s.path, SMALL.image_size)[None]) for s in held]
    bolt = calibration.classes["bolt"]
    assert bolt.image == pytest.approx(sorted(o.score.item() for o in outs), rel=1e-5)
    assert bolt.pixel == pytest.approx(sorted(o.score_map.max().item() for o in outs), rel=1e-5)
    assert bolt.source == "held out" and len(set(bolt.files)) == 9


def test_small_classes_are_trained_on_whole_and_leave_no_scores_to_decide_by(
    dataset, tmp_path, capsys
):
    run(dataset, tmp_path, quiet=False)
    told = capsys.readouterr().err
    assert "10 images, classes: 2" in told
    assert "0 images not trained on" in told and "none of bolt, cloth (fewer than 50" in told
    assert read_calibration(tmp_path / "run") is None
    scores = json.loads((tmp_path / "run/calibration.json").read_text())["image"]["classes"]
    assert {n: {"max": v} for n, v in trained_classes(tmp_path / "run").items()} == scores
    assert color_scale(tmp_path / "run")


def test_validation_images_are_scored_at_any_share(dataset, tmp_path):
    validation = {"bolt": [s for s in dataset.test["bolt"] if not s.is_anomaly]}
    run(dataclasses.replace(dataset, validation=validation), tmp_path)
    classes = read_calibration(tmp_path / "run").classes
    assert list(classes) == ["bolt"] and classes["bolt"].source == "validation"


def test_a_score_field_changed_after_training_changes_the_identity():
    model = RLRModel(SMALL)
    before = scoring_identity(model)
    model.set_score(top_share=0.01)
    changed = {name for name, value in scoring_identity(model).items() if value != before[name]}
    assert changed == {"top_share"}
    assert scoring_identity(RLRModel(SMALL)) != before  # other weights


def test_copies_of_an_image_count_once(caplog):
    scores = ClassScores.of_files([(2.0, 5.0, "a"), (1.0, 6.0, "b"), (2.0, 5.0, "a")], "test")
    assert scores == ClassScores([1.0, 2.0], [5.0, 6.0], "test", ["a", "b"])
    assert [r.getMessage() for r in caplog.records] == [
        "1 copy among the images of test: each counts once"
    ]


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ({"bolt": 3}, "'bolt' of classes must be an object"),
        ({"bolt": {"image": [1.0], "pixel": [1.0], "files": ["a"]}}, "has no 'source'"),
        ({"bolt": {"image": [1], "pixel": [], "source": "", "files": []}}, "a score, a pixel and"),
        (
            {"bolt": {"image": [2, 1], "pixel": [1, 2], "source": "", "files": ["a", "b"]}},
            "the scores of 'bolt' must rise",
        ),
    ],
    ids=["no-object", "no-source", "uneven", "unsorted"],
)
def test_a_damaged_calibration_is_named(classes, message, tmp_path):
    values = {"pixel": {}, "calibration": {"scoring": {}, "classes": classes}}
    (tmp_path / "calibration.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"calibration\.json cannot be read: .*" + message):
        read_calibration(tmp_path)


def test_a_calibration_from_when_the_surround_changed_the_image_score_alone_is_refused(small):
    model = RLRModel(dataclasses.replace(small, surround=32.0))
    classes = {"bolt": ClassScores([1.0], [2.0], "validation", ["a"])}
    now = scoring_identity(model)
    then = {name: value for name, value in now.items() if name != "surround is subtracted from"}
    assert Calibration(now, classes).is_of(model) and not Calibration(then, classes).is_of(model)
    with pytest.raises(ValueError, match="surround is subtracted from was None, now the score map"):
        Decider(Calibration(then, classes), 0.5).check_scoring(now)


@pytest.mark.parametrize(
    ("name", "value"), [("surround", 32.0), ("image_surround", 32.0), ("align_corners", False)]
)
def test_a_calibration_from_before_a_setting_of_the_score_had_its_default(
    name, value, small, tmp_path
):
    model = RLRModel(small)
    scoring = scoring_identity(model)
    del scoring[name]
    calibration = Calibration(scoring, {"bolt": ClassScores([1.0], [2.0], "validation", ["a"])})
    write_calibration(tmp_path, calibration, {})
    read = read_calibration(tmp_path)
    assert read is not None and read.is_of(model)
    model.set_score(**{name: value})
    assert not read.is_of(model)


@pytest.mark.parametrize(
    "name", ["components", "patches", "surround", "image_surround", "uncertainty"]
)
def test_a_setting_that_came_later_has_its_default_in_what_was_written_before(name, small):
    scoring = scoring_identity(RLRModel(small))
    before = {key: value for key, value in scoring.items() if key != name}
    assert with_later_settings(before) == scoring == with_later_settings(scoring)


def test_a_run_without_the_file_has_no_calibration(tmp_path):
    assert read_calibration(tmp_path) is None and trained_classes(tmp_path) == {}


def test_a_copy_of_an_image_that_was_trained_on_calibrates_nothing(tmp_path):
    root = make_tree(tmp_path / "data", ("bolt",), train=50)
    held = hold_out(read_dataset(root), 0.2, BRIEF.seed)
    copy = held.validation["bolt"][3].path
    shutil.copy(held.train["bolt"][0].path, copy)
    result = run(read_dataset(root), tmp_path)
    assert [failure.error.path for failure in result.failures] == [copy]
    assert "was trained on a copy of it" in str(result.failures[0].error)
    assert len(read_calibration(tmp_path / "run").classes["bolt"].image) == 9


def test_the_scales_of_levels_rest_on_all_columns_of_the_grid(monkeypatch):
    monkeypatch.setattr(score_fit, "_SAMPLE", 1000)
    columns = score_fit._thinned(torch.arange(400 * 64) % 8)
    assert len(columns) == 1000
    assert (torch.bincount(columns, minlength=8) - 125).abs().max() <= 13
    few = torch.arange(1000)
    assert torch.equal(score_fit._thinned(few), few)


def test_quantiles_of_a_large_map_rest_on_no_more_pixels_than_is_said(monkeypatch):
    counts = []
    quantile = torch.quantile
    monkeypatch.setattr(torch, "quantile", lambda v, q: counts.append(len(v)) or quantile(v, q))
    for side in (512, 513, 1023, 1024):
        pixel_quantiles(torch.zeros(side, side))
    assert max(counts) == 512**2
