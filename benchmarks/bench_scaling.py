"""Time and memory of both operators against the number of tokens."""

from __future__ import annotations

from collections.abc import Callable

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
# Head width and window of the paper's first level.
WIDTH, WINDOW = 16, 11
# MLKA takes a CPU over a minute a call beyond this.
CPU_SIDE = 64
# Dense scores beyond this many bytes are not tried on a CPU.
CPU_DENSE_SIDE = 64

if GPU:
    pytestmark = pytest.mark.benchmark(timer=timing.CLOCK)
else:
    pytestmark = pytest.mark.benchmark(max_time=0.25, min_rounds=3)


def cases(headline: bool, large: bool) -> list[Case]:
    """Return what this device times."""
    dtype = torch.bfloat16 if GPU else torch.float32
    names = ("triton", "tiled", "dense") if GPU else ("tiled", "dense")
    if headline:
        return []
    found = []
    for operator in OPERATORS:
        for rival in (rival for rival in RIVALS if rival.name in names):
            for side in SIDES:
                problem = Problem(operator, Shape(side, WIDTH, WINDOW), 4 if GPU else 1, dtype)
                if problem.scores > MOST_SCORES and operator == "mlka":
                    continue
                if not GPU and not large and operator == "mlka" and side > CPU_SIDE:
                    continue
                if not GPU and rival.name == "dense" and side > CPU_DENSE_SIDE:
                    continue
                found += [Case(problem, rival, way) for way in ("forward", "both")]
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make a benchmark of every case."""
    option = metafunc.config.getoption
    found = cases(option("--benchmark-headline"), option("--benchmark-large"))
    metafunc.parametrize("case", [pytest.param(case, id=case.name) for case in found])


_KEPT = _Kept()


def test_scaling(measure: Callable[..., None], case: Case) -> None:
    """Time one case."""
    problem, rival, direction = case.problem, case.rival, case.direction
    assert rival is not None

    def prepare() -> dict[str, float]:
        contest = _KEPT.contest_of(problem, rival)
        return contest.check(direction, _KEPT.truth_of(problem, masked=True))

    try:
        measure(
            case.info() | {"suite": "scaling"},
            f"scaling {problem.operator} {direction} {rival.name}",
            prepare,
            lambda: _KEPT.contest_of(problem, rival).call(direction),
            context=rival.context,
        )
    finally:
        if _KEPT.contest is not None:
            _KEPT.contest.release()
