"""What stands in a table: figures, deviations, the paper's beside them."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import pytest

from rlr_fast import RLRConfig, TrainConfig
from rlr_fast.data import DataSet
from rlr_fast.inference.metrics import HEADINGS
from rlr_fast.paper import folder
from rlr_fast.paper.report import summary, to_csv, to_markdown, write_report
from rlr_fast.paper.tables import CLASSES, TABLES

TABLE = TABLES["perturbation"]


def known(table, classes, seeds=(0, 1)):
    """What `write_report` and `summary` take: model, recipe, data, seeds, results, failures."""
    data = DataSet(Path("data"), "mvtec", {c: [] for c in classes}, {c: [] for c in classes})
    metrics = dict.fromkeys(HEADINGS, 0.5)
    one = folder.Metrics(
        settings=folder.Settings({}, {}, {}),
        mean=metrics,
        classes=dict.fromkeys(classes, metrics),
        protocol={"image_score": "the maximum"},
        environment={},
        failures=[],
    )
    finished = {row.name: dict.fromkeys(seeds, one) for row in table.rows}
    return RLRConfig(), TrainConfig(), data, seeds, finished, []


def told(table, classes, seeds=(0, 1)):
    return summary(table, *known(table, classes, seeds))


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


def test_the_data_are_named_by_folder_and_classes():
    known = sorted(CLASSES["MVTec-AD"])
    for classes, about in (
        (known, "MVTec-AD, 15 classes; "),
        (
            [name for name in known if name != "pill"],
            "14 of the 15 classes of MVTec-AD, without pill; ",
        ),
        (["bolt"], "1 class, not those of the paper's data sets; "),
    ):
        assert f"\nData: {Path('data').absolute()}: {about}" in to_markdown(
            told(TABLES["5"], classes)
        )


@pytest.mark.parametrize("classes", [["bolt"], sorted(CLASSES["VisA"])], ids=["own", "VisA"])
def test_titles_claim_no_data_set(classes):
    text = to_markdown(told(TABLES["1"], classes))
    assert text.startswith("# Table 1: the model itself\n")
    assert all(data not in table.title for table in TABLES.values() for data in CLASSES)


def test_the_strength_of_the_perturbation_that_ran_is_told():
    base = RLRConfig(perturbation=1.5)
    data = DataSet(Path("data"), "mvtec", {"bolt": []}, {"bolt": []})
    finished = {row.name: {} for row in TABLE.rows}
    text = to_markdown(summary(TABLE, base, TrainConfig(), data, [0], finished, []))
    assert "strength s = 1.5 (eq. 3)" in text
    assert "- perturbation 1.5 (paper: 4.0)" in text
    assert "strength s = 4 (eq. 3)" in to_markdown(told(TABLE, ["bolt"]))


def test_names_of_classes_break_neither_markdown_nor_csv():
    classes = ["a|b", "c\nd", 'e,"f"', "mean"]
    content = told(TABLES["1"], classes)
    lines = to_markdown(content).splitlines()
    start = lines.index("## By class") + 2
    grid = lines[start : start + 2 + len(classes) + 1]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in grid} == {2 + len(HEADINGS)}
    assert grid[2].startswith("| a\\|b | ") and grid[3].startswith("| c d | ")
    assert grid[5].startswith("| mean | ") and grid[6].startswith("| mean | ")
    read = list(csv.DictReader(io.StringIO(to_csv(content))))
    assert [line["class"] for line in read] == ["mean", *classes]


def test_names_of_bytes_that_are_no_text_are_written(tmp_path):
    write_report(tmp_path, TABLES["1"], *known(TABLES["1"], ["bo\udcfflt"]))
    content = json.loads((tmp_path / "table.json").read_text(encoding="utf-8"))
    assert content["data"]["classes"] == ["bo\udcfflt"]
    for name in ("table.csv", "table.md"):
        assert "bo\\udcfflt" in (tmp_path / name).read_text(encoding="utf-8")


def test_one_epoch_is_not_the_last_of_some():
    data = DataSet(Path("data"), "mvtec", {"bolt": []}, {"bolt": []})
    finished = {row.name: {} for row in TABLE.rows}
    text = to_markdown(summary(TABLE, RLRConfig(), TrainConfig(epochs=1), data, [0], finished, []))
    assert "Ours: after one epoch, in percent" in text


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
