"""The callable for clusters: it gives what prediction gives, wherever it is sent."""

from __future__ import annotations

import csv
import math
import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import save_picture
from PIL import Image
from training_cases import run_record

from rlr_fast import RLRModel, Scorer
from rlr_fast.config import InferenceExecution
from rlr_fast.data import load_image
from rlr_fast.inference import scorer as scorer_module
from rlr_fast.inference.decisions import Decider
from rlr_fast.pictures.batches import load_model
from rlr_fast.prediction.image_files import find_images
from rlr_fast.prediction.predict import predict
from rlr_fast.training.calibration import (
    Calibration,
    ClassScores,
    read_calibration,
    scoring_identity,
    write_calibration,
)

CPU = InferenceExecution(device="cpu", batch_size=2)


@pytest.fixture
def files(tmp_path):
    for i in range(5):
        save_picture(tmp_path / "images/bolt" / f"{i}.png", i, (96, 80) if i % 2 else (48, 64))
    return sorted((tmp_path / "images/bolt").iterdir())


@pytest.fixture
def run(small, files, tmp_path):
    """A checkpoint whose calibration calls the pictures of the highest scores anomalous."""
    model = RLRModel(small).eval()
    model.save_pretrained(tmp_path / "run")
    with torch.no_grad():
        images = torch.stack([load_image(file, small.image_size) for file in files])
        middle = float(model(images).score.sort().values[2:4].mean())
    scores = [(middle - i / 1e6, middle, str(i)) for i in range(19)]
    calibration = Calibration(
        scoring_identity(model), {"bolt": ClassScores.of(scores, "validation")}
    )
    write_calibration(tmp_path / "run", calibration, {})
    return tmp_path / "run"


def table(run, files, tmp_path, alpha):
    """What prediction says of them, by column."""
    found = find_images([*files]).classified(["bolt"])
    decider = Decider(read_calibration(run), alpha)
    model = RLRModel.from_pretrained(run)
    written = predict(model, found, tmp_path / "out", None, CPU, decider=decider).results
    with open(written, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_paths_and_arrays_give_the_rows_of_prediction(run, files, tmp_path):
    rows = table(run, files, tmp_path, 0.1)
    scorer = Scorer(run, CPU, alpha=0.1, maps=True)
    classes = np.array(["bolt"] * 5)
    by_path = scorer({"path": np.array([*map(str, files)]), "class": classes, "id": np.arange(5)})
    images = np.empty(5, dtype=object)
    images[:] = [np.asarray(Image.open(file)) for file in files]
    by_image = scorer({"image": images, "class": classes})
    assert by_path.keys() == by_image.keys() | {"path", "id", "failure"}
    assert by_path["score_map"].shape == (5, 48, 64) and "image" not in by_image
    np.testing.assert_array_equal(by_path["id"], np.arange(5))
    assert by_path["failure"].tolist() == [None] * 5
    for given in (by_path, by_image):
        assert given["score"].tolist() == pytest.approx([float(r["score"]) for r in rows])
        assert given["p_value"].tolist() == pytest.approx([float(r["p_value"]) for r in rows])
        assert given["threshold"].tolist() == pytest.approx([float(r["threshold"]) for r in rows])
        decided = ["anomalous" if a else "normal" for a in given["anomalous"]]
        assert decided == [row["decision"] for row in rows] and len(set(decided)) == 2


def test_an_array_of_equal_images_is_taken_as_it_is(run):
    images = np.random.default_rng(0).integers(0, 256, (3, 48, 64, 3), dtype=np.uint8)
    scorer = Scorer(run, CPU)
    together = scorer({"image": images})
    apart = [scorer({"image": images[i : i + 1]})["score"][0] for i in range(3)]
    assert together.keys() == {"score", "failure"} and not together["failure"].any()
    assert together["score"].tolist() == pytest.approx(apart)
    assert scorer({"image": images[:0]})["score"].shape == (0,)


def test_it_is_pickled_without_its_model_and_may_go_elsewhere(run, files, tmp_path, monkeypatch):
    monkeypatch.chdir(run.parent)
    scorer = Scorer(run.name, CPU, alpha=0.1)
    monkeypatch.chdir(tmp_path)
    batch = {"path": [str(file) for file in files]}
    before = scorer(batch)
    sent = pickle.dumps(scorer)
    assert len(sent) < 20_000
    after = pickle.loads(sent)(batch)
    assert before.keys() == after.keys()
    np.testing.assert_array_equal(before["score"], after["score"])
    np.testing.assert_array_equal(before["anomalous"], after["anomalous"])


def test_what_cannot_be_read_or_decided_says_so_in_its_row(run, files, tmp_path):
    (tmp_path / "broken.png").write_text("no picture")
    paths = [str(files[0]), str(tmp_path / "broken.png"), str(files[1]), str(tmp_path / "none.png")]
    given = Scorer(run, CPU, alpha=0.1, maps=True)(
        {"path": paths, "class": ["bolt", "bolt", "nut", "bolt"]}
    )
    assert [math.isnan(score) for score in given["score"]] == [False, True, False, True]
    assert [failure is None for failure in given["failure"]] == [True, False, True, False]
    assert "broken.png" in given["failure"][1] and "none.png" in given["failure"][3]
    assert given["anomalous"].tolist()[1:] == [None, None, None]
    assert np.isnan(given["score_map"][[1, 3]]).all()


def test_too_few_calibration_images_give_a_p_value_alone(run, files):
    given = Scorer(run, CPU, alpha=0.01)({"path": [str(files[0])], "class": ["bolt"]})
    assert 0 < given["p_value"][0] <= 1
    assert math.isnan(given["threshold"][0]) and given["anomalous"][0] is None


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({}, r"either a column 'path' or one 'image', got \[\]"),
        ({"path": ["a"], "image": [0]}, r"either a column 'path' or one 'image'"),
        ({"path": ["a"], "class": ["b", "c"]}, "one length, got {'path': 1, 'class': 2}"),
        ({"image": np.zeros((1, 4, 4, 3))}, r"got \(4, 4, 3\) of float64 in row 0"),
        ({"image": np.zeros((1, 3, 4, 4), np.uint8)}, r"image must be \(h, w, 3\) of uint8"),
        ({"path": "one.png"}, "column 'path' of batch must have a value per row, got 'one.png'"),
        ({"path": ["a"], "class": 7}, "column 'class' of batch must have a value per row, got 7"),
        ({"path": ["a"], "class": [7]}, "class must be a name, got 7 in row 0"),
        ([np.zeros((4, 4, 3), np.uint8)], "batch must be a dict of columns, got one of list"),
    ],
    ids=[
        *("nothing", "both", "lengths", "dtype", "channels"),
        *("one-path", "one-class", "no-name", "no-columns"),
    ],
)
def test_a_wrong_batch_is_refused(run, batch, message):
    with pytest.raises(ValueError, match=message):
        Scorer(run, CPU, alpha=0.1)(batch)


