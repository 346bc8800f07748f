"""A table's runs: what is run again and what not, what stops them, what a folder keeps."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import BRIEF, SMALL, make_tree, save_picture
from PIL import Image

from rlr_fast.cli import main
from rlr_fast.config import TrainExecution
from rlr_fast.data import read_dataset
from rlr_fast.files import lock_folder, write_atomically
from rlr_fast.inference.metrics import HEADINGS
from rlr_fast.paper import configure, folder, run_table, runs
from rlr_fast.paper.tables import TABLES
from rlr_fast.training import run_dir
from rlr_fast.training.run_dir import TrainingError
from rlr_fast.training.trainer import Trainer

SHORT = dataclasses.replace(BRIEF, epochs=2)
TABLE = TABLES["perturbation"]


def run(dataset, out, tmp_path, table=TABLE, config=SMALL, recipe=SHORT, **options):
    execution = TrainExecution(device="cpu", cache_dir=tmp_path / "cache")
    options = {"seeds": 1, "quiet": True, "tell": lambda line: None} | options
    return run_table(table, config, recipe, dataset, out, execution, **options)


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """A folder with a small data set and a table of which one of two runs is finished."""
    root = tmp_path_factory.mktemp("table")
    run(read_dataset(make_tree(root / "data")), root / "out", root, only=["on"])
    return root


@pytest.fixture
def finished(once, tmp_path):
    """The data of a copy of it in ``tmp_path``; the table is in ``out``."""
    shutil.copytree(once, tmp_path, dirs_exist_ok=True)
    return tmp_path / "data"


def content(out):
    return json.loads((out / "table.json").read_text())


def test_a_table_is_the_mean_and_deviation_of_its_runs(dataset, tmp_path):
    told: list[str] = []
    result = run(dataset, tmp_path / "out", tmp_path, seeds=2, tell=told.append)
    assert not result.failed and not result.left_out
    assert [line.split(":")[0] for line in told] == [
        *("on, seed 0", "off, seed 0", "on, seed 1", "off, seed 1")
    ]
    metrics = [
        json.loads((tmp_path / f"out/runs/off-seed{seed}/metrics.json").read_text())
        for seed in (0, 1)
    ]
    row = content(tmp_path / "out")["rows"][1]
    values = [100 * m["mean"]["pixel_auroc"] for m in metrics]
    assert row["seeds"] == [0, 1]
    assert row["mean"]["pixel_auroc"]["mean"] == pytest.approx(sum(values) / 2)
    assert row["mean"]["pixel_auroc"]["std"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    text = (tmp_path / "out/table.md").read_text()
    assert "±" in text and "2 of 2" in text and "last of 2 epochs" in text
    assert len(list((tmp_path / "cache").iterdir())) == 1  # features once, for all runs


def test_what_is_finished_is_not_run_again(dataset, tmp_path, monkeypatch):
    run(dataset, tmp_path / "out", tmp_path)
    before = (tmp_path / "out/table.json").read_text()

    def never(*_, **__):
        raise AssertionError("trained again")

    monkeypatch.setattr(runs, "train", never)
    told: list[str] = []
    run(dataset, tmp_path / "out", tmp_path, tell=told.append)
    assert told == ["finished before: 2 of 2 runs"]
    assert (tmp_path / "out/table.json").read_text() == before


def test_an_interrupted_table_ends_as_an_uninterrupted_one(dataset, tmp_path, monkeypatch):
    run(dataset, tmp_path / "whole", tmp_path)
    save = Trainer._save

    def stop_in_the_second_run(self, checkpoints):
        save(self, checkpoints)
        if self.model.config.perturbation == 0 and self.epoch == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_save", stop_in_the_second_run)
    with pytest.raises(KeyboardInterrupt):
        run(dataset, tmp_path / "halves", tmp_path)
    assert [row["seeds"] for row in content(tmp_path / "halves")["rows"]] == [[0], []]
    monkeypatch.setattr(Trainer, "_save", save)
    run(dataset, tmp_path / "halves", tmp_path)
    for name in ("table.json", "table.csv", "table.md"):
        assert (tmp_path / "whole" / name).read_text() == (tmp_path / "halves" / name).read_text()
    one, other = (
        safetensors.torch.load_file(tmp_path / out / "runs/off-seed0/model.safetensors")
        for out in ("whole", "halves")
    )
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda values: "{", "", id="cut"),
        pytest.param(lambda values: {"mean": {}}, "it has no 'settings'", id="part"),
        pytest.param(lambda values: [values], "it must be an object", id="list"),
        pytest.param(lambda values: 7, "it must be an object", id="number"),
        pytest.param(
            lambda values: values | {"settings": []},
            r"settings must be an object, got \[\]",
            id="settings",
        ),
        pytest.param(
            lambda values: values | {"settings": {"model": {}, "recipe": 1, "data": {}}},
            "recipe must be an object, got 1",
            id="recipe",
        ),
        pytest.param(
            lambda values: values | {"mean": dict.fromkeys(HEADINGS, "0.5")},
            "'image_auroc' of mean must be a finite number or null, got \"0.5\"",
            id="text-for-a-number",
        ),
        pytest.param(
            lambda values: values | {"mean": dict.fromkeys(HEADINGS, math.nan)},
            "'image_auroc' of mean must be a finite number or null, got NaN",
            id="nan",
        ),
        pytest.param(
            lambda values: values | {"classes": {k: [0.5] for k in values["classes"]}},
            "'bolt' of classes must be an object",
            id="class",
        ),
        pytest.param(
            lambda values: values | {"classes": {"nut": {}}}, "classes must be bolt", id="classes"
        ),
        pytest.param(
            lambda values: values | {"protocol": None}, "protocol must be an object", id="protocol"
        ),
        pytest.param(
            lambda values: {k: v for k, v in values.items() if k != "environment"},
            "it has no 'environment'",
            id="environment",
        ),
        pytest.param(
            lambda values: values | {"failures": [1]},
            "an entry of failures must be a text, got 1",
            id="failures",
        ),
    ],
)
def test_a_damaged_result_is_named_and_counts_as_missing(
    change, message, finished, tmp_path, caplog
):
    file = tmp_path / "out/runs/on-seed0/metrics.json"
    configs = {row.name: configure(TABLE, row, SMALL) for row in TABLE.rows}
    table = folder.TableFolder(
        tmp_path / "out", TABLE.name, SMALL, configs, SHORT, read_dataset(finished)
    )
    changed = change(json.loads(file.read_text()))
    file.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    assert table.metrics("on", 0) is None
    [told] = [r.getMessage() for r in caplog.records if r.name == folder.__name__]
    assert str(file) in told and re.search(message, told)


def test_a_damaged_result_is_measured_again(once, finished, tmp_path):
    before = (tmp_path / "out/table.json").read_text()
    (tmp_path / "out/runs/on-seed0/metrics.json").write_text("{")
    run(read_dataset(once / "data"), tmp_path / "out", tmp_path, only=["on"])
    assert (tmp_path / "out/table.json").read_text() == before


def test_a_failed_run_is_told_and_the_others_go_on(dataset, tmp_path, monkeypatch):
    def full(path, text):
        if path == tmp_path / "out/runs/on-seed0/metrics.json":
            raise OSError(28, "No space left on device")
        write_atomically(path, text)

    monkeypatch.setattr(folder, "write_atomically", full)
    told: list[str] = []
    result = run(dataset, tmp_path / "out", tmp_path, tell=told.append)
    assert result.failed == ["on, seed 0"]
    assert "on, seed 0: failed" in told[0] and "No space left" in told[0]
    assert [row["seeds"] for row in content(tmp_path / "out")["rows"]] == [[], [0]]
    monkeypatch.undo()
    assert not run(dataset, tmp_path / "out", tmp_path).failed
    assert [row["seeds"] for row in content(tmp_path / "out")["rows"]] == [[0], [0]]


def test_only_some_rows_and_more_seeds_later(dataset, tmp_path):
    run(dataset, tmp_path / "out", tmp_path, only=["off"])
    text = (tmp_path / "out/table.md").read_text()
    assert "| with perturbation | – |" in text and "0 of 1" in text
    run(dataset, tmp_path / "out", tmp_path, only=["off"], seeds=2)
    run(dataset, tmp_path / "out", tmp_path, only=["on"])
    assert [row["seeds"] for row in content(tmp_path / "out")["rows"]] == [[0], [0, 1]]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"config": dataclasses.replace(SMALL, alpha=5.0)},
            TrainingError,
            "alpha was 2.0, now 5.0",
        ),
        ({"recipe": BRIEF}, TrainingError, "epochs was 2, now 3"),
        ({"table": TABLES["5"]}, TrainingError, "holds table perturbation"),
        ({"only": ["of"]}, ValueError, "did you mean 'off'"),
        (
            {"config": dataclasses.replace(SMALL, perturbation=0.0)},
            ValueError,
            "on and off are the same model",
        ),
    ],
    ids=["model", "recipe", "table", "row", "equal-rows"],
)
def test_other_settings_are_refused_before_any_run(finished, tmp_path, change, error, message):
    out = tmp_path / "out"
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    with pytest.raises(error, match=message):
        run(read_dataset(finished), out, tmp_path, **change)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_what_no_run_can_do_is_told_before_the_first(dataset, tmp_path):
    recipe = dataclasses.replace(BRIEF, seed=2**29 - 1)
    with pytest.raises(ValueError, match=rf"seed must be .*, got seed={2**29}"):
        run(dataset, tmp_path / "out", tmp_path, recipe=recipe, seeds=2)
    inside = dataset.root / "bolt/train"
    with pytest.raises(TrainingError, match=r"the table cannot be written in .* among the images"):
        run(dataset, inside, tmp_path)
    assert not (tmp_path / "out").exists() and {p.name for p in inside.iterdir()} == {"good"}


def test_other_test_images_are_refused(finished, tmp_path):
    (finished / "bolt/test/good/000.png").unlink()
    with pytest.raises(TrainingError, match="test_images was 8, now 7"):
        run(read_dataset(finished), tmp_path / "out", tmp_path)


def paint_over(path):
    """Change a picture's pixels, and not its size in bytes, as far as anything can tell."""
    with Image.open(path) as image:
        Image.fromarray(255 - np.asarray(image)).save(path)
    return path


