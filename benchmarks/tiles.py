"""Tile search at the headline shapes: every candidate's kernel time on the record, in minutes.

``python -m benchmarks.tiles [--kernel NAME] [--shape NAME] [--seconds S]``. It serves those who
keep the table of `rlr_fast.kernels.tiles`. Candidates are compiled and compared with the definition
in parallel processes; those that pass are timed one after another.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from triton.errors import TritonError

from benchmarks import check, parallel, record, timing
from benchmarks.arguments import positive
from benchmarks.kernels import kernel_seconds
from benchmarks.shapes import HEADLINE, OPERATORS, PAPER, Problem, Shape, make_inputs
from rlr_fast.kernels import _choice
from rlr_fast.kernels._launch import Geometry
from rlr_fast.kernels.tiles import (
    HALO_KERNELS,
    HaloTiles,
    RasterTiles,
    Tiles,
    fits_in_shared_memory,
)
from rlr_fast.kernels.tiles import candidates as table_candidates

# Of a kernel: its operator, its name on the GPU, and whether deterministic backward alone runs it.
KERNELS: dict[str, tuple[str, str, bool]] = {
    "raster_forward": ("mlka", "forward_kernel", False),
    "raster_key": ("mlka", "backward_key_kernel", False),
    "halo_forward": ("lca", "forward_kernel", False),
    "halo_backward": ("lca", "backward_kernel", False),
    "raster_query": ("mlka", "backward_query_kernel", True),
}
_REPEATS = 6


@dataclass(frozen=True)
class Job:
    """One candidate on one problem; no tiles are the table's own."""

    kernel: str
    problem: Problem
    tiles: Tiles | None


def candidates(kernel: str, problem: Problem) -> Iterator[Tiles | None]:
    """Yield the table's own tiles, then others, each once; none where the kernel is not taken."""
    own = _own(kernel, problem)
    if own is None:
        return
    yield None
    # Those most like the table's own first: a search that runs out of time has seen the likely.
    found = sorted(_worth_trying(kernel), key=lambda tiles: _distance(tiles, own))
    yield from (tiles for tiles in dict.fromkeys(found) if tiles != own)


