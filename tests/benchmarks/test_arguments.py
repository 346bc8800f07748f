"""The commands of the maintainers: a mistake is a line of usage, and nothing recorded is lost."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import (
    check,
    codegen,
    false_alarms,
    kernels,
    report,
    survey,
    throughput,
    tiles,
)

ROOT = Path(report.__file__).parents[1]
README = f"before\n{report.BEGIN}\nfigures\n{report.END}\nafter\n"


@pytest.mark.parametrize(
    ("program", "words", "message"),
    [
        (survey, "--jobs 0", "--jobs: must be a whole number of at least 1, got '0'"),
        (survey, "--sample -5", "--sample: must be a whole number of at least 1, got '-5'"),
        (codegen, "--jobs 0", "--jobs: must be a whole number of at least 1, got '0'"),
        (kernels, "--batch 0", "--batch: must be a whole number of at least 1, got '0'"),
        (tiles, "--workers 0", "--workers: must be a whole number of at least 1, got '0'"),
        (check, "--workers 0", "--workers: must be a whole number of at least 1, got '0'"),
        (check, "--backend nope", "--backend: invalid choice"),
        (throughput, "--batch 0", "--batch: must be a whole number of at least 1, got '0'"),
        (throughput, "--data nope", "the data's root must be an existing folder, got 'nope'"),
        (false_alarms, "--share 1", "--share: must be a number between 0 and 1, got '1'"),
        (false_alarms, "--alpha x", "--alpha: must be a number between 0 and 1, got 'x'"),
        (false_alarms, "--splits 0", "--splits: must be a whole number of at least 1, got '0'"),
        (false_alarms, "--images 1 --splits 1", "too few normal images to split at --share 0.5"),
        (false_alarms, "--results nope.csv", "No such file or directory: 'nope.csv'"),
        (false_alarms, "--run nope", "there is no checkpoint folder 'nope'"),
        (report, "--readme nope.md", "No such file or directory: 'nope.md'"),
    ],
)
def test_a_mistake_is_told_before_any_work(program, words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        program.main(words.split())
    assert ended.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("readme", "files", "message"),
    [
        (README, {}, "there is no record in"),
        (README, {"a.json": "{"}, "a.json is damaged"),
        (README, {"a.json": "[1]"}, "there is no record in"),
        (f"{report.END}\n{report.BEGIN}", {}, "has no markers"),
    ],
)
def test_a_report_without_records_leaves_the_readme(readme, files, message, tmp_path, capsys):
    path = tmp_path / "README.md"
    path.write_text(readme)
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit):
        report.main(["--results", str(tmp_path), "--readme", str(path)])
    assert message in capsys.readouterr().err
    assert path.read_text() == readme


def test_a_part_of_the_survey_is_recorded_only_where_it_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(survey._launch, "INTERPRETING", False)
    monkeypatch.setattr(survey, "tasks", lambda arches, dtypes: {})
    monkeypatch.setattr(survey, "RECORD", tmp_path / "whole.json")
    rows = ["--rows", str(tmp_path / "rows.jsonl")]
    for part in (["--sample", "2"], ["--arch", "90"], ["--dtype", "bf16"]):
        survey.main([*rows, *part])
        assert not (tmp_path / "whole.json").exists()
        survey.main([*rows, *part, "--record", str(tmp_path / "part.json")])
        assert json.loads((tmp_path / "part.json").read_text())
    survey.main(rows)
    assert json.loads((tmp_path / "whole.json").read_text())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--benchmark-headline"], "--benchmark-headline is of --benchmark, which is not given"),
        (["--benchmark", "-n", "2"], "--benchmark measures one call at a time: not with -n"),
    ],
)
def test_benchmarks_are_not_run_by_the_way_or_side_by_side(words, message):
    command = [sys.executable, "-m", "pytest", "--collect-only", "-p", "no:cacheprovider"]
    command += ["benchmarks/bench_operators.py", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 4
    assert message in done.stderr