@pytest.mark.parametrize(
    ("file", "what"),
    [
        ("bolt/ground_truth/hole/000_mask.png", "the test masks of bolt are others"),
        ("cloth/test/hole/001.png", "the test images of cloth are others"),
        ("cloth/train/good/001.png", "the training images of cloth are others"),
    ],
    ids=["mask", "test", "train"],
)
def test_other_pixels_are_refused_before_any_run(finished, tmp_path, monkeypatch, file, what):
    paint_over(finished / file)
    # Of equal sizes: the names and sizes of the images tell nothing.
    data = json.loads((tmp_path / "out/settings.json").read_text())["data"]
    tests = {"images": data["test_images"], "files_digest": data["test_files_digest"]}
    monkeypatch.setattr(
        folder,
        "describe_images",
        lambda found, images: data | (tests if images is found.test else {}),
    )
    with pytest.raises(
        TrainingError, match=f"out was made with other settings or data: {what}. Choose"
    ):
        run(read_dataset(finished), tmp_path / "out", tmp_path)


def test_changed_sizes_are_told_without_digests(finished, tmp_path):
    save_picture(finished / "cloth/test/good/000.png", 7, (64, 64))
    with pytest.raises(TrainingError, match="data: the test images have other names or"):
        run(read_dataset(finished), tmp_path / "out", tmp_path)