def _worth_trying(kernel: str) -> Iterator[Tiles]:
    if kernel in HALO_KERNELS:
        forms = ((1, 1), (2, 2), (2, 4), (4, 4), (8, 8))
        sizes = ((16, 4), (32, 4), (64, 4), (128, 4), (128, 8))
        for (rows, columns), (queries, warps), stages in itertools.product(forms, sizes, (1, 2, 3)):
            if queries >= rows * columns:
                yield HaloTiles(rows, columns, queries // (rows * columns), warps, stages)
        return
    sides = itertools.product((32, 64, 128), (64, 128), (4, 8), (1, 2, 3, 4), (0, 128, 168))
    for queries, keys, warps, stages, registers in sides:
        tiles = RasterTiles(queries, keys, warps=warps, stages=stages, registers=registers)
        # Eight warps on fewer than 128 rows compute every score twice.
        if warps == 8 and (keys if kernel == "raster_key" else queries) < 128:
            continue
        if kernel == "raster_forward":
            yield from (dataclasses.replace(tiles, fma_exp2_eighths=n) for n in (0, 2, 3))
        elif kernel == "raster_query":
            yield tiles
        else:
            for blocks, separate_dq in itertools.product((1, 2), (False, True)):
                yield dataclasses.replace(tiles, blocks=blocks, separate_dq=separate_dq)


def _own(kernel: str, problem: Problem) -> Tiles | None:
    """Return the tiles that the table gives; ``None`` where the problem takes another kernel."""
    geometry = Geometry.of(problem.grid, problem.window)
    query = torch.empty(
        (problem.batch, 1, 1, problem.shape.width), dtype=problem.dtype, device="meta"
    )
    target = _choice.target_of(record.bench_device())
    if kernel in HALO_KERNELS and not fits_in_shared_memory(
        geometry, problem.shape.width, problem.dtype, target
    ):
        return None
    about = _choice.problem_of(kernel, query, geometry)._replace(target=target)
    return table_candidates(about)[0]


def _distance(tiles: Any, own: Any) -> int:
    return sum(
        getattr(tiles, field.name) != getattr(own, field.name) for field in dataclasses.fields(own)
    )


def _prepared(job: Job) -> tuple[Callable[[], Any], Any]:
    """Return the call that runs the kernel, and its inputs; to be used with the tiles forced."""
    backward = not job.kernel.endswith("forward")
    problem = job.problem
    inputs = make_inputs(problem, torch.device("cuda"))
    leaves = inputs[:3]
    operator = OPERATORS[problem.operator]

    def forward() -> torch.Tensor:
        return operator(*leaves, problem.grid, problem.window, backend="triton")

    if not backward:

        def call() -> Any:
            with torch.no_grad():
                return forward()

        return call, inputs
    output = forward()
    return lambda: torch.autograd.grad(
        output, leaves, inputs.grad_output, retain_graph=True
    ), inputs


def _forced(job: Job) -> Any:
    # The table's own are forced too: forced tiles are refused where others would take their place.
    return _choice.forced(**{job.kernel: job.tiles or _own(job.kernel, job.problem)})


def run_job(job: Job) -> dict[str, float]:
    """Compile a candidate and compare it with the definition; in a process of the pool."""
    backward = not job.kernel.endswith("forward")
    deterministic = KERNELS[job.kernel][2]
    torch.use_deterministic_algorithms(False)
    call, inputs = _prepared(job)
    truth = check.definition(job.problem, inputs)
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    with _forced(job):
        found = call()
    results = dict(zip(check.NAMES[1:], found, strict=True)) if backward else {"output": found}
    return check.compare(job.problem, truth, results, "the candidate")


def _time(job: Job) -> dict[str, object]:
    """The kernel's own time, and the whole call's on the device."""
    torch.use_deterministic_algorithms(KERNELS[job.kernel][2])
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    call, _ = _prepared(job)
    with _forced(job):
        call()
        times = kernel_seconds(call, timing.Flush(call), _REPEATS)
    torch.use_deterministic_algorithms(False)
    return {"median_s": times[KERNELS[job.kernel][1]], "call_s": sum(times.values())}


def _shape(name: str) -> Shape:
    shapes = {shape.name: shape for shape in PAPER}
    if name not in shapes:
        raise ValueError(f"shape must be one of {', '.join(shapes)}, got {name!r}")
    return shapes[name]


def main(arguments: Sequence[str] | None = None) -> int:
    """Search, print and record."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tiles", description=__doc__)
    parser.add_argument("--kernel", choices=KERNELS, action="append", help="default: each")
    parser.add_argument("--shape", action="append", help="default: the headline shapes")
    parser.add_argument("--batch", type=positive, default=64)
    parser.add_argument("--most", type=positive, default=24, help="candidates of a kernel, shape")
    parser.add_argument("--seconds", type=float, default=540, help="start no further search then")
    parser.add_argument("--workers", type=positive, default=parallel.default_workers())
    record.add_record_option(parser)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("there is no GPU to measure", file=sys.stderr)
        return 1
    deadline = time.monotonic() + options.seconds
    shapes = [_shape(name) for name in options.shape] if options.shape else list(HEADLINE)
    recorder = record.Recorder(options.record)
    jobs: list[Job] = []
    for shape, kernel in itertools.product(shapes, options.kernel or KERNELS):
        problem = Problem(KERNELS[kernel][0], shape, options.batch, torch.bfloat16)
        found = list(itertools.islice(candidates(kernel, problem), options.most))
        jobs += [Job(kernel, problem, tiles) for tiles in found]
        if not found:
            print(f"no candidates for {kernel} {problem.name}")
    print(f"{len(jobs)} candidates; compiling and checking in {options.workers} processes")
    passed = set()
    # Half of the time is for timing.
    for job, outcome in parallel.each(run_job, jobs, options.workers, options.seconds / 2):
        if outcome.failure is None:
            passed.add(job)
        else:
            recorder.add(_result(job) | {"outcome": "failed", "reason": outcome.failure})
            print(f"skipped {_describe(job)}: {outcome.failure}", flush=True)
    groups = itertools.groupby(jobs, key=lambda job: (job.kernel, job.problem))
    for (kernel, problem), group in groups:
        if time.monotonic() > deadline:
            print(f"no time for {kernel} {problem.name}")
            continue
        ranking: list[tuple[float, Job]] = []
        for job in group:
            if job not in passed or time.monotonic() > deadline:
                continue
            try:
                figures = _time(job)
            except (KeyError, RuntimeError, TritonError) as error:  # KeyError: it was not launched
                recorder.add(_result(job) | {"outcome": "failed", "reason": parallel.reason(error)})
                continue
            recorder.add(_result(job) | {"outcome": "ok", **figures})
            # A key kernel that leaves dQ to another is not done when it ends.
            ranking.append((float(str(figures["call_s"])), job))
        print(f"\n{kernel} {problem.name}: the whole call, on the device")
        for seconds, job in sorted(ranking, key=lambda pair: pair[0])[:8]:
            print(f"  {1e6 * seconds:10.1f} µs  {_describe(job)}", flush=True)
    recorder.close()
    return 0


def _result(job: Job) -> dict[str, object]:
    tiles: Any = job.tiles or _own(job.kernel, job.problem)
    return {
        "suite": "tiles",
        "kernel": job.kernel,
        **job.problem.info(),
        "own": job.tiles is None,
        "tiles": dataclasses.asdict(tiles),
    }


def _describe(job: Job) -> str:
    tiles: Any = _result(job)["tiles"]
    text = " ".join(f"{name}={value}" for name, value in tiles.items())
    return text + ("  (the table's)" if job.tiles is None else "")


if __name__ == "__main__":
    sys.exit(main())
