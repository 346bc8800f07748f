"""Products of float32 follow PyTorch's settings, by whichever interface they were made."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

# Settings are a process's own: each list of them is made in a fork.
SCRIPT = """
import json, os, sys, warnings, torch
from rlr_fast.kernels import _launch
warnings.simplefilter("ignore")
for settings in json.loads(sys.argv[1]):
    if os.fork() == 0:
        for line in settings:
            exec(line)
        print(_launch.precision(torch.float32), _launch.precision(torch.bfloat16), flush=True)
        os._exit(0)
    os.wait()
"""
OLD = "torch.set_float32_matmul_precision({!r})"
ALLOW = "torch.backends.cuda.matmul.allow_tf32 = {}"
MATMUL = "torch.backends.cuda.matmul.fp32_precision = {!r}"
GLOBAL = "torch.backends.fp32_precision = {!r}"


CASES: dict[str, tuple[list[str], str]] = {
    "default": ([], "tf32x3"),
    "old-high": ([OLD.format("high")], "tf32"),
    "old-medium": ([OLD.format("medium")], "tf32"),
    "old-highest": ([OLD.format("high"), OLD.format("highest")], "tf32x3"),
    "allow": ([ALLOW.format(True)], "tf32"),
    "disallow": ([ALLOW.format(True), ALLOW.format(False)], "tf32x3"),
    # From here on the older interface raises, or contradicts the newer one.
    "new-tf32": ([MATMUL.format("tf32")], "tf32"),
    "new-everywhere": ([GLOBAL.format("tf32")], "tf32"),
    "old-high-new-ieee": ([OLD.format("high"), MATMUL.format("ieee")], "tf32x3"),
    "everywhere-but-products": ([GLOBAL.format("tf32"), MATMUL.format("ieee")], "tf32x3"),
    "products-alone": ([GLOBAL.format("ieee"), MATMUL.format("tf32")], "tf32"),
}


@pytest.fixture(scope="module")
def precisions() -> dict[str, list[str]]:
    """What the kernels compute in, float32 and bfloat16, by case."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps([settings for settings, _ in CASES.values()])],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(CASES), done.stderr
    return {name: line.split() for name, line in zip(CASES, lines, strict=True)}


@pytest.mark.parametrize("case", CASES)
def test_float32_products_follow_pytorch(precisions, case):
    assert precisions[case] == [CASES[case][1], "ieee"]
