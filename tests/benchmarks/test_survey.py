"""The survey: what users would launch compiles and fits, for GPUs that nobody has to have."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("triton", reason="compiling the kernels needs Triton")


def survey(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, with Triton's compiler and not its interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    files = ("--rows", str(folder / "rows.jsonl"), "--record", str(folder / "record.json"))
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.survey", *files, *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def sample(tmp_path_factory) -> dict[str, Any]:
    """Kernels of six kinds in float32, the default precision, for a GPU of little memory."""
    folder = tmp_path_factory.mktemp("survey")
    done = survey(folder, "--arch", "86", "--dtype", "fp32", "--sample", "6", "--jobs", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    return {"folder": folder, "rows": rows, "printed": done.stdout}


def test_a_sample_of_the_survey_compiles_and_fits(sample):
    (record,) = json.loads((sample["folder"] / "record.json").read_text()).values()
    (group,) = record["groups"]
    assert record["kernels"] == 6 < record["of"]
    assert (group["arch"], group["dtype"], group["kernels"]) == (86, "fp32", 6)
    assert group["refused"] == []
    assert 0 < group["shared"] <= group["shared_most"] == 101376
    assert len({row["kernel"] for row in sample["rows"]}) == 6  # as different as can be


def test_a_survey_that_was_stopped_goes_on(sample):
    rows = sample["folder"] / "rows.jsonl"
    lines = rows.read_text().splitlines(keepends=True)
    rows.write_text("".join(lines[:-1]) + lines[-1][:20])  # killed while it wrote
    done = survey(sample["folder"], "--arch", "86", "--dtype", "fp32", "--sample", "6")
    assert "6 chosen, 5 known" in done.stdout
    assert done.returncode == 0, done.stdout + done.stderr


SCRIPT = """
import json
from benchmarks import survey

sound = {"arch": 86, "shared": 101376, "tensor_memory": 0, "stack": 1536}
print(json.dumps([
    survey.refusal(sound | change)
    for change in ({}, {"shared": 101377}, {"tensor_memory": 576}, {"stack": 1544}, {"error": "x"})
]))
"""


def test_what_does_not_fit_is_refused():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, check=True
    )
    sound, shared, columns, stack, error = json.loads(done.stdout)
    assert sound == ""
    assert shared == "101377 bytes of shared memory, of 101376"
    assert columns == "576 columns of tensor memory, of 512"
    assert stack == "1544 bytes of stack, of 1536"
    assert error == "x"


# Compiled as users of these GPUs met them.
REFUSED = """
import json, torch
from benchmarks import survey
from benchmarks.launches import Shape

cases = (
    ("lca-backward", Shape((64, 64), 16, (11, 11)), "fp32", 86),
    ("lca-backward", Shape((64, 64), 16, (11, 11)), "fp32", 120),
    ("lca-backward", Shape((64, 64), 16, (13, 13)), "bf16", 100),
    ("mlka-forward", Shape((9, 9), 64, (5, 5)), "bf16", 90),
    ("mlka-forward", Shape((16, 16), 32, (11, 11)), "bf16", 90),
    ("mlka-backward-key", Shape((32, 32), 32, (7, 7)), "bf16", 80),
    ("lca-forward", Shape((16, 16), 128, (7, 7), batch=4), "bf16", 86),
)
rows = [survey.compile_task(survey.Task(k, s, 0, t, a)) for k, s, t, a in cases]
print(json.dumps([f"{row['kernel']} sm_{row['arch']}: {survey.refusal(row)}" for row in rows
                  if survey.refusal(row)]))
"""


def test_problems_that_were_refused_compile_and_fit():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", REFUSED], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []
