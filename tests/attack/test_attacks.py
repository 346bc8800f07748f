"""A short part of each attack; the long ones are ``python -m tests.attack``."""

from __future__ import annotations

import numpy as np
import pytest

from rlr_fast.functional import unsupported_reason
from tests.attack import figures, files, kills, operators, together
from tests.attack.lab import Lab, quick

# Of each attack on files: enough to meet most kinds of damage.
TRIES = {"images": 64, "masks": 12, "split tables": 20, "YAML files": 20, "config.json": 12}
FEW = 6


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    with quick():
        yield Lab(tmp_path_factory.mktemp("attack") / "lab")


@pytest.mark.parametrize("name", files.SUBJECTS)
def test_damaged_files_end_in_a_result_or_in_a_line(lab, name):
    subject, _ = files.SUBJECTS[name]
    found = list(subject(lab, np.random.default_rng(1), TRIES.get(name, FEW)))
    assert [fault for fault, _ in found] == []


@pytest.mark.parametrize(
    "place", [0, 1, 2, 3, 6], ids=["train", "features", "eval", "predict", "resumed"]
)
def test_the_same_command_goes_on_after_a_kill(lab, place):
    job = kills.jobs(lab)[place]
    found = list(kills.killed(job, np.random.default_rng(place), 1))
    assert [fault for fault, _ in found] == []


@pytest.mark.parametrize("subject", [together.two_in_one_folder, together.one_cache])
def test_commands_at_once(lab, subject):
    assert list(subject(lab, np.random.default_rng(1), 2)) == []


def test_a_file_that_cannot_be_written_to_its_end(lab):
    assert list(together.long_files(lab, np.random.default_rng(2), 3)) == []


def test_two_hundred_open_files_are_enough(lab):
    assert list(together.few_files(lab, np.random.default_rng(2), 1)) == []


def test_the_portable_operators_on_random_problems():
    assert list(operators.tiled(np.random.default_rng(0), 60)) == []
    assert list(operators.not_finite(np.random.default_rng(0), 40)) == []


@pytest.mark.skipif(unsupported_reason("triton", "cpu") is not None, reason="no interpreter")
def test_the_kernels_on_a_random_problem():
    assert list(operators.kernels(np.random.default_rng(0), 1)) == []


def test_metrics_on_degenerate_scores():
    assert list(figures.metrics(np.random.default_rng(0), 60)) == []
