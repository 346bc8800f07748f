"""The verbs figures and decoder train."""

from __future__ import annotations

import json
import shutil

import pytest
import safetensors.torch
import torch
from cli_cases import refused
from PIL import Image

from rlr_fast.cli import main
from rlr_fast.files import write_atomically
from rlr_fast.models.checkpoint import read_weights, sealed
from rlr_fast.visualization import comparison_sheet, reconstructions


@pytest.fixture(scope="module")
def decoder(trained):
    """A decoder trained by the command."""
    argv = ["decoder", "train", str(trained / "data"), "--checkpoint", str(trained / "run")]
    file = trained / "decoder.safetensors"
    assert main([*argv, "--out", str(file), "--epochs", "2", "--quiet"]) == 0
    rows = [json.loads(row) for row in file.with_suffix(".jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2] and rows[1]["loss"] < rows[0]["loss"]
    return file


def test_figures_of_one_run_and_of_two(trained, decoder, tmp_path, capsys):
    shutil.copytree(trained / "run", tmp_path / "again")
    argv = ["figures", str(trained / "data"), "--out", str(tmp_path / "out"), "--quiet"]
    argv += ["--checkpoint", str(trained / "run")]
    assert main([*argv, "--level", "3"]) == 0
    assert "2 sheets" in capsys.readouterr().out
    with Image.open(tmp_path / "out/bolt.png") as sheet:
        size = sheet.size
    assert main([*argv, str(tmp_path / "again"), "--decoder", str(decoder)]) == 0
    with Image.open(tmp_path / "out/bolt.png") as sheet:
        assert sheet.width > 1.8 * size[0] and sheet.height >= size[1]
    capsys.readouterr()
    assert main([*argv, "--classes", "cloth", "--per-defect", "2"]) == 0
    assert capsys.readouterr().out.startswith("1 sheet: ")
    with Image.open(tmp_path / "out/cloth.png") as sheet:
        assert sheet.height > 1.5 * size[1]


@pytest.fixture
def shown(monkeypatch):
    """The runs' names and the rows of each sheet that is written."""
    sheets = {}

    def spy(rows, runs, title, *rest):
        sheets[title] = [name for name, _ in runs], rows
        return comparison_sheet(rows, runs, title, *rest)

    monkeypatch.setattr(reconstructions, "comparison_sheet", spy)
    return sheets


def test_figures_name_runs_by_as_much_of_their_paths_as_tells_them_apart(
    trained, tmp_path, shown, monkeypatch, capsys
):
    for name in ("one", "two"):
        shutil.copytree(trained / "run", tmp_path / name / "run")
    argv = ["figures", str(trained / "data"), "--out", str(tmp_path / "out"), "--quiet"]
    argv += ["--classes", "bolt", "--checkpoint"]
    monkeypatch.chdir(tmp_path / "two/run")
    assert main([*argv, ".", str(tmp_path / "one/run")]) == 0
    assert shown["bolt"][0] == ["two/run", "one/run"]
    assert main([*argv, "."]) == 0
    assert shown["bolt"][0] == ["run"]
    assert "names the same run twice" in refused(capsys, *argv, ".", tmp_path / "two/run/")


def test_figures_show_each_runs_own_maps_and_scores(trained, tmp_path, shown, capsys):
    shutil.copytree(trained / "run", tmp_path / "other")
    state, metadata = read_weights(tmp_path / "other/model.safetensors")
    state = {k: v + 0.1 if v.is_floating_point() else v for k, v in state.items()}
    metadata = sealed(state, metadata)
    safetensors.torch.save_file(state, tmp_path / "other/model.safetensors", metadata)
    argv = ["figures", str(trained / "data"), "--out", str(tmp_path / "out"), "--quiet"]
    runs = [str(trained / "run"), str(tmp_path / "other")]
    found = {}
    for order in (runs[:1], runs[1:], runs, runs[::-1]):
        assert main([*argv, "--checkpoint", *order]) == 0
        names, rows = shown["bolt"]
        for i, name in enumerate(names):
            scores = [row.runs[i].score for row in rows]
            assert scores == pytest.approx(found.setdefault(name, scores))
    assert found["run"] != found["other"]


def test_figures_show_the_next_image_for_an_unreadable_one(trained, tmp_path, shown, capsys):
    shutil.copytree(trained / "data", tmp_path / "data")
    (tmp_path / "data/bolt/test/hole/000.png").write_bytes(b"no image")
    (tmp_path / "data/cloth/ground_truth/hole/000_mask.png").write_bytes(b"no mask")
    argv = ["figures", str(tmp_path / "data"), "--checkpoint", str(trained / "run"), "--quiet"]
    assert main([*argv, "--out", str(tmp_path / "out")]) == 1
    told = capsys.readouterr().err
    assert "bolt/test/hole/000.png" in told and "cloth/ground_truth/hole/000_mask.png" in told
    for name in ("bolt", "cloth"):
        assert [row.defect for row in shown[name][1]] == ["good", "hole"]


def test_figures_find_what_stops_them_before_any_sheet(trained, tmp_path, capsys):
    shutil.copytree(trained / "data", tmp_path / "data")
    argv = ["figures", tmp_path / "data", "--checkpoint", trained / "run", "--quiet"]
    argv += ["--out", tmp_path / "out"]
    mask = tmp_path / "data/cloth/ground_truth/hole/000_mask.png"
    Image.new("L", (8, 8)).save(mask)
    assert "a mask must have the size of its image" in refused(capsys, *argv)
    for path in (tmp_path / "data/cloth/test").glob("*/*"):
        path.write_bytes(b"no image")
    assert "no test image of cloth can be read" in refused(capsys, *argv)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text",
    [
        *("[]", "{}", '{"pixel": 3}', '{"pixel": {"0.5": 1}}'),
        '{"pixel": {"0.5": "low", "0.999": 2}}',
        '{"pixel": {"0.5": 2, "0.999": 2}}',
        '{"pixel": {"0.5": [1], "0.999": 2}}',
    ],
)
def test_a_damaged_calibration_is_named(text, trained, tmp_path, capsys):
    shutil.copytree(trained / "run", tmp_path / "run")
    (tmp_path / "run/calibration.json").write_text(text)
    argv = ("figures", trained / "data", "--checkpoint", tmp_path / "run", "--out", tmp_path / "o")
    assert "calibration.json cannot be read" in refused(capsys, *argv)


def test_figures_refuse_runs_of_other_features_and_unknown_levels(trained, tmp_path, capsys):
    shutil.copytree(trained / "run", tmp_path / "pooled")
    values = json.loads((tmp_path / "pooled/config.json").read_text())
    write_atomically(tmp_path / "pooled/config.json", json.dumps(values | {"neighborhood": 1}))
    argv = ("figures", trained / "data", "--out", tmp_path / "out", "--checkpoint", trained / "run")
    message = refused(capsys, *argv, tmp_path / "pooled")
    assert "features of run and pooled differ: neighborhood 3 and 1" in message
    assert "one or two runs, got 3" in refused(capsys, *argv, trained / "run", trained / "run")
    assert "level must be one of the runs' out_indices 2, 3" in refused(
        capsys, *argv, "--level", "7"
    )
    assert "is no decoder" in refused(capsys, *argv, "--decoder", trained / "run/model.safetensors")
    assert not (tmp_path / "out").exists()


def test_decoder_train_refuses_a_wrong_file_before_any_work(trained, tmp_path, capsys):
    argv = ("decoder", "train", trained / "data", "--checkpoint", trained / "run", "--out")
    assert "named *.safetensors" in refused(capsys, *argv, tmp_path / "decoder.pt")
    assert "lr must be positive" in refused(
        capsys, *argv, tmp_path / "d.safetensors", "--lr", "0", "--quiet"
    )
    assert "something else" in refused(capsys, *argv, trained / "run/model.safetensors")
    assert "/proc/none" in refused(capsys, *argv, "/proc/none/d.safetensors")


def test_decoders_of_one_seed_are_equal_to_the_byte(trained, tmp_path):
    argv = ["decoder", "train", str(trained / "data"), "--checkpoint", str(trained / "run")]
    argv += ["--quiet", "--epochs", "1", "--device", "cpu"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for out, *options in (
            ("a", "--workers", "1"),
            ("b", "--workers", "3"),
            ("c", "--seed", "1"),
        ):
            file = str(tmp_path / f"{out}.safetensors")
            assert main([*argv, "--out", file, *options]) == 0
    finally:
        torch.set_num_threads(threads)
    one, again, other = ((tmp_path / f"{out}.safetensors").read_bytes() for out in "abc")
    assert one == again and one != other
