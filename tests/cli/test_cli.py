"""The command line: what a user meets, mistakes included."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cli_cases import FLAGS, refused
from conftest import make_tree
from gpu import ON_GPU
from torch._inductor.exc import InductorError

from rlr_fast.cli import main, predict
from rlr_fast.config import PRESETS, Preset
from rlr_fast.data import synthetic
from rlr_fast.pictures import batches

PREDICT = ["predict", "DATA", "--checkpoint", "RUN", "--out", "OUT"]


def test_train_eval_predict(trained, tmp_path, capsys):
    run, out = str(trained / "run"), str(tmp_path / "out")
    data = str(trained / "data")
    assert main(["eval", data, "--checkpoint", run, "--out", out, "--figures", "--quiet"]) == 0
    printed = capsys.readouterr().out
    assert "I-AUROC" in printed and "mean" in printed
    assert json.loads((tmp_path / "out/metrics.json").read_text())["mean"]
    assert (tmp_path / "out/figures/bolt.png").exists()
    paths = [f"{data}/bolt/test", f"{data}/cloth/test/hole/000.png"]
    assert main(["predict", *paths, "--checkpoint", run, "--out", out, "--quiet"]) == 0
    assert "5 of 5 images scored" in capsys.readouterr().out


def test_eval_tells_of_strange_classes_and_of_those_that_have_no_value(trained, tmp_path, caplog):
    shutil.copytree(trained / "data/bolt", tmp_path / "data/nut")
    shutil.rmtree(tmp_path / "data/nut/test/hole")
    argv = ["eval", str(tmp_path / "data"), "--checkpoint", str(trained / "run"), "--quiet"]
    assert main([*argv, "--out", str(tmp_path / "out")]) == 0
    assert "run was not trained on nut" in caplog.text
    assert "no defective test image of nut: what needs both kinds has no value" in caplog.text


def test_demo_makes_trains_evaluates_and_predicts(tmp_path, monkeypatch, capsys, small, brief):
    monkeypatch.setitem(PRESETS, "accurate", Preset(small, brief, "small"))
    few = {"train_per_class": 2, "good_per_class": 1, "defects_per_kind": 1}
    few |= {"classes": ["washer", "wood"]}
    make = synthetic.make_dataset
    monkeypatch.setattr(synthetic, "make_dataset", lambda root, **given: make(root, **given | few))
    assert main(["demo", "--out", str(tmp_path), "--quiet", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "I-AUROC" in printed
    written = printed.split("written in")[1].splitlines()[1:]
    assert len(written) == 6 and all(Path(line.split()[-1]).exists() for line in written)
    assert {p.name for p in (tmp_path / "figures").iterdir()} == {"washer.png", "wood.png"}
    shutil.rmtree(tmp_path / "figures")
    (tmp_path / "figures").touch()
    assert main(["demo", "--out", str(tmp_path), "--quiet", "--device", "cpu"]) == 1
    assert "cannot write the figures of washer" in capsys.readouterr().err


def test_predict_with_a_corrupt_image_exits_with_1(trained, tmp_path, capsys):
    images = tmp_path / "images"
    shutil.copytree(trained / "data/bolt/test/good", images)
    (images / "000.png").write_bytes(b"no image")
    out = str(tmp_path / "out")
    arguments = ["predict", str(images), "--checkpoint", str(trained / "run"), "--out", out]
    assert main([*arguments, "--quiet"]) == 1
    captured = capsys.readouterr()
    assert "1 of 2 images scored" in captured.out
    assert "left out" in captured.err and "000.png" in captured.err


def test_predict_watches_a_folder_until_it_is_interrupted(trained, tmp_path, monkeypatch, capsys):
    from rlr_fast.prediction.arrivals import Arrivals

    poll, looks = Arrivals.poll, []

    def look(self):
        looks.append(1)
        if len(looks) > 3:
            raise KeyboardInterrupt
        return poll(self)

    monkeypatch.setattr(Arrivals, "poll", look)
    words = ["predict", str(trained / "data/bolt/test/good"), "--checkpoint", str(trained / "run")]
    words += ["--out", str(tmp_path / "out"), "--no-pictures"]
    assert main([*words, "--watch", "--settle", "0"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[:2]] == ["scored", "scored"]
    assert printed[2].startswith("2 of 2 images scored: ")
    predict._tell({"failure": None, "decision": None, "score": 0.5, "path": "in/a\nb.png"})
    assert capsys.readouterr().out == "scored 0.5 'in/a\\nb.png'\n"
    assert "--settle is of --watch" in refused(capsys, *words, "--settle", "1")
    assert "not with torchrun, --resume or --report" in refused(
        capsys, *words, "--watch", "--report", "--scale", "0", "1"
    )


def test_predict_in_tiles(trained, tmp_path, capsys):
    argv = ["predict", str(trained / "data/bolt/test"), "--checkpoint", str(trained / "run")]
    argv += ["--out", str(tmp_path / "out"), "--quiet", "--tile", "32x40", "--overlap", "8"]
    assert main([*argv, "--batch-size", "2", "--precision", "bf16"]) == 0
    assert "4 of 4 images scored" in capsys.readouterr().out


def report_of(out):
    """Return the rows of a report and what else it holds."""
    text = (out / "report.html").read_text(encoding="utf-8")
    parts = (re.search(f'id="{name}">(.*?)</script>', text, re.S) for name in ("rows", "data"))
    return [json.loads(part[1]) for part in parts]


def test_eval_writes_a_report_of_its_own_figures(trained, calibrated, tmp_path, capsys):
    broken = tmp_path / "data"
    shutil.copytree(trained / "data", broken)
    (broken / "cloth/test/hole/001.png").write_bytes(b"no image")
    argv = ["eval", str(broken), "--checkpoint", str(calibrated), "--out", str(tmp_path / "out")]
    assert main([*argv, "--quiet", "--report", "--alpha", "0.34"]) == 1
    assert str(tmp_path / "out/report.html") in capsys.readouterr().out
    rows, data = report_of(tmp_path / "out")
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert data["metrics"]["classes"] == metrics["classes"]
    assert data["metrics"]["mean"] == metrics["mean"] and data["decisions"] == metrics["decisions"]
    assert data["failures"] == metrics["failures"] and len(data["failures"]) == 1
    assert [row[0] for row in rows] != [] and sorted(row[0] for row in rows) == list(range(7))
    labels = {(row[3], row[4], row[7], row[12] is not None) for row in rows}
    assert labels == {
        (name, defect, int(defect == "good"), defect != "good")  # the calibration's are the good
        for name in ("bolt", "cloth")
        for defect in ("good", "hole")
    }
    limits = {name: each["threshold"] for name, each in metrics["decisions"]["classes"].items()}
    assert data["thresholds"] == [[name, limit, False] for name, limit in limits.items()]
    assert data["alpha"] == 0.34
    for row in rows:
        assert (row[5] > limits[row[3]]) == (row[6] <= 0.34)
        assert (tmp_path / "out" / row[2]).resolve() == Path(row[1]).resolve()


@pytest.mark.parametrize("verb", ["predict", "eval"])
def test_what_an_earlier_command_left_is_told(verb, trained, tmp_path, capsys, caplog):
    (tmp_path / "report.html").touch()
    (tmp_path / "figures").mkdir()
    argv = [verb, str(trained / "data"), "--checkpoint", str(trained / "run"), "--quiet"]
    argv += ["--out", str(tmp_path)]
    assert main(argv) == 0
    said = capsys.readouterr().err + caplog.text
    assert f"{tmp_path / 'report.html'} stays there, and is of an earlier command" in said
    assert ("figures stays there" in said) == (verb == "eval")
    caplog.clear()
    assert main([*argv, "--report", "--no-pictures" if verb == "predict" else "--figures"]) == 0
    assert "stays there" not in capsys.readouterr().err + caplog.text


def test_predict_writes_a_report_of_its_table(trained, calibrated, tmp_path, capsys):
    out, data = tmp_path / "out", str(trained / "data/bolt/test")
    argv = ["predict", data, "--out", str(out), "--quiet", "--report", "--no-pictures"]
    assert main([*argv, "--checkpoint", str(trained / "run")]) == 0
    rows, told = report_of(out)
    table = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert sorted((r[1], r[5]) for r in rows) == sorted((t["path"], t["score"]) for t in table)
    assert told["thresholds"] == [] and told["alpha"] is None
    assert all(row[12] is None for row in rows) and not told["relative"]
    assert not (out / "pictures").exists()
    argv += ["--checkpoint", str(calibrated), "--alpha", "0.34"]
    assert main([*argv, "--tile", "32x40", "--overlap", "8"]) == 2  # of other scores
    assert main(argv) == 0
    rows, told = report_of(out)
    table = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert told["thresholds"] == [["bolt", table[0]["threshold"], False]]
    assert {r[1]: r[6] for r in rows} == {t["path"]: t["p_value"] for t in table}
    assert all(row[12] is not None for row in rows)
    facts = dict(told["facts"])
    assert facts["Backbone"] == "tf_efficientnet_lite0" and facts["Checkpoint"] == "calibrated"


@pytest.mark.parametrize("verb", ["predict", "eval"])
def test_a_report_that_cannot_be_written_is_refused_before_any_work(
    verb, trained, tmp_path, capsys
):
    (tmp_path / "report.html").mkdir()
    argv = (verb, trained / "data", "--checkpoint", trained / "run", "--out", tmp_path, "--report")
    told = refused(capsys, *argv)
    assert "--report writes a file" in told and told.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize("verb", ["predict", "eval"])
def test_compile_is_for_batches_of_the_given_size(trained, tmp_path, verb, monkeypatch):
    compiled = []

    def compile_model(model, batch_size):
        compiled.append(batch_size)
        model.compiled_batch = batch_size

    monkeypatch.setattr(batches, "compile_model", compile_model)
    argv = [verb, str(trained / "data"), "--checkpoint", str(trained / "run"), "--quiet"]
    assert main([*argv, "--out", str(tmp_path / "plain")]) == 0
    assert main([*argv, "--out", str(tmp_path), "--compile", "--batch-size", "3"]) == 0
    assert compiled == [3]


def test_a_machine_that_cannot_compile_is_told_in_a_line(trained, tmp_path, capsys, monkeypatch):
    def no_compiler(*_):
        raise InductorError(RuntimeError("No working C++ compiler found"), None)

    monkeypatch.setattr(batches, "compile_model", no_compiler)
    argv = ["predict", trained / "data", "--checkpoint", trained / "run", "--out", tmp_path]
    message = refused(capsys, *argv, "--compile")
    assert "cannot compile here" in message and "C++ compiler" in message
    assert "\n" not in message.strip()


def test_predict_names_the_file_that_is_smaller_than_a_tile(trained, tmp_path, capsys):
    argv = ["predict", str(trained / "data/bolt/test/good"), "--checkpoint", str(trained / "run")]
    assert main([*argv, "--out", str(tmp_path / "out"), "--quiet", "--tile", "64"]) == 1
    captured = capsys.readouterr()
    assert "0 of 2 images scored" in captured.out
    assert "001.png" in captured.err and "48 x 64 pixels, less than a tile" in captured.err


def test_metrics_name_the_precision(trained, tmp_path):
    argv = ["eval", str(trained / "data"), "--checkpoint", str(trained / "run"), "--quiet"]
    assert main([*argv, "--out", str(tmp_path), "--precision", "bf16", "--batch-size", "3"]) == 0
    values = json.loads((tmp_path / "metrics.json").read_text())
    assert values["protocol"]["precision"] == "bf16"


def test_predict_takes_a_name_that_is_no_text(trained, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(trained / "data/bolt/test/good", images)
    try:
        (images / "000.png").rename(os.fsdecode(os.fsencode(images) + b"/\xff.png"))
    except OSError:
        pytest.skip("this file system takes no such name")
    argv = ["predict", str(images), "--checkpoint", str(trained / "run"), "--quiet"]
    assert main([*argv, "--out", str(tmp_path / "out")]) == 0
    assert "/\\udcff.png," in (tmp_path / "out/results.csv").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "DATA", "--out", "OUT", "--alfa", "3"], "Did you mean --alpha?"),
        (["train", "DATA", "--out", "OUT", "--epochs", "few"], "must be a whole number, got 'few'"),
        (["train", "DATA", "--out", "OUT", "--windows", "4"], "odd and positive"),
        (["train", "DATA", "--out", "OUT", "--preset", "papr"], "paper"),
        (["train", "DATA"], "--out is needed"),
        (["train", "DATA", "extra", "--out", "OUT"], "unexpected argument 'extra'"),
        (["train", "nowhere", "--out", "OUT"], "nowhere"),
        (["train", "DATA", "--out", "OUT", "--layout", "mvtek"], "mvtec"),
        (["train", "DATA", "--out", "OUT", "--classes", "bold"], "bolt"),
        (["train", "DATA", "--out", "OUT", "--device", "cuda:9"], "device must be one"),
        (["train", "DATA", "--out", "OUT", "--backend", "triton", *FLAGS], "triton"),
        (["train", "DATA", "--out", "OUT", "--backbone-weights", "no.pth"], "Three ways out"),
        (
            ["eval", "DATA", "--checkpoint", "nowhere", "--out", "OUT"],
            "no checkpoint folder 'nowhere'",
        ),
        (["eval", "DATA", "--checkpoint", "DATA", "--out", "OUT"], "not a checkpoint"),
        (
            ["predict", "DATA", "--checkpoint", "nowhere", "--out", "OUT"],
            "no checkpoint folder 'nowhere'",
        ),
        (["predict", "DATA", "--checkpoint", "a/b", "--out", "OUT"], "there is no folder 'a/b'"),
        (["predict", "DATA", "--checkpoint", "DATA", "--out", "OUT"], "not a checkpoint"),
        (["predict", "nothing.png", "--checkpoint", "RUN", "--out", "OUT"], "nothing.png"),
        (
            ["predict", "DATA", "--checkpoint", "RUN", "--out", "OUT", "--scale", "2", "1"],
            "below HIGH",
        ),
        ([*PREDICT, "--tile", "64", "--overlap", "64"], "overlap must be at least 0 and below"),
        ([*PREDICT, "--tile", "0"], "tile must be a positive side"),
        ([*PREDICT, "--tile", "-8"], "must be a side, or height x width"),
        ([*PREDICT, "--tile", "1x2x3"], "must be a side, or height x width"),
        ([*PREDICT, "--tile", "big"], "--tile: must be a side, or height x width"),
        ([*PREDICT, "--overlap", "8"], "overlap needs a tile"),
        ([*PREDICT, "--batch-size", "0"], "batch_size must be positive, got batch_size=0"),
        ([*PREDICT, "--precision", "fp8"], "fp8"),
        ([*PREDICT, "--precision", "fp16", "--device", "cpu"], "fp16 needs a CUDA device"),
        (["eval", *PREDICT[1:], "--precision", "fp16", "--device", "cpu"], "fp16 needs a CUDA"),
        ([*PREDICT, "--tile", "8", "--tile=16"], "--tile is given twice. See rlr-fast predict"),
        (["info", "--image-size", "8", "--image_size", "9"], "--image-size is given twice"),
        (["info", "--preset", "tiny", "--checkpoint", "RUN"], "give one of them"),
        (["info", "--checkpoint", __file__], "a checkpoint is a folder"),
        (["train", "DATA", "--out", "OUT", "--overlap", "8"], "overlap needs a tile"),
        (["figures", "DATA", "--checkpoint", "RUN", "--out", "OUT", "--tile", "8"], "--tile"),
        (
            ["train", "DATA", "--out", "OUT", "--image-size", "32", "--image-size", "64"],
            "--image-size is given twice",
        ),
        ([*PREDICT, "--scale", "0", "inf"], "both finite, got 0.0 inf"),
        ([*PREDICT, "--scale", "0", "1", "--no-pictures"], "--scale is of the pictures"),
        (["eval", *PREDICT[1:], "--scale", "0", "1"], "--scale is of --figures and --report"),
        (["eval", *PREDICT[1:], "--per-defect", "2"], "--per-defect is of --figures"),
        (
            ["publish", "RUN", "o/n", "--license", "mit", "--out", "OUT", "--private"],
            "--private is of the repository",
        ),
        (["demp"], "demo"),
    ],
    ids=lambda value: " ".join(value[2:])[:40] if isinstance(value, list) else None,
)
def test_a_users_mistake_is_one_message_and_exit_code_2(argv, message, trained, tmp_path, capsys):
    places = {"DATA": trained / "data", "RUN": trained / "run", "OUT": tmp_path / "out"}
    assert message in refused(capsys, *(places.get(word, word) for word in argv))


def test_after_two_dashes_come_paths(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = ("predict", "--checkpoint", trained / "run", "--out", "maps", "--quiet", "--", "--out")
    assert "there is no file or folder '--out'" in refused(capsys, *argv)


def test_metrics_that_cannot_be_written_are_told_before_the_work(trained, tmp_path, capsys):
    (tmp_path / "metrics.json").mkdir()
    argv = ("eval", trained / "data", "--checkpoint", trained / "run", "--out", tmp_path)
    assert "metrics.json' is a folder, where a file" in refused(capsys, *argv)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]


def test_checkpoint_cut_by_a_byte_is_told(trained, tmp_path, capsys):
    shutil.copytree(trained / "run", tmp_path / "run")
    file = tmp_path / "run/model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    argv = ("eval", trained / "data", "--checkpoint", tmp_path / "run", "--out", tmp_path / "out")
    assert "model.safetensors is damaged or incomplete" in refused(capsys, *argv)


def test_an_empty_class_is_told_before_training(tmp_path, capsys):
    data = make_tree(tmp_path / "data")
    for path in (data / "cloth/train/good").iterdir():
        path.unlink()
    message = refused(capsys, "train", data, "--out", tmp_path / "run", *FLAGS)
    assert "cloth" in message and not (tmp_path / "run").exists()


def test_data_check_exits_with_1_if_a_run_would_fail(tmp_path, capsys):
    data = make_tree(tmp_path / "data")
    assert main(["data", "check", str(data)]) == 0
    (data / "bolt/train/good/000.png").write_bytes(b"no image")
    assert main(["data", "check", str(data)]) == 1
    assert "000.png" in capsys.readouterr().out


def test_data_make_writes_a_set_that_passes_the_check(tmp_path, capsys):
    data = str(tmp_path / "data")
    arguments = ["--size", "48", "--train", "2", "--classes", "washer", "--quiet"]
    assert main(["data", "make", data, *arguments]) == 0
    assert main(["data", "check", data]) == 0


@pytest.mark.skipif(ON_GPU, reason="a GPU runs the kernels")
def test_info_tells_why_a_backend_is_missing(capsys, monkeypatch):
    monkeypatch.setattr("rlr_fast.kernels._launch.INTERPRETING", False)
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert "triton  " in printed and "NVIDIA GPU" in printed and "backbone" not in printed


def test_info_counts_what_is_fitted_after_training(capsys):
    for power in ("0", "0.5"):
        assert main(["info", "--preset", "tiny", "--uncertainty", power]) == 0
        text = capsys.readouterr().out
        assert ("uncertainty 0.5: 52,994 parameters, fitted after training" in text) == bool(
            float(power)
        )


def test_info_without_a_model_loads_no_network_and_no_compiler():
    code = (
        "import sys; from rlr_fast.cli import main; main(['info']); "
        "print({'timm', 'torchvision', 'scipy', 'torch._dynamo'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "set()"


def test_metrics_are_kept_where_the_table_cannot_be_printed(trained, tmp_path):
    """By a reader that has gone, or by an encoding that lacks a name's letters."""
    data = shutil.copytree(trained / "data", tmp_path / "data")
    (data / "bolt").rename(data / "größe")
    argv = [sys.executable, "-m", "rlr_fast", "eval", str(data), "--quiet"]
    argv += ["--checkpoint", str(trained / "run"), "--device", "cpu", "--out"]
    done = subprocess.run(
        [*argv, str(tmp_path / "ascii")],
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
    )
    assert done.returncode == 0 and rb"gr\xf6\xdfe" in done.stdout
    assert (tmp_path / "ascii/metrics.json").exists()
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*argv, str(tmp_path / "pipe")], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (tmp_path / "pipe/metrics.json").exists() and b"Traceback" not in done.stderr


def test_publish_does_not_write_over_a_run(trained, tmp_path, capsys):
    other = shutil.copytree(trained / "run", tmp_path / "other")
    before = (other / "model.safetensors").stat()
    argv = ("publish", trained / "run", "me/x", "--license", "mit", "--out", other)
    message = refused(capsys, *argv)
    assert "out must be a new or an empty folder" in message
    assert (other / "model.safetensors").stat() == before


def test_demo_refuses_a_seed_before_it_makes_data(tmp_path, capsys, monkeypatch, small):
    monkeypatch.setitem(PRESETS, "accurate", Preset(small, PRESETS["accurate"].train, "small"))
    message = refused(capsys, "demo", "--seed", "999999999", "--out", tmp_path / "demo")
    assert "seed must be" in message and not (tmp_path / "demo").exists()


def test_a_resumed_run_takes_its_layout(trained, tmp_path, capsys):
    argv = ["train", str(trained / "data"), "--out", str(tmp_path / "run"), *FLAGS]
    argv += ["--cache-dir", str(tmp_path / "cache")]
    assert main([*argv, "--layout", "loco"]) == 0  # by itself it is taken for mvtec
    assert main([*argv, "--resume"]) == 0
    assert "already trained 2 epochs" in capsys.readouterr().out