def test_a_table_of_an_older_version_goes_on_and_gets_a_record_of_files(tree, tmp_path):
    out = tmp_path / "out"
    run(read_dataset(tree), out, tmp_path, only=["on"])
    for file, settings in (("settings.json", None), ("runs/on-seed0/metrics.json", "settings")):
        values = json.loads((out / file).read_text())
        record = values[settings] if settings else values
        del record["files"], record["model"]["diversity"]
        record["data"]["contents"] = {"bolt": {"train": "digest of the bytes"}}
        (out / file).write_text(json.dumps(values))
    told: list[str] = []
    run(read_dataset(tree), out, tmp_path, only=["on"], tell=told.append)
    assert told == ["finished before: 1 of 1 runs"]
    paint_over(tree / "bolt/ground_truth/hole/000_mask.png")
    with pytest.raises(TrainingError, match="the test masks of bolt are others"):
        run(read_dataset(tree), out, tmp_path)


def test_a_table_elsewhere_of_equal_data_goes_on(finished, tmp_path):
    # Each file at a time of its own.
    shutil.copytree(finished, tmp_path / "moved", copy_function=shutil.copyfile)
    assert not run(read_dataset(tmp_path / "moved"), tmp_path / "out", tmp_path).failed


def test_unreadable_files_are_told_before_any_run_and_stand_in_the_table(tree, tmp_path):
    broken = [
        *(tree / "bolt/ground_truth/hole/001_mask.png", tree / "cloth/test/good/000.png"),
        tree / "cloth/train/good/002.png",
    ]
    for path in broken:
        path.write_bytes(path.read_bytes()[:60])
    told: list[str] = []
    result = run(read_dataset(tree), tmp_path / "out", tmp_path, tell=told.append)
    assert str(broken[0]) in told[0] and "and 2 more" in told[0]
    text = (tmp_path / "out/table.md").read_text()
    for path in broken:
        assert str(path) in text and any(str(path) in line for line in result.left_out)
    assert len(content(tmp_path / "out")["data"]["left_out"]) == len(result.left_out) == 3


