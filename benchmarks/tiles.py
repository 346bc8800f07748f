"""Tile search at the headline shapes: every candidate's time on the record, in a few minutes.

``python -m benchmarks.tiles [--kernel NAME] [--shape NAME] [--seconds S]``. It serves the shipped
table; ``rlr-fast tune`` serves a user's own GPU, and tries the same candidates. Here they are
compiled and compared with the definition in parallel processes; those that pass are timed one after
another.
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

from benchmarks import check, pool, record, timing
from benchmarks.shapes import HEADLINE, OPERATORS, PAPER, Problem, Shape, make_inputs
from rlr_fast.kernels import tiles as shipped_tiles
from rlr_fast.kernels import tuning
from rlr_fast.kernels._launch import Geometry

# Of a kernel: its operator, whether backward runs it, and whether deterministically alone.
KERNELS: dict[str, tuple[str, bool, bool]] = {
    "raster_forward": ("mlka", False, False),
    "raster_key": ("mlka", True, False),
    "halo_forward": ("lca", False, False),
    "halo_backward": ("lca", True, False),
    "raster_query": ("mlka", True, True),
}
_REPEATS = 30


@dataclass(frozen=True)
class Job:
    """One candidate on one problem; no tiles are the table's own."""

    kernel: str
    problem: Problem
    tiles: shipped_tiles.Tiles | None


def candidates(kernel: str, problem: Problem) -> Iterator[shipped_tiles.Tiles | None]:
    """Yield the table's own tiles, then others, each once."""
    yield None
    own = _own(kernel, problem)
    # Those most like the table's own first: a search that runs out of time has seen the likely.
    found = sorted(tuning.candidates(kernel), key=lambda tiles: _distance(tiles, own))
    yield from (tiles for tiles in dict.fromkeys(found) if tiles != own)


def _own(kernel: str, problem: Problem) -> shipped_tiles.Tiles:
    return shipped_tiles.shipped(
        shipped_tiles.Problem(
            kernel,
            Geometry.of(problem.grid, problem.window),
            problem.shape.width,
            problem.batch,
            problem.dtype,
            record.bench_device(),
        )
    )


def _distance(tiles: Any, own: Any) -> int:
    return sum(
        getattr(tiles, field.name) != getattr(own, field.name) for field in dataclasses.fields(own)
    )


def _prepared(job: Job) -> tuple[Callable[[], Any], Any]:
    """Return the call that runs the kernel, and its inputs; to be used with the tiles forced."""
    _, backward, _ = KERNELS[job.kernel]
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
    # The table's own are forced too: tiles tuned on this machine would take their place.
    own = _own(job.kernel, job.problem)
    return shipped_tiles.forced(**{job.kernel: own if job.tiles is None else job.tiles})


def run_job(job: Job) -> dict[str, float]:
    """Compile a candidate and compare it with the definition; in a process of the pool."""
    _, backward, deterministic = KERNELS[job.kernel]
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
    torch.use_deterministic_algorithms(KERNELS[job.kernel][2])
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    call, _ = _prepared(job)
    with _forced(job):
        measured = timing.time_on_gpu(lambda: call, graph=False, repeats=_REPEATS)
    torch.use_deterministic_algorithms(False)
    return measured.info()


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
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--most", type=int, default=24, help="candidates of a kernel and shape")
    parser.add_argument("--seconds", type=float, default=540, help="start no further search then")
    parser.add_argument("--workers", type=int, default=pool.default_workers())
    parser.add_argument("--record", metavar="NAME", help="as of pytest --benchmark-record")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("there is no GPU to measure", file=sys.stderr)
        return 1
    deadline = time.monotonic() + options.seconds
    shapes = [_shape(name) for name in options.shape] if options.shape else list(HEADLINE)
    recorder = record.Recorder(record.record_path(options.record) if options.record else None)
    jobs: list[Job] = []
    for shape, kernel in itertools.product(shapes, options.kernel or KERNELS):
        problem = Problem(KERNELS[kernel][0], shape, options.batch, torch.bfloat16)
        found = itertools.islice(candidates(kernel, problem), options.most)
        jobs += [Job(kernel, problem, tiles) for tiles in found]
    print(f"{len(jobs)} candidates; compiling and checking in {options.workers} processes")
    passed = set()
    # Half of the time is for timing.
    for job, outcome in pool.each(run_job, jobs, options.workers, options.seconds / 2):
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
            except (RuntimeError, TritonError) as error:
                recorder.add(_result(job) | {"outcome": "failed", "reason": pool.reason(error)})
                continue
            recorder.add(_result(job) | {"outcome": "ok", **figures})
            ranking.append((float(str(figures["median_s"])), job))
        print(f"\n{kernel} {problem.name}")
        for seconds, job in sorted(ranking, key=lambda pair: pair[0])[:8]:
            print(f"  {1e6 * seconds:10.1f} µs  {_describe(job)}", flush=True)
    recorder.close()
    return 0


def _result(job: Job) -> dict[str, object]:
    tiles = _own(job.kernel, job.problem) if job.tiles is None else job.tiles
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