def test_a_wrong_scorer_is_refused_where_it_is_made(run, small, tmp_path):
    RLRModel(small).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="other has no calibration: rlr-fast calibrate"):
        Scorer(tmp_path / "other", alpha=0.1)
    with pytest.raises(ValueError, match="alpha must be"):
        Scorer(run, alpha=2.0)
    with pytest.raises(ValueError, match=r"alpha must be .* got alpha='0\.05'"):
        Scorer(run, alpha="0.05")
    with pytest.raises(ValueError, match="pool decides images and needs alpha"):
        Scorer(run, pool=True)
    with pytest.raises(ValueError, match="execution must be an InferenceExecution, got exec"):
        Scorer(run, {"device": "cpu"})
    with pytest.raises(ValueError, match="run must be a folder or a name, got run=None"):
        Scorer(None)


def test_a_class_that_nobody_knows_is_told_once(run, files, caplog):
    scorer = Scorer(run, CPU, alpha=0.1)
    batch = {"path": [str(files[0])] * 3, "class": [b"bolt", "bold", "nan"]}
    given = [scorer(batch) for _ in range(2)]
    assert [x is None for x in given[0]["anomalous"]] == [False, True, True]
    told = [record.getMessage() for record in caplog.records if "no class" in record.getMessage()]
    assert [line.partition("has ")[2] for line in told] == [
        "no class 'bold', and does not decide its images; did you mean 'bolt'? known: bolt",
        "no class 'nan', and does not decide its images; known: bolt",
    ]


def test_threads_load_one_model(run, files, monkeypatch):
    loaded = []
    monkeypatch.setattr(
        scorer_module, "load_model", lambda *args: loaded.append(load_model(*args)) or loaded[-1]
    )
    scorer = Scorer(run, CPU)
    with ThreadPoolExecutor(4) as pool:
        scores = [x["score"][0] for x in pool.map(scorer, [{"path": [str(files[0])]}] * 4)]
    assert len(loaded) == 1 and len(set(scores)) == 1