@pytest.mark.parametrize(
    ("folder", "what"),
    [("train/good", "training"), ("ground_truth/hole", "test"), ("test/*", "test")],
    ids=["train", "masks", "test"],
)
def test_a_class_that_cannot_be_read_is_refused_before_any_run(tree, tmp_path, folder, what):
    if folder.startswith("ground"):
        for path in (tree / "bolt/test/good").iterdir():
            path.unlink()
    for path in (tree / "bolt").glob(f"{folder}/*"):
        path.write_bytes(b"no image")
    with pytest.raises(ValueError, match=f"no {what} image of bolt can be read: .*not an image"):
        run(read_dataset(tree), tmp_path / "out", tmp_path)
    assert not (tmp_path / "out/settings.json").exists()


def test_a_second_command_in_the_folder_is_refused(dataset, tmp_path):
    with (
        lock_folder(tmp_path / "out"),
        pytest.raises(TrainingError, match="another command works in"),
    ):
        run(dataset, tmp_path / "out", tmp_path)
    assert not run(dataset, tmp_path / "out", tmp_path, only=["on"]).failed


def test_a_folder_that_cannot_be_made_is_told(dataset, tmp_path):
    with pytest.raises(TrainingError, match="cannot write the table in '/proc/none'"):
        run(dataset, Path("/proc/none"), tmp_path)


def test_a_killed_command_leaves_the_folder_free(dataset, tmp_path):
    code = (
        "import pathlib, sys; from rlr_fast.files import lock_folder\n"
        "with lock_folder(pathlib.Path(sys.argv[1])):\n"
        "    print('in', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"in\n"
        with pytest.raises(TrainingError, match="another command works in"):
            run(dataset, tmp_path / "out", tmp_path)
        other.kill()
    assert not run(dataset, tmp_path / "out", tmp_path, only=["on"]).failed


def test_a_folder_that_cannot_be_locked_is_told(dataset, tmp_path, monkeypatch, caplog):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    assert not run(dataset, tmp_path / "out", tmp_path, only=["on"]).failed
    assert "let no other command work there" in caplog.text


def test_a_full_disk_names_the_table_and_what_to_do(finished, tmp_path, monkeypatch):

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(TrainingError, match=r"No space .*table\.json.* the same command goes on"):
        run(read_dataset(finished), tmp_path / "out", tmp_path, only=["on"])


def test_a_full_disk_in_training_asks_for_no_flag_that_the_command_lacks(
    dataset, tmp_path, monkeypatch
):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_dir, "write_tensors", full)
    told: list[str] = []
    assert run(dataset, tmp_path / "out", tmp_path, only=["on"], tell=told.append).failed
    assert "make room and resume" in told[0] and "--resume" not in told[0]


def test_the_command(tree, tmp_path, capsys):
    out = str(tmp_path / "out")
    argv = ["paper", "perturbation", str(tree), "--out", out, "--preset", "tiny"]
    argv += ["--backbone-weights", "random", "--image-size", "32", "--hidden", "16", "--heads", "2"]
    argv += ["--cache-dir", str(tmp_path / "cache"), "--device", "cpu", "--seeds", "1", "--quiet"]
    assert main([*argv, "--epochs", "1"]) == 0
    printed = capsys.readouterr().out
    assert "off, seed 0: I-AUROC" in printed and "table.md" in printed
    assert main([*argv, "--epochs", "2"]) == 2
    assert "epochs was 1, now 2" in capsys.readouterr().err
    assert main(["paper", "6", str(tree), "--out", out]) == 2
    assert '"perturbation"' in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        *("{}", "[]", "{", "7", "null"),
        '{"table": "perturbation", "model": [], "recipe": {}, "data": {}}',
        '{"table": "perturbation", "model": {}, "recipe": 5, "data": {}}',
        '{"table": "perturbation", "model": {}, "recipe": {}, "data": "here"}',
        '{"table": 3, "model": {}, "recipe": {}, "data": {}}',
    ],
)
def test_a_damaged_record_of_the_table_is_named(text, dataset, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "settings.json").write_text(text)
    with pytest.raises(TrainingError, match=r"settings\.json cannot be read"):
        run(dataset, out, tmp_path)
