"""Decisions on the command line: who calibrates, what is decided, and what is in the way."""

from __future__ import annotations

import json
import shutil

import pytest
from cli_cases import refused
from conftest import save_picture
from PIL import Image

from rlr_fast.cli import main
from rlr_fast.files import write_atomically

CALIBRATED = ["predict", "DATA", "--checkpoint", "CAL", "--out", "OUT"]
PREDICT = ["predict", "DATA", "--checkpoint", "RUN", "--out", "OUT"]


def test_a_calibrated_run_decides_and_fails_a_script(trained, calibrated, tmp_path, capsys):
    out = tmp_path / "out"
    argv = ["predict", "--checkpoint", str(calibrated), "--out", str(out), "--quiet"]
    good, images = str(trained / "data/bolt/test/good"), str(trained / "data")
    assert main([*argv, good, "--alpha", "0.34", "--fail-on-anomaly", "--masks"]) == 0
    assert "2 of 2 images scored, 0 of 2 anomalous at alpha 0.34" in capsys.readouterr().out
    assert len(list((out / "masks").rglob("*.png"))) == 2
    noise = tmp_path / "bolt/noise.png"
    noise.parent.mkdir()
    Image.effect_noise((64, 48), 120).convert("RGB").save(noise)
    assert main([*argv, images, str(noise), "--alpha", "0.34", "--fail-on-anomaly"]) == 3
    eval_argv = ["eval", images, "--checkpoint", str(calibrated), "--out", str(out), "--quiet"]
    assert main([*eval_argv, "--alpha", "0.34", "--pool"]) == 0
    assert "decisions at alpha 0.34, all classes pooled:" in capsys.readouterr().out
    decided = json.loads((out / "metrics.json").read_text())["decisions"]
    assert decided["all"]["normal"] == 0 and decided["all"]["anomalous"] == 4


def test_without_flags_what_cannot_be_decided_is_scored_and_told(
    trained, calibrated, tmp_path, capsys, caplog
):
    argv = ["predict", str(trained / "data/bolt/test"), "--out", str(tmp_path / "out"), "--quiet"]
    assert main([*argv, "--checkpoint", str(trained / "run")]) == 0
    assert "not decided:" in caplog.text and "has no calibration" in caplog.text
    assert main([*argv, "--checkpoint", str(calibrated)]) == 0
    assert "alpha=0.05 needs 19 calibration images, there are 2 of bolt" in caplog.text
    rows = [json.loads(x) for x in (tmp_path / "out/results.jsonl").read_text().splitlines()]
    assert all(row["p_value"] and row["decision"] is None for row in rows)
    values = json.loads((calibrated / "config.json").read_text())
    write_atomically(calibrated / "config.json", json.dumps(values | {"top_share": 0.1}))
    assert main([*argv, "--checkpoint", str(calibrated)]) == 0
    assert "of other scores (top_share was 0.0, now 0.1)" in caplog.text
    caplog.clear()
    images = tmp_path / "images"
    shutil.copytree(trained / "data/bolt/test/good", images)
    write_atomically(calibrated / "config.json", json.dumps(values))
    argv[1] = str(images)
    assert main([*argv, "--checkpoint", str(calibrated), "--alpha", "0.3"]) == 0
    assert "2 images in no folder of a class" in caplog.text and "pooled" in caplog.text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([*PREDICT, "--alpha", "0.1"], "has no calibration"),
        ([*PREDICT, "--masks"], "has no calibration"),
        ([*PREDICT, "--fail-on-anomaly"], "has no calibration"),
        (["eval", *PREDICT[1:], "--pool"], "has no calibration"),
        ([*PREDICT, "--class", "bold"], "did you mean 'bolt'?"),
        ([*PREDICT, "--alpha", "5"], "must be above 0 and below 1, got '5'"),
        ([*CALIBRATED, "--masks"], "there are 2 of bolt, 2 of cloth"),
        ([*CALIBRATED, "--alpha", "0.34", "--precision", "bf16"], "precision was fp32, now bf16"),
        ([*CALIBRATED, "--alpha", "0.34", "--tile", "32"], "tile was None, now [32, 32]"),
        (["calibrate", "DATA", "--checkpoint", "RUN"], "the run was trained on all of them"),
        (["calibrate", "DATA", "--checkpoint", "RUN", "--split", "train"], "take others"),
        (["calibrate", "DATA", "--checkpoint", "a/b", "--split", "test"], "there is no folder"),
        (
            ["calibrate", "DATA", "--checkpoint", "RUN", "--split", "test", "--class", "bolt"],
            "--class is for images of one class, there are 2",
        ),
        (["calibrate", "PLAIN", "--checkpoint", "RUN"], "not trained on a class 'plain'"),
        (
            ["calibrate", "PLAIN", "--checkpoint", "RUN", "--class", "cloht"],
            "did you mean 'cloth'?",
        ),
    ],
    ids=lambda value: " ".join(value)[-50:] if isinstance(value, list) else None,
)
def test_a_decision_that_cannot_be_made_is_one_line(
    argv, message, trained, calibrated, tmp_path, capsys
):
    shutil.copytree(trained / "data/bolt/test/good", tmp_path / "plain")
    places = {"DATA": trained / "data", "RUN": trained / "run", "OUT": tmp_path / "out"}
    places |= {"CAL": calibrated, "PLAIN": tmp_path / "plain"}
    told = refused(capsys, *(places.get(word, word) for word in argv))
    assert message in told and told.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_finished_run_that_is_resumed_keeps_its_calibration(trained, calibrated):
    before = (calibrated / "calibration.json").read_bytes()
    argv = ["train", str(trained / "data"), "--out", str(calibrated), "--resume", "--quiet"]
    argv += ["--device", "cpu"]  # as the run: another device rounds the color scale otherwise
    assert main([*argv, "--cache-dir", str(trained / "cache")]) == 0
    assert (calibrated / "calibration.json").read_bytes() == before


