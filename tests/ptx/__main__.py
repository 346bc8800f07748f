"""The command of the machine; see the README beside it.

python -m tests.ptx [cases] [random] [planted] [barriers] [examples]
    [--arch 90] [--dtype bf16] [--case NAME]
"""

from __future__ import annotations

import argparse
import fnmatch
import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.ptx import examples, planted
from tests.ptx.alu import Inexact
from tests.ptx.cases import (
    ARCHES,
    CASES,
    CHOICE,
    DTYPES,
    Attention,
    Case,
    applies,
    random_case,
)
from tests.ptx.findings import Unsupported
from tests.ptx.runs import run

Row = dict[str, Any]
# Findings of a row that are printed.
_SHOWN = 6


def run_cases(options: argparse.Namespace) -> Iterator[Row]:
    """Run cases, and yield what each gave."""
    for arch in options.arch:
        for dtype in options.dtype:
            for name, case in CASES.items():
                if not applies(case, dtype) or not _wanted(name, options.case):
                    continue
                if options.choice and name not in CHOICE[arch].get(dtype, ()):
                    continue
                about = {"name": name, "arch": arch, "dtype": dtype}
                yield about | _judged(case, arch, dtype)


def run_random(options: argparse.Namespace) -> Iterator[Row]:
    """Run random attention cases, each on one architecture in one dtype."""
    random = np.random.default_rng(options.seed)
    for number in range(options.count):
        case = random_case(random)
        arch, dtype = (str(random.choice(list(names))) for names in (options.arch, options.dtype))
        about = {"name": f"{number}: {_told(case)}", "arch": arch, "dtype": dtype}
        if _wanted(about["name"], options.case):
            yield about | _judged(case, arch, dtype)


def _told(case: Attention) -> str:
    """Return what is not usual in a case."""
    usual = Attention(case.operator, case.grid, case.window, case.width)
    more = {k: v for k, v in asdict(case).items() if v != getattr(usual, k)}
    words = [f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in more.items()]
    grid = "x".join(map(str, case.grid))
    return ", ".join([f"{case.operator} {grid} w{case.window} d{case.width}", *words])


def _judged(case: Case, arch: str, dtype: str) -> Row:
    """Run a case, and return what it gave."""
    began = time.process_time()
    try:
        result = run(case, arch, dtype)
    except Unsupported as refusal:
        return {"ok": False, "verdicts": {}, "findings": [f"refused: {refusal}"]}
    return {
        "ok": result.ok,
        "verdicts": {n: asdict(verdict) for n, verdict in result.verdicts.items()},
        "findings": [f"{k}: {f}" for k, f in result.log.findings(mild=False)],
        "mild": [f"{k}: {f}" for k, f in result.log.findings(mild=True)],
        "seconds": round(time.process_time() - began, 2),
        "launches": [
            {
                "kernel": r.kernel,
                "programs": r.programs,
                "options": r.options,
                "constants": {key: str(value) for key, value in r.constants.items()},
                "instructions": r.executed.total(),
                "seconds": round(r.seconds, 2),
            }
            for r in result.log.runs
        ],
    }


def run_planted(options: argparse.Namespace) -> Iterator[Row]:
    """Plant bugs, and yield what was noticed of each."""
    for arch in options.arch:
        for title, bug in planted.bugs(arch).items():
            if options.choice and arch not in bug.chosen:
                continue
            if bug.dtype in options.dtype and _wanted(title, options.case):
                about = {"name": title, "arch": arch, "dtype": bug.dtype}
                began = time.process_time()
                try:
                    noticed = planted.notice(bug, arch)
                except planted.NotApplicable as reason:
                    noticed = ""
                    about["name"] += f" (not applicable: {reason})"
                seconds = round(time.process_time() - began, 2)
                yield about | {"ok": bool(noticed), "noticed": noticed, "seconds": seconds}


def run_barriers(options: argparse.Namespace) -> Iterator[Row]:
    """Leave out every barrier of the kernels, one after the other."""
    for arch in options.arch:
        for case, kernel in planted.BARRIERS:
            if not _wanted(case, options.case):
                continue
            for place, noticed in planted.barriers(case, kernel, arch):
                name = f"{case} {kernel}: barrier {place}"
                row = {"name": name, "arch": arch, "dtype": "bf16", "noticed": noticed}
                yield row | {"ok": bool(noticed)}


def run_examples(options: argparse.Namespace) -> Iterator[Row]:
    """Run the small kernels of the machine's own."""
    for arch in options.arch:
        for dtype in options.dtype:
            for name in examples.names(dtype):
                if _wanted(name, options.case):
                    yield {"name": name, "arch": arch, "dtype": dtype} | examples.check(
                        name, arch, dtype
                    )


def _wanted(name: str, patterns: Sequence[str]) -> bool:
    return not patterns or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def line(row: Row) -> str:
    """Return a row of the table: error / eager PyTorch's error / budget, of each result."""
    cells = [f"{'ok ' if row['ok'] else 'BAD'} sm_{row['arch']} {row['dtype']} {row['name']:44}"]
    for name, v in row.get("verdicts", {}).items():
        numbers = " / ".join(f"{v[key]:.1e}" for key in ("error", "eager", "allowed"))
        cells.append(f"{name} {numbers}{'' if v['ok'] else ' !'}")
    if "noticed" in row:
        cells.append(row["noticed"] or "MISSED")
    findings = row.get("findings", [])
    if len(findings) > _SHOWN:
        findings = [*findings[:_SHOWN], f"and {len(findings) - _SHOWN} more"]
    return "\n      ".join(["  ".join(cells), *findings])


_COMMANDS = {
    "cases": run_cases,
    "random": run_random,
    "planted": run_planted,
    "barriers": run_barriers,
    "examples": run_examples,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for; 1 if anything is wrong, or a planted bug is missed."""
    parser = argparse.ArgumentParser(prog="python -m tests.ptx", description=__doc__.split(";")[0])
    parser.add_argument("what", nargs="*", help=", ".join(_COMMANDS))
    parser.add_argument("--arch", nargs="+", choices=ARCHES, default=ARCHES)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--case", nargs="+", default=(), help="names, or patterns of them")
    parser.add_argument("--count", type=int, default=200, help="of random cases")
    parser.add_argument("--seed", type=int, default=0, help="of random cases")
    parser.add_argument("--choice", action="store_true", help="only what the tests run")
    parser.add_argument("--exact", action="store_true", help="round approximate functions and sums")
    parser.add_argument("--out", type=Path, help="write all rows to this JSON file as well")
    options = parser.parse_args(arguments)
    commands = options.what or ["cases"]
    if unknown := [what for what in commands if what not in _COMMANDS]:
        parser.error(f"{unknown[0]} is none of {', '.join(_COMMANDS)}")
    torch.set_num_threads(1)
    Inexact.on = not options.exact
    rows = []
    for row in itertools.chain.from_iterable(_COMMANDS[what](options) for what in commands):
        rows.append(row)
        print(line(row), flush=True)
        if options.out:
            options.out.write_text(json.dumps(rows, indent=1) + "\n")
    bad = sum(not row["ok"] for row in rows)
    print(f"{len(rows)} runs, {bad} bad")
    return int(bad > 0 or not rows)


if __name__ == "__main__":
    sys.exit(main())
