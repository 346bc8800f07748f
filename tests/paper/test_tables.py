"""The tables: what a row is, and what the paper has in its place."""

from __future__ import annotations

import dataclasses
import math

import pytest
from conftest import SMALL

from rlr_fast import RLRConfig
from rlr_fast.config import PER_LEVEL
from rlr_fast.inference.metrics import HEADINGS
from rlr_fast.paper import configure
from rlr_fast.paper.tables import CLASSES, LEVELS, TABLES, Row

FIELDS = {item.name for item in dataclasses.fields(RLRConfig)}


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
    assert (config.hidden, config.heads, config.windows) == ((256, 512), (8, 8), ((7, 7), (11, 11)))
    assert configure(TABLES["4"], row, RLRConfig(patches=(4, 2, 1))).patches == (2, 1)


def test_windows_of_the_bases_levels_are_taken():
    rows = TABLES["windows"].rows
    found = [configure(TABLES["windows"], row, SMALL).windows for row in rows]
    assert SMALL.out_indices == (2, 3) and found == [((7, 7), (11, 11)), ((7, 7), (5, 5))]
    assert all(len(row.changes["windows"]) == len(LEVELS) for row in rows)
    assert set(PER_LEVEL) <= FIELDS


def test_a_stage_that_the_base_does_not_describe_is_refused():
    with pytest.raises(ValueError, match=r"stages-1-2: hidden .*\(1, 2\), .*\(2, 3\)"):
        configure(TABLES["4"], TABLES["4"].rows[0], SMALL)


def test_a_field_that_the_model_lacks_is_refused():
    with pytest.raises(ValueError, match="no field 'colour'"):
        configure(TABLES["perturbation"], Row("red", "red", {"colour": "red"}), SMALL)
