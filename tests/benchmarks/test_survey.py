"""The survey: what users would launch compiles and fits, for GPUs that nobody has to have."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("triton", reason="compiling the kernels needs Triton")

from benchmarks import survey

SIX = ("--arch", "86", "--dtype", "fp32", "--sample", "6")


@pytest.fixture(scope="module")
def sample(compiler, tmp_path_factory) -> dict[str, Any]:
    """Kernels of six kinds in float32, the default precision, for a GPU of little memory."""
    folder = tmp_path_factory.mktemp("survey")
    files = ("--rows", folder / "rows.jsonl", "--record", folder / "record.json")
    done = compiler.main("benchmarks.survey", *files, *SIX, "--jobs", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    return {"folder": folder, "files": files, "rows": rows}


def test_a_sample_of_the_survey_compiles_and_fits(sample):
    (record,) = json.loads((sample["folder"] / "record.json").read_text()).values()
    (group,) = record["groups"]
    assert record["kernels"] == 6 < record["of"]
    assert (group["arch"], group["dtype"], group["kernels"]) == (86, "fp32", 6)
    assert group["refused"] == []
    assert 0 < group["shared"] <= group["shared_most"] == 101376
    assert len({row["kernel"] for row in sample["rows"]}) == 6  # as different as can be


def test_a_survey_that_was_stopped_goes_on(compiler, sample):
    rows = sample["folder"] / "rows.jsonl"
    lines = rows.read_text().splitlines(keepends=True)
    rows.write_text("".join(lines[:-1]) + lines[-1][:20])  # killed while it wrote
    done = compiler.main("benchmarks.survey", *sample["files"], *SIX)
    assert "6 chosen, 5 known" in done.stdout
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        ({}, ""),
        ({"shared": 101377}, "101377 bytes of shared memory, of 101376"),
        ({"tensor_memory": 576}, "576 columns of tensor memory, of 512"),
        ({"stack": 1544}, "1544 bytes of stack, of 1536"),
        ({"error": "x"}, "x"),
    ],
)
def test_what_does_not_fit_is_refused(change, refusal):
    sound = {"arch": 86, "shared": 101376, "tensor_memory": 0, "stack": 1536}
    assert survey.refusal(sound | change) == refusal


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


def test_problems_that_were_refused_compile_and_fit(compiler):
    assert compiler.values(REFUSED) == []
