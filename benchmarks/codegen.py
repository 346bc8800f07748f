"""Counts of the shipped kernels' machine code, and the speed that they predict, without a GPU.

    python -m benchmarks.codegen [--arch 90 ...] [--shape NAME ...] [--kernel NAME ...]

What is compiled is in `benchmarks.launches`, what the counts predict in `benchmarks.predictions`;
nothing is measured.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
from triton.errors import TritonError

from benchmarks import sass
from benchmarks.arguments import positive
from benchmarks.compiling import (
    ARCHES,
    DTYPES,
    LARGEST_SHARED,
    compile_launch,
    tiles_of,
    version,
)
from benchmarks.launches import KERNELS, MODES, OPERATORS, SHAPES, launches
from benchmarks.predictions import Loop, Prediction, limits, loops, predict, slots_outside
from rlr_fast.kernels import _launch
from rlr_fast.kernels._launch import Launch

RECORD = Path(__file__).with_name("codegen.json")
HEADLINES = (
    "mlka-forward",
    "mlka-backward-key",
    "mlka-backward-query-deterministic",
    "lca-forward",
    "lca-backward",
)


@dataclass(frozen=True)
class Task:
    """One kernel to compile for one architecture."""

    kernel: str
    shape: str
    dtype: str
    arch: str


@dataclass(frozen=True)
class Row:
    """What compiling one kernel gave."""

    kernel: str
    shape: str
    dtype: str
    arch: str
    tiles: str
    warps: int
    stages: int
    programs_launched: int
    shared: int = 0
    registers: int = 0
    stack: int = 0
    spill: int = 0
    programs: int = 0
    matrix: Mapping[str, int] = field(default_factory=dict)
    loops: Sequence[Loop] = ()
    prediction: Prediction | None = None
    error: str = ""


def examine(task: Task) -> Row:
    """Compile a kernel and count its code."""
    shape, dtype = SHAPES[task.shape], DTYPES[task.dtype]
    return examine_launch(task, launches(shape, dtype, task.arch)[task.kernel])


def examine_launch(task: Task, launch: Launch) -> Row:
    """Compile a launch and count its code; a kernel that does not compile gives its error."""
    shape = SHAPES[task.shape]
    about: dict[str, Any] = {
        **asdict(task),
        "tiles": tiles_of(launch),
        "warps": launch.options["num_warps"],
        "stages": launch.options["num_stages"],
        "programs_launched": launch.programs,
    }
    try:
        compiled = compile_launch(launch, task.arch)
    except (RuntimeError, TritonError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return Row(**about, error=lines[0])
    shared = compiled.metadata.shared
    most = LARGEST_SHARED[task.arch]
    about["error"] = f"{shared} bytes of shared memory, of {most}" if shared > most else ""
    if not task.arch.isdigit():
        used = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count):\s*(\d+)", compiled.asm["amdgcn"]))
        registers, spill = int(used["vgpr_count"]), 4 * int(used["vgpr_spill_count"])
        return Row(**about, shared=shared, registers=registers, spill=spill)
    code = sass.instructions(compiled)
    used_cuda = sass.resources(compiled, code)
    found = loops(code, launch, task.arch)
    total = sass.count(code)
    outside = slots_outside(code, launch, shape)
    # Products of float32 run at other rates.
    predicted = task.arch == "90" and task.dtype != "fp32"
    return Row(
        **about,
        shared=used_cuda.shared,
        registers=used_cuda.registers,
        stack=used_cuda.stack,
        spill=used_cuda.stores_local,
        programs=used_cuda.programs,
        matrix={kind: total[kind] for kind in ("hgmma", "mma", "tcgen05") if total[kind]},
        loops=found,
        prediction=predict(launch, shape, found, outside) if predicted else None,
    )


def tasks(
    arches: Sequence[str], shapes: Sequence[str], kernels: Sequence[str], dtypes: Sequence[str]
) -> list[Task]:
    """What to compile: every kernel that a shape launches, in every dtype it is compiled for."""
    chosen = []
    for shape in (SHAPES[name] for name in shapes):
        for dtype in dtypes:
            if dtype != "bf16" and not shape.paper:
                continue
            for arch in arches:
                made = launches(shape, DTYPES[dtype], arch)
                names = [name for name in KERNELS if name in made and name in kernels]
                chosen += [Task(name, shape.name, dtype, arch) for name in names]
    return chosen


def table(rows: Sequence[Row]) -> str:
    """Resources of every kernel, and a line for each of its loops."""
    head = (
        "kernel", "shape", "dtype", "arch", "tiles", "warps", "stages", "regs", "stack", "spill B",
        "shared B", "progs/SM", "loop", "matrix", "ex2/32", "issue/32", "clocks/32", "limit",
    )  # fmt: skip
    lines: list[tuple[str, ...]] = [head]
    for row in rows:
        cells: tuple[Any, ...] = (row.kernel, row.shape, row.dtype, row.arch, row.tiles, row.warps)
        cells += (row.stages, row.registers, row.stack, row.spill, row.shared, row.programs)
        if row.error and not row.shared:
            cells = (*cells[:7], *("-",) * 5)
        for loop in row.loops or (None,):
            last: tuple[Any, ...] = ("", _named(row.matrix), "", "", "", "")
            if loop:
                kinds = {"hgmma": loop.hgmma, "mma": loop.mma, "tcgen05": loop.tcgen05}
                numbers = (f"{loop.ex2:.2f}", f"{loop.issue:.2f}", f"{loop.clocks:.2f}")
                last = (loop.name, _named(kinds), *numbers, loop.limit)
            lines.append((*map(str, cells), *last))
            cells = ("",) * len(cells)
        if row.error:
            lines.append(("  " + row.error, *("",) * (len(head) - 1)))
    return _aligned(lines)


def _named(kinds: Mapping[str, int]) -> str:
    return " ".join(f"{kind} {count}" for kind, count in kinds.items() if count)


def passes(made: Iterable[str]) -> dict[str, list[str]]:
    """The kernels that each pass of a shape launches, of those that the shape launches at all."""
    made = set(made)
    found: dict[str, list[str]] = {}
    for operator, stems in OPERATORS.items():
        if f"{operator}-forward" not in made:
            continue
        found[f"{operator} forward"] = [f"{operator}-forward"]
        for mode in MODES:
            names = [f"{operator}-{stem}{mode}" for stem in stems[1:]]
            found[f"{operator} backward{mode.replace('-', ' ')}"] = [n for n in names if n in made]
    return found


def prediction_table(rows: Sequence[Row]) -> str:
    """Predicted time of each pass on sm_90 beside the limit of an H100; empty without sm_90."""
    head = ("shape", "dtype", "pass", "predicted µs", "bound", "limit µs", "of", "ratio")
    lines: list[tuple[str, ...]] = [(*head, "atomics MB", "parts µs")]
    found = {(r.shape, r.dtype, r.kernel): r for r in rows if r.prediction}
    for shape, dtype in dict.fromkeys((r.shape, r.dtype) for r in rows):
        for name, kernels in passes(launches(SHAPES[shape], DTYPES[dtype])).items():
            parts = [found.get((shape, dtype, kernel)) for kernel in kernels]
            predictions = [row.prediction for row in parts if row and row.prediction]
            if len(predictions) < len(kernels):
                continue
            time = sum(p.time for p in predictions)
            bound = max(predictions, key=lambda p: p.time).bound
            operator, backward = name.split()[0].partition("-")[0], "backward" in name
            floor = limits(SHAPES[shape], operator, backward, DTYPES[dtype].itemsize)
            least = max(floor, key=floor.__getitem__)
            by = ["/".join(f"{part} {us:.0f}" for part, us in p.by.items()) for p in predictions]
            added = sum(p.atomics for p in predictions) / 1e6
            figures = (f"{time:.1f}", bound, f"{floor[least]:.1f}", least)
            ratio = f"{time / floor[least]:.2f}"
            lines.append((shape, dtype, name, *figures, ratio, f"{added:.0f}", ", ".join(by)))
    return _aligned(lines) if len(lines) > 1 else ""


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    """Columns of equal width; a line with nothing behind its first cell may run over the others."""
    full = [line for line in lines if any(line[1:])]
    widths = [max(map(len, column)) for column in zip(*full, strict=True)]
    rows = ("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
    return "\n".join(rows)


def record_of(rows: Iterable[Row]) -> dict[str, Any]:
    """The counts of ``codegen.json``, by kernel and shape."""
    return {
        f"{row.kernel} {row.shape}": {
            "tiles": f"{row.tiles}, {row.warps} warps, {row.stages} stages",
            "registers": row.registers,
            "stack": row.stack,
            "spill": row.spill,
            "loops": {
                loop.name: {
                    "hgmma": loop.hgmma, "mma": loop.mma, "ex2": loop.ex2, "issue": loop.issue,
                }
                for loop in row.loops
            },
        }
        for row in rows
    }  # fmt: skip


def headlines() -> list[Task]:
    """The tasks whose counts are recorded."""
    return tasks(("90",), [s.name for s in SHAPES.values() if s.paper], HEADLINES, ("bf16",))


def _run(jobs: int, chosen: Sequence[Task]) -> list[Row]:
    if jobs == 1:
        return [examine(task) for task in chosen]
    with ProcessPoolExecutor(jobs, mp_context=get_context("fork")) as pool:
        return list(pool.map(examine, chosen))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables; 1 if a kernel does not compile or not fit for CUDA."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.codegen", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--arch", nargs="+", choices=ARCHES, default=ARCHES)
    parser.add_argument("--shape", nargs="+", choices=tuple(SHAPES), default=tuple(SHAPES))
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=KERNELS)
    parser.add_argument("--dtype", nargs="+", choices=tuple(DTYPES), default=tuple(DTYPES))
    parser.add_argument("--json", type=Path, help="write every count to this file as well")
    parser.add_argument("--jobs", type=positive, default=1, help="processes that compile")
    parser.add_argument(
        "--record",
        action="store_true",
        help=f"compile the headline kernels; if all fit, write their counts to {RECORD.name}",
    )
    options = parser.parse_args(arguments)
    if _launch.INTERPRETING:
        raise SystemExit("nothing compiles under Triton's interpreter: unset TRITON_INTERPRET")
    chosen = tasks(options.arch, options.shape, options.kernel, options.dtype)
    if options.record:
        chosen = headlines()
    rows = _run(options.jobs, chosen)
    if options.record and not any(row.error for row in rows):
        known = json.loads(RECORD.read_text()) if RECORD.exists() else {}
        known[version()] = record_of(rows)
        RECORD.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    if options.json:
        report = {"triton": triton.__version__, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    print(f"Triton {triton.__version__}; compiled, not run\n")
    print(table(rows))
    predicted = prediction_table(rows)
    if predicted:
        print("\nPredictions for an H100 from the counts above; not measurements.\n")
        print(predicted)
    failed = [row for row in rows if row.error]
    print(f"\n{len(rows)} kernels, {len(failed)} that fail")
    return int(any(row.arch.isdigit() for row in failed))


if __name__ == "__main__":
    sys.exit(main())
