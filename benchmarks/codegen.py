"""Predicted speed of the shipped kernels, from the machine code Triton compiles without a GPU.

    python -m benchmarks.codegen [--arch 90 ...] [--shape NAME ...] [--kernel NAME ...]

Every figure here is a prediction from counts of instructions and bytes; nothing is measured. What
is compiled is in `benchmarks.launches`.

The time predicted for a kernel on sm_90 is the largest of

    memory   bytes of all its tensors, each moved once, over 3.0 TB/s;
    tensor   products of the padded scores, over 800 TFLOP/s;
    a pipe   padded scores / 32 · clocks of the loop that computes them for 32 scores, over
             132 SMs · 4 schedulers · 1.755 GHz, for the pipe of `sass.bound` that limits each loop,
             and the issue slots of the code outside these loops,

and the limit it is set beside has no padding, one exp a score at 3.7e12 a second, and the fewest
bytes. Latency, atomics, cache traffic, the last round of programs and the small PyTorch operations
around the kernels (zeroing, casts, sums of partials) are in neither.
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

import torch
import triton
from torch import Tensor
from triton.errors import TritonError

from benchmarks import sass
from benchmarks.launches import HEADS, KERNELS, MODES, OPERATORS, SHAPES, Shape, launches
from rlr_fast.kernels import _launch
from rlr_fast.kernels._launch import Launch

ARCHES = (*map(str, _launch.SHARED), "gfx942")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
RECORD = Path(__file__).with_name("codegen.json")

# What an H100 moves and computes a second.
_BYTES = 3.0e12
_FLOPS = 800e12
_CLOCKS = 132 * 4 * 1.755e9
_EXPS = 132 * 16 * 1.755e9

# The most shared memory of one program; more compiles, and fails when launched.
_LARGEST_SHARED = {str(arch): most for arch, most in _launch.SHARED.items()} | {"gfx942": 64 * 1024}

_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
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
class Loop:
    """An innermost loop that computes exponentials, for 32 scores.

    Attributes:
        name: ``plain`` or ``windowed`` by whether it tests for windows, after ``online`` where it
            keeps a running maximum; ``halo`` for the walk over the batch.
        ex2: Exponentials by the MUFU, in instructions of a warp.
        issue: Issue slots.
        clocks: Predicted clocks of a scheduler.
        limit: The pipe that sets them.
        hgmma: Matrix instructions by warp groups in one turn of the loop, not for 32 scores.
        mma: Those by single warps.
        tcgen05: Those of sm_100's tensor memory.
        local: Loads and stores of spilled registers in one turn.
    """

    name: str
    ex2: float
    issue: float
    clocks: float
    limit: str
    hgmma: int
    mma: int
    tcgen05: int
    local: int


@dataclass(frozen=True)
class Prediction:
    """Microseconds on sm_90, a prediction from counts and not a measurement.

    Attributes:
        time: The largest of ``by``.
        bound: Its name.
        by: Microseconds of memory, tensor cores, and the pipe that limits most of the loops' time.
        outside: Microseconds of ``by`` that the code outside the loops takes.
        moved: Bytes of all tensors.
        atomics: Bytes of all atomic additions, which meet in the L2 cache and are in no time.
        scores: Scores computed, padding included.
    """

    time: float
    bound: str
    by: Mapping[str, float]
    outside: float
    moved: int
    atomics: int
    scores: int


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


# An argument's name, or with the index of an element of a tuple.
Place = str | tuple[str, int]


def specialization(
    launch: Launch,
) -> tuple[dict[str, str | tuple[str, ...]], dict[Place, Any], list[Place]]:
    """Types, constants and what is divisible by 16, by argument, as Triton finds them at a launch.

    1 is a constant, and multiples of 16 are known as such, but for arguments that a kernel leaves
    out of its specialization. The elements of a tuple are arguments of their own.
    """
    constants: dict[Place, Any] = dict(launch.constants)
    divisible: list[Place] = []

    def kind(place: Place, value: Any, special: bool) -> str:
        if isinstance(value, Tensor):
            named = "*" + _TYPES[value.dtype]
            aligned = value.storage_offset() * value.element_size() % 16 == 0
        elif isinstance(value, float):
            named, aligned = "fp32", False
        elif value is None or (value == 1 and special):
            constants[place] = value
            return "constexpr"
        else:
            named = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = value % 16 == 0
        if aligned and special:
            divisible.append(place)
        return named

    signature: dict[str, str | tuple[str, ...]] = {}
    for parameter, value in zip(launch.kernel.params, launch.arguments, strict=False):
        name, special = parameter.name, not parameter.do_not_specialize
        if isinstance(value, tuple):
            kinds = (kind((name, i), element, special) for i, element in enumerate(value))
            signature[name] = tuple(kinds)
        else:
            signature[name] = kind(name, value, special)
    return signature, constants, divisible


def compile_launch(launch: Launch, arch: str) -> triton.compiler.CompiledKernel:
    """Compile as a launch on a device would."""
    signature, constants, divisible = specialization(launch)
    return sass.compile_kernel(
        launch.kernel,
        signature,
        constants,
        arch=int(arch) if arch.isdigit() else arch,
        divisible=divisible,
        **launch.options,
    )


def tile_scores(launch: Launch) -> int:
    """Scores that one turn of the loop computes in a program; 0 for a kernel that has none."""
    c = launch.constants
    if "IMAGES" in c:
        return c["IMAGES"] * c["PH"] * c["PW"] * (c["HALO_A"] + c["HALO_B"])
    if "BLOCK_M" in c and "BLOCK_N" in c:
        return c["BLOCK_M"] * c["BLOCK_N"] * c.get("BLOCKS", 1)
    return 0


def turns(launch: Launch, shape: Shape) -> dict[str, int]:
    """Turns of each loop over all programs of a launch, from the geometry alone."""
    c, geometry = launch.constants, shape.geometry
    if "IMAGES" in c:
        places = -(-geometry.height // c["PH"]) * -(-geometry.width // c["PW"])
        return {"halo": HEADS * places * -(-shape.batch // c["IMAGES"])}
    keys = "BLOCKS" in c
    size, step = (
        (c["BLOCK_N"] * c["BLOCKS"], c["BLOCK_M"]) if keys else (c["BLOCK_M"], c["BLOCK_N"])
    )
    tokens = geometry.tokens
    windowed = plain = 0
    for first in range(0, tokens, size):
        # As `window_range` of the kernels.
        last = min(first + size, tokens) - 1
        lo = max(first // geometry.width - geometry.radius_y, 0) * geometry.width
        hi = min(last // geometry.width + geometry.radius_y + 1, geometry.height) * geometry.width
        near = -(-hi // step) - lo // step
        windowed += near
        plain += -(-tokens // step) - near
    images = HEADS * shape.batch
    return {"windowed": windowed * images} | ({} if c["INSIDE"] else {"plain": plain * images})


def loops(code: Sequence[sass.Instruction], launch: Launch, arch: str) -> list[Loop]:
    """The loops of a kernel that compute scores, by name.

    Only a running maximum takes more exponentials than one a score, and only the test of the
    windows more instructions, so the order by both tells which loop is which. On a grid so small
    that the compiler merges or unrolls loops they are numbered, and a loop's counts may be those of
    several turns.
    """
    scores = tile_scores(launch)
    if not scores:
        return []
    elements = scores / (32 * launch.options["num_warps"])
    counted = [sass.count(loop.instructions) for loop in sass.loops(code) if loop.innermost]
    counted = sorted((n for n in counted if n["ex2"]), key=lambda n: (n["ex2"], n.issue))
    # LCA's forward kernel has a second loop, with the maximum of a row, behind its first.
    names = ["halo", "online halo"] if launch.constants.get("TRY_WITHOUT_MAXIMUM") else ["halo"]
    if "INSIDE" in launch.constants:
        one = launch.constants["INSIDE"] or launch.constants.get("DQ") == "store"
        names = ["windowed"] if one else ["plain", "windowed"]
        if "CERTIFIED" in launch.constants:
            online = [f"online {name}" for name in names]
            names = names + online if launch.constants["CERTIFIED"] else online
    if len(names) != len(counted):
        names = [f"loop {i}" for i in range(len(counted))]
    found = []
    for name, n in zip(names, counted, strict=True):
        bound = sass.bound(n, elements, arch=int(arch))
        found.append(
            Loop(
                name,
                round(n["ex2"] / elements, 3),
                round(n.issue / elements, 3),
                round(bound.clocks, 3),
                bound.limit,
                n["hgmma"],
                n["mma"],
                n["tcgen05"],
                sum(count for kind, count in n.kinds.items() if kind.startswith(("ldl", "stl"))),
            )
        )
    return found


def slots_outside(code: Sequence[sass.Instruction], launch: Launch, shape: Shape) -> int:
    """Issue slots that a launch takes outside its loops over scores, counted by warps.

    Both ways of a condition count. Code is met once in a program, but for that of the loop over
    images around MLKA's loops, once in each image.
    """
    found = sass.loops(code)
    scores = {
        i.address
        for loop in found
        if loop.innermost and sass.count(loop.instructions)["ex2"]
        for i in loop.instructions
    }
    walk = {i.address for loop in found if not loop.innermost for i in loop.instructions} - scores
    once = sass.count([i for i in code if i.address not in scores | walk]).issue
    often = sass.count([i for i in code if i.address in walk]).issue
    turns = launch.programs
    if "BLOCKS" in launch.constants:
        keys = launch.constants["BLOCK_N"] * launch.constants["BLOCKS"]
        turns = -(-shape.geometry.tokens // keys) * HEADS * shape.batch
    return (once * launch.programs + often * turns) * launch.options["num_warps"]


def moved(launch: Launch) -> int:
    """Bytes of all tensors of a launch, each once; a buffer of atomic sums is read and written."""
    total = sum(
        tensor.numel() * tensor.element_size()
        for tensor in launch.arguments
        if isinstance(tensor, Tensor)
    )
    for name in _atomic_sums(launch):
        tensor = launch.arguments[launch.kernel.arg_names.index(name)]
        total += tensor.numel() * tensor.element_size()
    return total


def atomics(launch: Launch, shape: Shape) -> int:
    """Bytes that a launch adds atomically."""
    c = launch.constants
    if c.get("ATOMIC"):
        return launch.programs * 2 * (c["HALO_A"] + c["HALO_B"]) * c["D"] * 4
    if c.get("DQ") != "add":
        return 0
    blocks = -(-shape.geometry.tokens // (c["BLOCK_N"] * c["BLOCKS"]))
    return blocks * shape.batch * HEADS * shape.geometry.tokens * c["D"] * 4


def _atomic_sums(launch: Launch) -> tuple[str, ...]:
    if launch.constants.get("DQ") == "add":
        return ("dq",)
    return ("dk", "dv") if launch.constants.get("ATOMIC") else ()


def _products(launch: Launch) -> float:
    """Floating-point operations of the matrix products for one score."""
    c = launch.constants
    stem = launch.kernel.__name__
    count = {"forward_kernel": 2, "backward_query_kernel": 3, "backward_kernel": 5}.get(stem)
    if count is None:
        count = 4 if c["DQ"] == "separate" else 5
    return 2 * (count * c["D"] + c.get("P", 0))


def predict(launch: Launch, shape: Shape, found: Sequence[Loop], slots: int) -> Prediction:
    """The time of a launch on sm_90 from its counts, see the module's equation.

    ``slots`` are those of `slots_outside`.
    """
    outside = slots / _CLOCKS
    by = {"memory": moved(launch) / _BYTES, "issue": outside}
    scores = 0
    if found:
        by_name = {loop.name: loop for loop in found}
        slowest = max(found, key=lambda loop: loop.clocks)
        pipes: dict[str, float] = {}
        for name, count in turns(launch, shape).items():
            # Without the certificate (float16) only the online loops exist; a grid so small that
            # the compiler merges or unrolls loops leaves others.
            loop = by_name.get(name) or by_name.get(f"online {name}") or slowest
            part = count * tile_scores(launch)
            scores += part
            pipe = "exp" if loop.limit == "mufu" else loop.limit
            pipes[pipe] = pipes.get(pipe, 0.0) + part / 32 * loop.clocks / _CLOCKS
        # The loops run one after the other: their times add up, the largest part gives the name.
        largest = max(pipes, key=pipes.__getitem__)
        del by["issue"]
        by[largest] = sum(pipes.values()) + outside
        by["tensor"] = scores * _products(launch) / _FLOPS
    bound = max(by, key=by.__getitem__)
    micro = {name: round(1e6 * seconds, 2) for name, seconds in by.items()}
    added = atomics(launch, shape)
    around = round(1e6 * outside, 2)
    return Prediction(micro[bound], bound, micro, around, moved(launch), added, scores)


def limits(shape: Shape, operator: str, backward: bool, itemsize: int) -> dict[str, float]:
    """Microseconds that an H100 needs at the least, by what limits it.

    Args:
        shape: Grid, widths and batch.
        operator: ``"mlka"`` or ``"lca"``.
        backward: Whether of the backward pass.
        itemsize: Bytes an element.
    """
    geometry, rows = shape.geometry, HEADS * shape.geometry.tokens

    def near(size: int, radius: int) -> int:
        return sum(min(i + radius, size - 1) - max(i - radius, 0) + 1 for i in range(size))

    pairs = near(geometry.height, geometry.radius_y) * near(geometry.width, geometry.radius_x)
    if operator == "mlka":
        pairs = geometry.tokens**2 - pairs
    scores = HEADS * shape.batch * pairs
    row = rows * shape.width * itemsize
    # Backward in float32: the gradients of what the batch shares.
    if operator == "mlka":
        lse = 4 * rows * shape.batch
        traffic = row + shape.batch * row * 3 + lse
        if backward:
            traffic = row + rows * shape.width * 4 + shape.batch * row * 6 + 2 * lse
    else:
        traffic = 2 * row + shape.batch * row * 2
        if backward:
            traffic = 2 * row + 2 * rows * shape.width * 4 + shape.batch * row * 3
    return {
        "memory": 1e6 * traffic / _BYTES,
        "tensor": 1e6 * scores * (10 if backward else 4) * shape.width / _FLOPS,
        "exp": 1e6 * scores / _EXPS,
    }


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
    most = _LARGEST_SHARED[task.arch]
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


def tiles_of(launch: Launch) -> str:
    """Say the tiles of a launch in a word or two."""
    c = launch.constants
    if "IMAGES" in c:
        parts = "+".join(str(c[name]) for name in ("HALO_A", "HALO_B") if c[name])
        return f"{c['PH']}x{c['PW']}x{c['IMAGES']} halo {parts}"
    if "BLOCK_M" in c and "BLOCK_N" in c:
        blocks = f"x{c['BLOCKS']}" if "BLOCKS" in c else ""
        more = [f"fma {c['FMA_EXP2_EIGHTHS']}/8"] if "FMA_EXP2_EIGHTHS" in c else []
        more += [f"dQ {c['DQ']}"] if "DQ" in c else []
        return " ".join([f"{c['BLOCK_M']}x{c['BLOCK_N']}{blocks}", *more])
    return "x".join(str(c[name]) for name in ("BLOCK_M", "BLOCK_N", "BLOCK", "HALO") if name in c)


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


def version() -> str:
    """Triton's, as major.minor: what the counts depend on."""
    return ".".join(triton.__version__.split(".")[:2])


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
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
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
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile")
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
