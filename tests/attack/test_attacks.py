"""A short part of each attack; the long ones are ``python -m tests.attack``."""

from __future__ import annotations

import os

import numpy as np
import pytest
from forks import Forks

from rlr_fast.functional import unsupported_reason
from tests.attack import figures, files, operators
from tests.attack.lab import Lab, quick

# Of each attack on files: enough to meet most kinds of damage.
TRIES = {"images": 64, "masks": 12, "split tables": 20, "YAML files": 20, "config.json": 12}
FEW = 6


@pytest.fixture(scope="module")
def untouched():
    """A process in which PyTorch's threads never ran: what is forked while they run may hang."""
    with Forks(["tests.attack.__main__"], os.environ) as process:
        yield process


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
    "words",
    [
        ["kills", "--count", "1", "--only", ", "],  # those that go on where they were
        ["power", "--count", "10", "--only", "train"],
        ["together", "--count", "4", "--only", "w"],  # of all but those of sizes and disks
    ],
    ids=["kills", "power", "together"],
)
def test_commands_that_are_killed_or_meet_each_other(untouched, words):
    done = untouched.main("tests.attack.__main__", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\n") > 1, "nothing has that name"


def test_the_portable_operators_on_random_problems():
    assert list(operators.tiled(np.random.default_rng(0), 60)) == []
    assert list(operators.not_finite(np.random.default_rng(0), 40)) == []


@pytest.mark.skipif(unsupported_reason("triton", "cpu") is not None, reason="no interpreter")
def test_the_kernels_on_a_random_problem():
    assert list(operators.kernels(np.random.default_rng(0), 1)) == []


def test_metrics_on_degenerate_scores():
    assert list(figures.metrics(np.random.default_rng(0), 60)) == []