def test_a_plain_folder_calibrates_the_class_that_is_named(trained, calibrated, tmp_path, capsys):
    shutil.copytree(trained / "data/bolt/test/good", tmp_path / "plain")
    argv = ["calibrate", "--checkpoint", str(calibrated), "--quiet"]
    assert main([*argv, str(tmp_path / "plain"), "--class", "cloth"]) == 0
    assert main([*argv, str(trained / "data/bolt/test/good")]) == 0  # the folder names it
    printed = capsys.readouterr().out
    assert "bolt        2  0.3334" in printed and "all pooled: 4 images" in printed
    classes = json.loads((calibrated / "calibration.json").read_text())["calibration"]["classes"]
    assert set(classes) == {"bolt", "cloth"}
    assert classes["bolt"]["files"] == classes["cloth"]["files"]


def test_images_that_were_trained_on_calibrate_nothing_under_any_name(trained, tmp_path, capsys):
    plain = shutil.copytree(trained / "data/bolt/train/good", tmp_path / "bolt")
    for file in sorted(plain.iterdir()):
        file.rename(plain / f"a{file.name}")
    shutil.copy(trained / "data/bolt/test/good/000.png", plain / "b.png")
    message = refused(capsys, "calibrate", plain, "--checkpoint", trained / "run")
    assert (
        "the run was trained on 5 of these 6 images, such as" in message and "a000.png" in message
    )


def test_predict_tells_how_images_of_unknown_class_are_decided(calibrated, tmp_path, caplog):
    save_picture(tmp_path / "images/0.png", 0)
    argv = ["predict", str(tmp_path / "images"), "--checkpoint", str(calibrated), "--quiet"]
    assert main([*argv, "--out", str(tmp_path / "out"), "--pool", "--alpha", "0.34"]) == 0
    assert "1 image in no folder of a class of the run: decided by all classes" in caplog.text


def test_calibrate_names_the_class_that_has_no_images(trained, calibrated, capsys):
    images = trained / "data/bolt/test/good"
    argv = ("calibrate", images, "--checkpoint", calibrated, "--classes", "cloth")
    refused(capsys, *argv)
    good = trained / "data/bolt/validation/good"
    good.mkdir(parents=True)
    try:
        shutil.copy(images / "000.png", good)
        argv = ("calibrate", trained / "data", "--checkpoint", calibrated, "--classes", "cloth")
        assert "no images to calibrate on of cloth" in refused(capsys, *argv)
    finally:
        shutil.rmtree(good.parent)


def test_calibrate_tells_what_it_drops(trained, calibrated, caplog):
    images = str(trained / "data/bolt/test/good")
    argv = ["calibrate", images, "--checkpoint", str(calibrated), "--class", "bolt", "--quiet"]
    assert main(argv) == 0 and "dropped" not in caplog.text
    assert main([*argv, "--tile", "32"]) == 0
    assert "the scores of cloth are dropped" in caplog.text


def test_two_calibrations_at_once_keep_the_classes_of_both(trained, calibrated, monkeypatch):
    from rlr_fast.pictures import batches

    load, first = batches.load_model, []

    def with_another_meanwhile(*args):
        if not first:
            first.append(True)
            assert main([*argv("cloth"), "--quiet"]) == 0
        return load(*args)

    def argv(name):
        images = str(trained / f"data/{name}/test/good")
        return ["calibrate", images, "--checkpoint", str(calibrated), "--class", name]

    monkeypatch.setattr(batches, "load_model", with_another_meanwhile)
    assert main([*argv("bolt"), "--quiet"]) == 0
    classes = json.loads((calibrated / "calibration.json").read_text())["calibration"]["classes"]
    sources = {name: scores["source"] for name, scores in classes.items()}
    assert sources == {name: str(trained / f"data/{name}/test/good") for name in ("bolt", "cloth")}
