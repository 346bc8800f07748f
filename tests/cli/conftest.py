"""A run that the tests of the command share."""

from __future__ import annotations

import shutil

import pytest
from cli_cases import FLAGS
from conftest import make_tree

from rlr_fast.cli import main


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A data set and a run trained on it by the command."""
    root = tmp_path_factory.mktemp("cli")
    data = make_tree(root / "data")
    arguments = ["train", str(data), "--out", str(root / "run"), "--cache-dir", str(root / "cache")]
    assert main([*arguments, *FLAGS]) == 0
    return root


@pytest.fixture
def calibrated(trained, tmp_path):
    """A copy of the run, calibrated on the normal test images: two per class."""
    run = tmp_path / "calibrated"
    shutil.copytree(trained / "run", run)
    argv = ["calibrate", str(trained / "data"), "--split", "test", "--checkpoint", str(run)]
    assert main([*argv, "--quiet"]) == 0
    return run
