"""Files of flags: what they hold, what wins, and what is wrong with them."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from cli_cases import refused

from rlr_fast.cli import main


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 5000, "is nested too deeply"),
        ("classes: [[[bolt]]]", "'classes' must be a value, or a list of values"),
        ("workers: {a: 1}", "'workers' must be a value, or a list of values"),
        ("classes: !!set {bolt}", "'classes' must be a value, or a list of values"),
        ("workers: &a [*a]", "'workers' must be a value, or a list of values"),
    ],
)
def test_a_file_of_flags_that_is_nested_is_refused(tmp_path, capsys, text, message):
    (tmp_path / "flags.yaml").write_text(text)
    argv = ("data", "check", tmp_path, "--config", tmp_path / "flags.yaml")
    assert message in refused(capsys, *argv)


def test_aliases_in_a_file_of_flags_are_not_written_out(tmp_path, capsys):
    """A dozen lines of them name ten to the twelfth words."""
    lists = ", ".join(f"&{b} [{', '.join([f'*{a}'] * 10)}]" for a, b in pairwise("abcdefghijkl"))
    (tmp_path / "flags.yaml").write_text(f"workers: [&a [{', '.join('x' * 10)}], {lists}]")
    message = refused(capsys, "data", "check", tmp_path, "--config", tmp_path / "flags.yaml")
    assert "'workers' must be a value, or a list of values" in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image-size: []", "--image-size takes one value or more, got []"),
        ("scale: [0, 1, 2]", "--scale takes 2 values, got [0, 1, 2]"),
        (
            "batch-size: 1\nworkers: 2\nbatch-size: 4",
            "flags.yaml': 'batch-size' stands there twice",
        ),
        ("batch-size: 2020-13-45", "is not YAML: month must be in 1..12"),
    ],
)
def test_a_files_mistake_is_one_line(text, message, trained, tmp_path, capsys):
    (tmp_path / "flags.yaml").write_text(text)
    verb = ["train", trained / "data", "--out", tmp_path / "run"]
    if text.startswith("scale"):
        verb = ["predict", trained / "data", "--checkpoint", trained / "run", "--out", tmp_path]
    told = refused(capsys, *verb, "--config", tmp_path / "flags.yaml")
    assert message in told and len(told.splitlines()) == 1


def test_flags_win_over_the_file_and_the_file_over_the_preset(tmp_path, capsys):
    (tmp_path / "flags.yaml").write_text("alpha: 5\nimage-size: 64\nwindows: [3, 3x5]\nblocks: 1\n")
    arguments = ["--config", str(tmp_path / "flags.yaml"), "--preset", "tiny", "--blocks", "3"]
    assert main(["info", *arguments, "--backbone-weights", "random", "--json"]) == 0
    config = json.loads(capsys.readouterr().out)["model"]["config"]
    assert (config["alpha"], config["blocks"], config["image_size"]) == (5, 3, [64, 64])
    assert config["windows"] == [3, [3, 5]] and config["backbone"] == "tf_efficientnet_lite0"


def test_the_file_may_hold_every_flag_that_is_needed(trained, tmp_path):
    (tmp_path / "flags.yaml").write_text(
        f"checkpoint: {trained / 'run'}\nout: {tmp_path / 'out'}\n"
    )
    data = str(trained / "data")
    assert main(["eval", data, "--quiet", "--config", str(tmp_path / "flags.yaml")]) == 0
    assert (tmp_path / "out/metrics.json").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("alfa: 5", "did you mean 'alpha'"),
        ("alpha: many", "Invalid value for --alpha from --config"),
        ("preset: papr", 'Did you mean "paper"?'),
        ("quiet: 3", "--quiet is true or false"),
        ("[1, 2", "is not YAML"),
        ("- 1", "must hold flags and values"),
    ],
)
def test_mistakes_in_the_file_are_told(content, message, trained, tmp_path, capsys):
    (tmp_path / "flags.yaml").write_text(content)
    argv = ("train", trained / "data", "--out", tmp_path, "--config", tmp_path / "flags.yaml")
    assert message in refused(capsys, *argv)


@pytest.mark.parametrize(
    ("text", "seed"),
    [
        ("seed: 010\nsize: 32\ntrain: 1\n", 10),  # as it is written, not YAML's octal number
        ("<<: {seed: 7, size: 32, train: 1}\n", 7),
    ],
)
def test_a_files_values_are_taken_as_they_are_written(tmp_path, text, seed):
    (tmp_path / "flags.yaml").write_text(f"{text}classes: [tile]\n")
    argv = ["data", "make", str(tmp_path / "set"), "--config", str(tmp_path / "flags.yaml")]
    assert main([*argv, "--quiet"]) == 0
    assert json.loads((tmp_path / "set/dataset.json").read_text())["seed"] == seed


def test_a_flag_under_two_names_is_told(tmp_path, capsys):
    (tmp_path / "flags.yaml").write_text("image-size: 64\nimage_size: 128\n")
    message = refused(capsys, "info", "--config", tmp_path / "flags.yaml")
    assert "--image-size stands there twice, under two names" in message


def test_sides_may_stand_in_a_file_as_in_a_configuration(tmp_path, capsys):
    (tmp_path / "flags.yaml").write_text("tile: [96, 128]\noverlap: [8, 0]\npreset: tiny\n")
    argv = ["info", "--backbone-weights", "random", "--config", str(tmp_path / "flags.yaml")]
    assert main([*argv, "--json"]) == 0
    model = json.loads(capsys.readouterr().out)["model"]["config"]
    assert model["tile"] == [96, 128] and model["overlap"] == [8, 0]
