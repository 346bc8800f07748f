"""The paper's tables: what a row is, what is run again and what not, what stands in the table."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import BRIEF, SMALL

from rlr_fast import RLRConfig, TrainConfig, paper
from rlr_fast.cli import main
from rlr_fast.data import DataSet, read_dataset
from rlr_fast.files import write_atomically
from rlr_fast.loop import Loop
from rlr_fast.metrics import HEADINGS
from rlr_fast.paper import configure, run_table
from rlr_fast.paper_report import summary, to_csv, to_markdown
from rlr_fast.paper_tables import CLASSES, LEVELS, PER_LEVEL, TABLES, Row
from rlr_fast.run_folder import TrainingError
from rlr_fast.time_left import TimeLeft

CPU = torch.device("cpu")
SHORT = dataclasses.replace(BRIEF, epochs=2)
TABLE = TABLES["perturbation"]
FIELDS = {item.name for item in dataclasses.fields(RLRConfig)}


def run(dataset, out, tmp_path, table=TABLE, config=SMALL, recipe=SHORT, **options):
    options = {"seeds": 1, "quiet": True, "cache_root": tmp_path / "cache"} | options
    options = {"tell": lambda line: None, "device": CPU} | options
    return run_table(table, config, recipe, dataset, out, **options)


def content(out):
    return json.loads((out / "table.json").read_text())


# The data


@pytest.mark.parametrize("table", TABLES.values(), ids=lambda table: table.name)
def test_every_row_is_a_model(table):
    configs = [configure(table, row, RLRConfig()) for row in table.rows]
    assert len(set(configs)) == len({row.name for row in table.rows}) == len(configs)


@pytest.mark.parametrize("table", TABLES.values(), ids=lambda table: table.name)
def test_published_figures_are_percents_of_known_metrics_and_classes(table):
    published = [row.paper for row in table.rows] + [peer.figures for peer in table.peers]
    published += table.classes.values()
    assert set(table.classes) <= CLASSES[table.data]
    for figures in published:
        assert figures.keys() <= HEADINGS.keys()
        assert all(30 < value <= 100 for value in figures.values())
    assert all(peer.source for peer in table.peers)
    assert bool(table.source) == any(row.paper for row in table.rows)


def test_class_figures_of_visa_average_to_the_papers_mean():
    table = TABLES["2"]
    for key, mean in table.rows[0].paper.items():
        values = [figures[key] for figures in table.classes.values()]
        assert math.fsum(values) / 12 == pytest.approx(mean, abs=0.1)


def test_the_model_itself_is_a_row_of_each_ablation():
    for name in ("3", "4", "5", "windows", "perturbation"):
        assert any(
            configure(TABLES[name], r, RLRConfig()) == RLRConfig() for r in TABLES[name].rows
        )


def test_stages_take_their_own_values_from_the_base():
    row = TABLES["4"].rows[1]
    config = configure(TABLES["4"], row, RLRConfig())
    assert config.out_indices == (2, 3)
    assert (config.hidden, config.heads, config.windows) == ((256, 512), (8, 8), (7, 11))


def test_windows_of_the_bases_levels_are_taken():
    rows = TABLES["windows"].rows
    found = [configure(TABLES["windows"], row, SMALL).windows for row in rows]
    assert SMALL.out_indices == (2, 3) and found == [(7, 11), (7, 5)]
    assert all(len(row.changes["windows"]) == len(LEVELS) for row in rows)
    assert set(PER_LEVEL) <= FIELDS


def test_a_stage_that_the_base_does_not_describe_is_refused():
    with pytest.raises(ValueError, match=r"stages-1-2: hidden .*\(1, 2\), .*\(2, 3\)"):
        configure(TABLES["4"], TABLES["4"].rows[0], SMALL)


def test_a_field_that_the_model_lacks_is_refused():
    with pytest.raises(ValueError, match="no field 'colour'"):
        configure(TABLE, Row("red", "red", {"colour": "red"}), SMALL)


# Running


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
    assert result.seconds["features"] > 0


def test_what_is_finished_is_not_run_again(dataset, tmp_path, monkeypatch):
    run(dataset, tmp_path / "out", tmp_path)
    before = (tmp_path / "out/table.json").read_text()

    def never(*_, **__):
        raise AssertionError("trained again")

    monkeypatch.setattr(paper, "train", never)
    told: list[str] = []
    run(dataset, tmp_path / "out", tmp_path, tell=told.append)
    assert told == ["finished before: 2 of 2 runs"]
    assert (tmp_path / "out/table.json").read_text() == before


def test_an_interrupted_table_ends_as_an_uninterrupted_one(dataset, tmp_path, monkeypatch):
    run(dataset, tmp_path / "whole", tmp_path)
    save = Loop._save

    def stop_in_the_second_run(self, checkpoints):
        save(self, checkpoints)
        if self.model.config.perturbation == 0 and self.epoch == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Loop, "_save", stop_in_the_second_run)
    with pytest.raises(KeyboardInterrupt):
        run(dataset, tmp_path / "halves", tmp_path)
    assert [row["seeds"] for row in content(tmp_path / "halves")["rows"]] == [[0], []]
    monkeypatch.setattr(Loop, "_save", save)
    run(dataset, tmp_path / "halves", tmp_path)
    for name in ("table.json", "table.csv", "table.md"):
        assert (tmp_path / "whole" / name).read_text() == (tmp_path / "halves" / name).read_text()
    one, other = (
        safetensors.torch.load_file(tmp_path / out / "runs/off-seed0/model.safetensors")
        for out in ("whole", "halves")
    )
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("damage", ["{", '{"mean": {}}'], ids=["cut", "incomplete"])
def test_a_damaged_result_is_measured_again(dataset, tmp_path, damage):
    run(dataset, tmp_path / "out", tmp_path)
    before = (tmp_path / "out/table.json").read_text()
    (tmp_path / "out/runs/on-seed0/metrics.json").write_text(damage)
    run(dataset, tmp_path / "out", tmp_path)
    assert (tmp_path / "out/table.json").read_text() == before


def test_a_failed_run_is_told_and_the_others_go_on(dataset, tmp_path, monkeypatch):
    def full(path, text):
        if path == tmp_path / "out/runs/on-seed0/metrics.json":
            raise OSError(28, "No space left on device")
        write_atomically(path, text)

    monkeypatch.setattr(paper, "write_atomically", full)
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
def test_other_settings_are_refused_before_any_run(dataset, tmp_path, change, error, message):
    out = tmp_path / "out"
    record = run(dataset, out, tmp_path, only=["on"])
    assert not record.failed
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    with pytest.raises(error, match=message):
        run(dataset, out, tmp_path, **change)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_other_test_images_are_refused(tree, tmp_path):
    run(read_dataset(tree), tmp_path / "out", tmp_path, only=["on"])
    (tree / "bolt/test/good/000.png").unlink()
    with pytest.raises(TrainingError, match="test_images was 8, now 7"):
        run(read_dataset(tree), tmp_path / "out", tmp_path)


def test_the_command(tree, tmp_path, capsys):
    out = str(tmp_path / "out")
    argv = ["paper", "perturbation", str(tree), "--out", out, "--preset", "tiny", "--epochs", "1"]
    argv += ["--backbone-weights", "random", "--image-size", "32", "--hidden", "16", "--heads", "2"]
    argv += ["--cache-dir", str(tmp_path / "cache"), "--device", "cpu", "--seeds", "1", "--quiet"]
    assert main(argv) == 0
    printed = capsys.readouterr().out
    assert "off, seed 0: I-AUROC" in printed and "table.md" in printed and "features" in printed
    assert main([*argv, "--epochs", "2"]) == 2
    assert "epochs was 1, now 2" in capsys.readouterr().err
    assert main(["paper", "6", str(tree), "--out", out]) == 2
    assert "'perturbation'" in capsys.readouterr().err


# The table


def told(table, classes, seeds=(0, 1)):
    data = DataSet(Path("data"), "mvtec", {c: [] for c in classes}, {c: [] for c in classes})
    metrics = dict.fromkeys(HEADINGS, 0.5)
    one = {
        "mean": metrics,
        "classes": dict.fromkeys(classes, metrics),
        "protocol": {"image_score": "the maximum"},
        "environment": {},
    }
    finished = {row.name: dict.fromkeys(seeds, one) for row in table.rows}
    return summary(table, RLRConfig(), TrainConfig(), data, seeds, finished)


def test_the_papers_figures_stand_only_beside_its_data():
    table = TABLES["5"]
    on_it = to_markdown(told(table, sorted(CLASSES["MVTec-AD"])))
    assert "| α = 1 | 50.0 ± 0.0 | 98.3 | 50.0 ± 0.0 | 98.4 |" in on_it
    assert "MVTec-AD, 15 classes" in on_it and "Settings: the paper's." in on_it
    for classes in (sorted(CLASSES["VisA"]), ["bolt"], sorted(CLASSES["MVTec-AD"])[:14]):
        elsewhere = told(table, classes)
        text = to_markdown(elsewhere)
        assert "98.3" not in text and "| paper |" not in text and "98.3" not in to_csv(elsewhere)
        assert "measured this table on MVTec-AD" in text


def test_a_table_without_published_figures_claims_none():
    for classes in (["bolt"], sorted(CLASSES["MVTec-AD"])):
        text = to_markdown(told(TABLES["windows"], classes))
        assert "no figures" in text and "measured this table" not in text and "paper |" not in text


def test_tables_1_and_2_show_classes_and_peers():
    for name, peer in (("1", "| OmniAL | 97.2 |"), ("2", "| JNLD | 87.1 |")):
        table = TABLES[name]
        text = to_markdown(told(table, sorted(CLASSES[table.data])))
        assert peer in text and "second hand" in text
        for category, figures in table.classes.items():
            line = next(t for t in text.splitlines() if t.startswith(f"| {category} |"))
            assert line.endswith(f"| {figures['image_auroc']:.1f} | {figures['pixel_auroc']:.1f} |")
    text = to_markdown(told(TABLES["1"], ["bolt"]))
    assert "| bolt | 50.0 ± 0.0 |" in text and "OmniAL" not in text


def test_csv_has_a_line_for_each_row_class_and_source():
    table = TABLES["1"]
    lines = list(csv.DictReader(to_csv(told(table, sorted(CLASSES["MVTec-AD"]))).splitlines()))
    ours = [line for line in lines if line["source"] == "this table"]
    assert len(ours) == 16 and ours[0]["class"] == "mean" and ours[0]["aupro"] == "50.0"
    assert len(lines) == 16 + 1 + len(table.classes) + len(table.peers)


def test_one_seed_has_no_deviation():
    assert "±" not in to_markdown(told(TABLES["5"], ["bolt"], seeds=(3,))).split("row |", 1)[1]


# The time left


def test_time_left_is_unknown_then_measured():
    now = [0.0]

    def after(seconds):
        now[0] += seconds

    left = TimeLeft(["slow", "fast", "slow"], 100, lambda: now[0])
    left.begin()
    after(30)
    left.did("features", 50)
    assert left.left() is None
    after(5)
    left.did("train", 0)
    assert left.left() is None
    after(20)
    left.did("train", 10)
    assert left.left() == (90 * 2 + 200 * 2, False)  # two seconds an image, evaluation unknown
    after(180)
    left.did("train", 90)
    after(15)
    left.end(finished=True)
    assert left.left() == (2 * 200 + 2 * 20, True)  # the features do not come again
    left.begin()
    left.did("train", 40)  # an earlier call's
    after(10)
    left.did("train", 10)
    assert left.left() == (50 * 1 + 100 * 2 + 2 * 20, True)
    assert left.seconds() == {"features": 30, "train": 210, "rest": 20}


@pytest.mark.parametrize("text", ["{}", "[]", "{"])
def test_a_damaged_record_of_the_table_is_named(text, dataset, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "settings.json").write_text(text)
    with pytest.raises(TrainingError, match=r"settings\.json cannot be read"):
        run(dataset, out, tmp_path)
