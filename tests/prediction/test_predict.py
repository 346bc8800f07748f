"""Prediction: what is written, for which files, and what an error or an interruption leaves."""

from __future__ import annotations

import csv
import dataclasses
import errno
import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import save_picture
from PIL import Image

from rlr_fast import RLRModel
from rlr_fast.config import InferenceExecution
from rlr_fast.data import load_image
from rlr_fast.inference.decisions import Decider
from rlr_fast.pictures.tiling import predict_tiled
from rlr_fast.prediction import row_maker
from rlr_fast.prediction.image_files import find_images
from rlr_fast.prediction.predict import predict
from rlr_fast.prediction.results import COLUMNS
from rlr_fast.training.calibration import Calibration, ClassScores
from rlr_fast.visualization import prediction_picture
from rlr_fast.visualization.report import ReportWriter


@pytest.fixture
def model(small):
    return RLRModel(small).eval()


def rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def scores(result):
    """File → score, of those that have one, as the table says."""
    with open(result.results, newline="", encoding="utf-8") as file:
        found = [row for row in csv.DictReader(file) if not row["failure"]]
    return {Path(row["path"]): float(row["score"]) for row in found}


def test_pictures_of_an_earlier_prediction_of_other_files_are_told(model, tree, tmp_path, caplog):
    for kind, told in (("good", 0), ("good", 0), ("hole", 2)):
        caplog.clear()
        predict(model, find_images([tree / "bolt/test" / kind]), tmp_path / "out", None)
        assert ("what was drawn of 2 images stays there" in caplog.text) == bool(told)


def test_predict_writes_score_and_picture_of_each_file(model, tree, tmp_path):
    files = find_images([tree / "bolt/test"])
    result = predict(model, files, tmp_path / "out", (0.0, 2.0))
    table = rows(result.results)
    assert table[0] == list(COLUMNS) and len(table) == 5
    size = model.config.image_size
    for path, score, *undecided in table[1:]:
        assert not any(undecided)
        assert float(score) == pytest.approx(model(load_image(path, size)[None]).score.item())
    pictures = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.png")}
    assert pictures == {
        f"pictures/test/{kind}/{i:03d}.png" for kind in ("good", "hole") for i in range(2)
    }


def test_pictures_of_the_folder_above_stay_in_the_folder_of_pictures(tree, monkeypatch):
    monkeypatch.chdir(tree / "bolt/test/hole")
    names = {str(file.picture) for file in find_images([".."])}
    assert names == {f"test/{kind}/00{i}.png" for kind in ("good", "hole") for i in range(2)}
    assert {str(file.picture) for file in find_images(["."])} == {"000.png", "001.png"}


def test_an_image_without_a_finite_score_is_left_out_and_told(model, tree, tmp_path):
    with torch.no_grad():
        next(model.levels.parameters()).mul_(1e38)
    result = predict(model, find_images([tree / "bolt/test/hole"]), tmp_path / "out", None)
    assert result.scored == 0 and not any(row[1] for row in rows(result.results)[1:])
    assert all("its score is not finite" in failure for failure in result.failures)
    assert len(result.failures) == 2


