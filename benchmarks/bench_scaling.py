"""Time and memory of both operators against the number of tokens, and of images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from benchmarks import timing
from benchmarks.bench_operators import Case, _Kept
from benchmarks.record import bench_device
from benchmarks.rivals import RIVALS
from benchmarks.shapes import MOST_SCORES, OPERATORS, Problem, Shape

DEVICE = bench_device()
GPU = DEVICE.type == "cuda"
SIDES = (16, 32, 64, 128, 256)
# Head width and window of the authors' first level.
WIDTH, WINDOW = 16, 11
# Against the batch: the second level.
BATCH_SHAPE = Shape(32, 32, 7)
SCALED_BATCHES = (1, 4, 16, 64, 256) if GPU else (1, 2, 4, 8, 16)
# MLKA takes a CPU over a minute a call beyond this.
CPU_SIDE = 128
# Dense scores beyond this many bytes are not tried on a CPU.
CPU_DENSE_SIDE = 64

if GPU:
    pytestmark = pytest.mark.benchmark(timer=timing.CLOCK)
else:
    pytestmark = pytest.mark.benchmark(max_time=0.25, min_rounds=3)


@dataclass(frozen=True)
class Point:
    """One point of a plot: a case, and the axis along which it lies, ``tokens`` or ``batch``."""

    axis: str
    case: Case


def points(headline: bool, large: bool) -> list[Point]:
    """Return what this device times."""
    dtype = torch.bfloat16 if GPU else torch.float32
    names = ("triton", "tiled", "dense") if GPU else ("tiled", "dense")
    if headline:
        return []
    ours = [rival for rival in RIVALS if rival.name in names]
    problems = []
    for operator in OPERATORS:
        for rival in ours:
            for batch in SCALED_BATCHES:
                problems.append(("batch", rival, Problem(operator, BATCH_SHAPE, batch, dtype)))
            for side in SIDES:
                problem = Problem(operator, Shape(side, WIDTH, WINDOW), 4 if GPU else 1, dtype)
                if problem.scores > MOST_SCORES and operator == "mlka":
                    continue
                if not GPU and not large and operator == "mlka" and side > CPU_SIDE:
                    continue
                if not GPU and rival.name == "dense" and side > CPU_DENSE_SIDE:
                    continue
                problems.append(("tokens", rival, problem))
    return [
        Point(axis, Case(problem, rival, way))
        for axis, rival, problem in problems
        for way in ("forward", "both")
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make a benchmark of every case."""
    option = metafunc.config.getoption
    found = points(option("--benchmark-headline"), option("--benchmark-large"))
    metafunc.parametrize("point", [pytest.param(p, id=f"{p.axis}-{p.case.name}") for p in found])


_KEPT = _Kept()


def test_scaling(measure: Callable[..., None], point: Point) -> None:
    """Time one point."""
    case = point.case
    problem, rival, direction = case.problem, case.rival, case.direction
    assert rival is not None

    def prepare() -> dict[str, float]:
        contest = _KEPT.contest_of(problem, rival)
        return contest.check(direction, _KEPT.truth_of(problem, masked=True))

    try:
        measure(
            case.info() | {"suite": "scaling", "axis": point.axis},
            f"scaling {point.axis} {problem.operator} {direction} {rival.name}",
            prepare,
            lambda: _KEPT.contest_of(problem, rival).call(direction),
            context=rival.context,
        )
    finally:
        if _KEPT.contest is not None:
            _KEPT.contest.release()