class NotAvailable:
    """As pandas.NA: it has a name, and compares with nothing."""

    def __repr__(self):
        return "<NA>"

    def __ne__(self, other):
        raise TypeError("boolean value of NA is ambiguous")


def test_a_missing_class_of_pandas_and_a_path_of_bytes_are_known(run, files):
    plain = Scorer(run, CPU, alpha=0.1)({"path": [str(files[0])] * 2, "class": [None, "bolt"]})
    given = Scorer(run, CPU, alpha=0.1)(
        {"path": [os.fsencode(files[0])] * 2, "class": np.array([math.nan, "bolt"], dtype=object)}
    )
    listed = Scorer(run, CPU, alpha=0.1)({"path": [str(files[0])] * 2, "class": [math.nan, "bolt"]})
    for name in ("score", "p_value", "anomalous"):
        assert given[name].tolist() == plain[name].tolist() == listed[name].tolist()
        assert None not in given[name]


@pytest.mark.parametrize("as_list", [False, True])
@pytest.mark.parametrize("nothing", [None, math.nan])
def test_a_row_without_a_path_is_a_failure_of_its_own(run, files, nothing, as_list):
    scorer = Scorer(run, CPU, maps=True)
    whole = scorer({"path": [str(path) for path in files[:2]]})
    paths = [nothing, str(files[0]), nothing, str(files[1])]
    given = scorer({"path": paths if as_list else np.array(paths, dtype=object)})
    assert given["score"][[1, 3]].tolist() == whole["score"].tolist()
    np.testing.assert_array_equal(given["score_map"][[1, 3]], whole["score_map"])
    assert np.isnan(given["score"][[0, 2]]).all()
    assert given["failure"].tolist() == [f"row 0: no path, but {nothing}", None,
                                         f"row 2: no path, but {nothing}", None]  # fmt: skip


def test_a_run_that_was_stopped_before_its_end_is_told(run, caplog):
    Scorer(run)
    assert not caplog.records
    (run / "run.json").write_text(run_record("/nowhere", ["bolt"]))
    (run / "calibration.json").unlink()  # as training leaves it that is killed
    Scorer(run)
    assert f"{run} was not trained to its end" in caplog.text


def test_scores_that_are_not_the_calibrations_are_not_decided(run):
    scorer = Scorer(run, InferenceExecution(device="cpu", precision="bf16"), alpha=0.1)
    with pytest.raises(ValueError, match="precision was fp32, now bf16"):
        scorer({"image": np.zeros((1, 8, 8, 3), np.uint8)})


def test_ray_gives_the_scores_of_prediction(run, files, tmp_path):
    ray = pytest.importorskip("ray", reason="a cluster of two workers needs Ray")
    pytest.importorskip("ray.data", reason="Ray Data needs PyArrow and pandas")
    rows = table(run, files, tmp_path, 0.1)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        paths = [{"path": str(file), "class": "bolt"} for file in files]
        scored = ray.data.from_items(paths).repartition(2)
        scored = scored.map_batches(Scorer(run, CPU, alpha=0.1), batch_size=2)
        found = {row["path"]: row for row in scored.take_all()}
    finally:
        ray.shutdown()
    assert found.keys() == {row["path"] for row in rows}
    for row in rows:
        assert found[row["path"]]["score"] == pytest.approx(float(row["score"]))
        assert found[row["path"]]["anomalous"] == (row["decision"] == "anomalous")


def test_an_image_without_a_finite_score_is_a_failure(run, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (2, 48, 64, 3), dtype=np.uint8)
    scorer = Scorer(run, CPU, alpha=0.1, maps=True)
    assert scorer({"image": images[:0]})["score_map"].shape[0] == 0
    forward = RLRModel.forward

    def broken(self, batch):
        out = forward(self, batch)
        out.score[0] = math.nan
        return out

    monkeypatch.setattr(RLRModel, "forward", broken)
    found = scorer({"image": images})
    assert math.isnan(found["score"][0]) and "row 0: its score is not finite" in found["failure"][0]
    assert math.isnan(found["p_value"][0]) and found["anomalous"][0] is None
    assert found["failure"][1] is None and found["anomalous"][1] is not None