def test_a_spreadsheet_runs_nothing_that_a_name_says(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["=1+1.png", "+1.png", "-1.png", "@SUM(1).png", "a.png"]
    for name in names:
        save_picture(tmp_path / name, 1)
    files = [dataclasses.replace(file, category="=HYPERLINK(1)") for file in find_images(names)]
    predict(model, files, tmp_path / "out", None)
    _, *table = rows(tmp_path / "out/results.csv")
    assert {row[0] for row in table} == {"a.png", *(f"./{name}" for name in names[:4])}
    assert {row[2] for row in table} == {"'=HYPERLINK(1)"}
    assert all((tmp_path / row[0]).exists() for row in table)  # the same file still
    lines = map(json.loads, (tmp_path / "out/results.jsonl").read_text().splitlines())
    assert {(line["path"], line["class"]) for line in lines} == {
        (n, "=HYPERLINK(1)") for n in names
    }


def test_a_picture_that_cannot_be_written_whole_is_not_there(model, tree, tmp_path, monkeypatch):
    def half(self, path, **_):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(OSError, match="No space left"):
        predict(model, find_images([tree / "bolt/test"]), tmp_path / "out", (0.0, 1.0))
    assert not [p for p in (tmp_path / "out/pictures").rglob("*") if p.is_file()]


def test_predict_skips_a_corrupt_file_among_fifty(model, tmp_path):
    for i in range(50):
        save_picture(tmp_path / "images" / f"{i:02d}.png", i)
    broken = tmp_path / "images/17.png"
    broken.write_bytes(broken.read_bytes()[:30])
    result = predict(model, find_images([tmp_path / "images"]), tmp_path / "out", None)
    assert result.scored == len(scores(result)) == 49 and broken not in scores(result)
    assert len(result.failures) == 1 and str(broken) in result.failures[0]
    table = rows(result.results)
    assert len(table) == 51 and table[18] == [str(broken), *[""] * 10, result.failures[0]]


def test_pictures_of_an_earlier_prediction_are_not_scored(model, tmp_path):
    save_picture(tmp_path / "images/a.png", 1)
    predict(model, find_images([tmp_path / "images"]), tmp_path / "images", (0.0, 1.0))
    files = find_images([tmp_path / "images"], tmp_path / "images")
    assert [f.path.name for f in files] == ["a.png"]


def test_no_image_is_written_over(model, tmp_path):
    image = tmp_path / "pictures/line1/a.png"
    save_picture(image, 1)
    before = image.read_bytes()
    with pytest.raises(ValueError, match="pictures' is of no prediction"):
        predict(model, find_images([image.parent]), tmp_path, (0.0, 1.0))
    assert image.read_bytes() == before


def test_files_of_one_name_do_not_share_a_picture(model, tmp_path):
    for name in ("a/x.png", "b/x.png", "a/x.bmp"):
        save_picture(tmp_path / name, 1)
    files = find_images([tmp_path / "a", tmp_path / "b", tmp_path / "a/x.png"])
    assert len(files) == 3
    predict(model, files, tmp_path / "out", (0.0, 1.0))
    assert len(list((tmp_path / "out").rglob("*.png"))) == 3


@pytest.fixture
def five(tmp_path):
    for i in range(5):
        save_picture(tmp_path / "images" / f"{i}.png", i)
    return find_images([tmp_path / "images"])


def test_a_picture_shows_the_image_its_map_and_both(model, five, tmp_path):
    predict(model, five, tmp_path / "out", (0.0, 2.0))
    for file in five:
        shown = np.asarray(Image.open(tmp_path / "out/pictures" / file.picture))
        np.testing.assert_array_equal(shown[:, :64], np.asarray(Image.open(file.path)))


def test_batch_size_changes_nothing_but_rounding(model, five, tmp_path):
    one = predict(model, five, tmp_path / "one", None, InferenceExecution(batch_size=1))
    three = predict(model, five, tmp_path / "three", None, InferenceExecution(batch_size=3))
    assert list(scores(one)) == list(scores(three)) == [file.path for file in five]
    assert list(scores(one).values()) == pytest.approx(list(scores(three).values()), rel=1e-5)


def test_bf16_is_near_fp32_and_not_the_same(model, five, tmp_path):
    full = scores(predict(model, five, tmp_path / "fp32", None)).values()
    half = scores(
        predict(model, five, tmp_path / "bf16", None, InferenceExecution(precision="bf16"))
    ).values()
    assert list(full) != list(half) and list(full) == pytest.approx(list(half), rel=0.05)


def test_tiles_give_rows_and_pictures_of_full_size(model, tmp_path):
    sizes = {"a": (100, 150), "b": (48, 64)}
    for seed, (name, size) in enumerate(sizes.items()):
        save_picture(tmp_path / f"images/{name}.png", seed, size)
    files = find_images([tmp_path / "images"])
    result = predict(model, files, tmp_path / "out", (0.0, 2.0), tile=(48, 64), overlap=16)
    for file in files:
        size = sizes[file.path.stem]
        expected = predict_tiled(model, load_image(file.path, size), (48, 64), 16)
        assert scores(result)[file.path] == pytest.approx(expected.score, rel=1e-5)
        shown = Image.open(tmp_path / "out/pictures" / file.picture)
        assert shown.height == size[0] and shown.width > 3 * size[1]


def test_a_picture_smaller_than_a_tile_is_a_failure_of_that_file(model, tmp_path):
    for name, size in {"large": (60, 70), "flat": (40, 200)}.items():
        save_picture(tmp_path / f"images/{name}.png", 1, size)
    files = find_images([tmp_path / "images"])
    result = predict(model, files, tmp_path / "out", None, tile=(48, 64))
    assert [path.stem for path in scores(result)] == ["large"]
    assert len(result.failures) == 1 and "flat.png" in result.failures[0]
    assert "40 x 200 pixels, less than a tile of 48 x 64" in result.failures[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"tile": 64, "overlap": 64}, "overlap must be", id="overlap"),
        pytest.param({"overlap": 8}, "overlap needs a tile", id="overlap-without-tile"),
        pytest.param({"batch_size": 0}, "batch_size must be positive", id="batch"),
        pytest.param({"workers": 0}, "workers must be positive", id="workers"),
        pytest.param({"precision": "fp8"}, "no choice 'fp8'", id="precision"),
        pytest.param({"device": "cuda"}, "device must be the model's, cpu", id="device"),
        pytest.param({"backend": "dense"}, "backend must be the model's, 'auto'", id="backend"),
        pytest.param({"compile": True}, "compile needs a compiled model", id="compile"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(
    model, five, tmp_path, options, message
):
    options = dict(options)
    with pytest.raises(ValueError, match=message):
        names = {field.name for field in dataclasses.fields(InferenceExecution)}
        execution = InferenceExecution(**{n: options.pop(n) for n in names & options.keys()})
        predict(model, five, tmp_path / "out", None, execution, **options)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_an_error_and_what_has_its_picture_stays(model, five, tmp_path, monkeypatch):
    draw, drawn = row_maker._draw, []

    def full(*args):
        drawn.append(args)
        if len(drawn) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        draw(*args)

    monkeypatch.setattr(row_maker, "_draw", full)
    with pytest.raises(OSError, match="No space left"):
        predict(
            model, five, tmp_path / "out", (0.0, 1.0), InferenceExecution(batch_size=1, workers=1)
        )
    assert len(rows(tmp_path / "out/results.csv")) == 3
    assert len(list((tmp_path / "out/pictures").rglob("*.png"))) >= 2
    assert not list((tmp_path / "out/pictures").rglob("*.partial"))


def test_an_interruption_loses_neither_rows_nor_pictures(model, five, tmp_path):
    done = []

    def stop(count):
        done.append(count)
        if len(done) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict(
            model,
            five,
            tmp_path / "out",
            (0.0, 1.0),
            InferenceExecution(batch_size=2),
            progress=stop,
        )
    assert len(rows(tmp_path / "out/results.csv")) == 5
    assert len(list((tmp_path / "out/pictures").rglob("*.png"))) == 4
    assert not [t for t in threading.enumerate() if t.name.startswith(("writer", "images"))]


def test_a_report_of_a_stopped_prediction_has_its_failures(model, five, tmp_path):
    files = list(five)
    files[0].path.write_bytes(b"no image")
    pages = []

    def report():
        pages.append(ReportWriter(tmp_path / "out", "prediction", (0.0, 1.0), {}))
        return pages[0]

    def stop(count):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict(model, files, tmp_path / "out", None, report=report, progress=stop)
    [told] = pages[0].failures
    assert str(files[0].path) in told


def test_the_model_goes_on_while_a_picture_is_written(model, five, tmp_path, monkeypatch):
    scored_again = threading.Event()
    seen = []
    model.register_forward_pre_hook(
        lambda *_: (seen.append(1), scored_again.set() if len(seen) == 2 else None)[1]
    )
    waited = []
    monkeypatch.setattr(row_maker, "_draw", lambda *_: waited.append(scored_again.wait(30)))
    predict(model, five, tmp_path / "out", (0.0, 1.0), InferenceExecution(batch_size=1))
    assert waited == [True] * 5


def test_fp16_needs_a_gpu(model, five, tmp_path, device):
    if device.type == "cuda":
        model.to(device)
        full = scores(predict(model, five, tmp_path / "fp32", None)).values()
        half = scores(
            predict(model, five, tmp_path / "fp16", None, InferenceExecution(precision="fp16"))
        ).values()
        assert list(full) == pytest.approx(list(half), rel=0.05)
    else:
        with pytest.raises(ValueError, match="fp16 needs a CUDA device, got device='cpu'"):
            predict(model, five, tmp_path / "out", None, InferenceExecution(precision="fp16"))


def deciding(model, files, **classes):
    """Outputs for the files, and a decider whose classes have nine images of the given scores."""
    scores = {f.path: model(load_image(f.path, model.config.image_size)[None]) for f in files}
    known = {
        name: ClassScores.of([(image, pixel, str(i)) for i in range(9)], "test")
        for name, (image, pixel) in classes.items()
    }
    return scores, Decider(Calibration({}, known), 0.1)


def test_rows_masks_and_pictures_say_what_was_decided(model, tree, tmp_path):
    for i in range(2):
        save_picture(tree / f"bolt/test/good/{i:03d}.png", i, (96, 160))
    files = find_images([tree / "bolt/test", tree / "cloth/test"]).classified(["bolt"])
    assert {f.category for f in files} == {"bolt", None}
    files = [f for f in files if f.category] + [
        dataclasses.replace(f, category="cloth") for f in files if not f.category
    ]
    outs, _ = deciding(model, files, bolt=(0.0, 0.0))
    limit, highest = (
        sorted(value.item() for value in values)[1]
        for values in zip(
            *((outs[f.path].score, outs[f.path].score_map.max()) for f in files[:4]), strict=True
        )
    )
    _, decider = deciding(model, files, bolt=(limit, highest))
    out = tmp_path / "out"
    result = predict(model, files, out, (0.0, 2.0), decider=decider, masks=True, relative=True)
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [list(line) for line in lines] == [list(COLUMNS)] * 8
    with open(result.results, newline="", encoding="utf-8") as file:
        for row, line in zip(csv.DictReader(file), lines, strict=True):
            assert row == {k: "" if v is None else str(v) for k, v in line.items()}
    assert result.anomalous == 2 and result.drift == ()
    for file, line in zip(files, lines, strict=True):
        mask, target = out / "masks" / file.picture, out / "pictures" / file.picture
        picture = load_image(file.path, model.config.image_size).permute(1, 2, 0).numpy()
        score_map = outs[file.path].score_map[0, 0].detach()
        if file.category == "cloth":  # has no calibration images
            assert line["decision"] is line["p_value"] is line["area"] is None
            assert not mask.exists()
            expected = prediction_picture(picture, score_map, (0.0, 2.0))
        else:
            anomalous = line["score"] > line["threshold"]
            assert line["decision"] == ("anomalous" if anomalous else "normal")
            assert line["p_value"] == (0.1 if anomalous else 1.0)
            with Image.open(mask) as shown, Image.open(file.path) as original:
                assert shown.size == original.size
                assert set(np.unique(shown)) <= {0, 255}
                box = shown.getbbox()
                area = np.mean(np.asarray(shown) > 0)
            found = line["area"] and (line["x"], line["y"])
            assert (box and box[:2]) == (found or None)
            assert line["area"] == pytest.approx(area, abs=0.02)
            expected = prediction_picture(picture, score_map / (2 * highest), (0.0, 1.0))
        difference = np.abs(np.asarray(Image.open(target), int) - np.asarray(expected, int))
        assert difference.mean() < 0.1  # rounding of the map may move a color
    assert not (out / "masks" / files[0].picture).is_relative_to(out / "pictures")
    found = {f.path for f in find_images([tmp_path], out)}
    assert found == {f.path for f in find_images([tree])}


def test_a_drift_is_told_once_per_class(model, tmp_path):
    for i in range(25):
        save_picture(tmp_path / "images/bolt" / f"{i}.png", i)
    files = find_images([tmp_path / "images"]).classified(["bolt"])
    _, decider = deciding(model, files, bolt=(0.0, 0.0))
    result = predict(model, files, tmp_path / "out", None, decider=decider)
    assert result.drift == ("bolt (25 of 25 score above the threshold)",)


def test_a_name_with_commas_quotes_breaks_and_markup_stays_one_row(model, tmp_path):
    name = 'a,"b"\n<b>.png'
    save_picture(tmp_path / "images" / name, 1)
    result = predict(model, find_images([tmp_path / "images"]), tmp_path / "out", None)
    assert rows(result.results)[1][0] == str(tmp_path / "images" / name)
    (line,) = (tmp_path / "out/results.jsonl").read_text().splitlines()
    assert json.loads(line)["path"] == str(tmp_path / "images" / name)
