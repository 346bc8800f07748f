"""Time and memory of both operators against the number of tokens, and of images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks import timing
from benchmarks.baselines import BASELINES
from benchmarks.bench_operators import Case, time_baseline
from benchmarks.record import bench_device
from benchmarks.shapes import MOST_SCORES, OPERATORS, Problem, Shape

DEVICE = bench_device()
GPU = DEVICE.type == "cuda"
SIDES = (16, 32, 64, 128, 256)
# Head width and window of the authors' first level.
WIDTH, WINDOW = 16, 11
# Against the batch: the second level.
BATCH_SHAPE = Shape(32, 32, 7)
SCALED_BATCHES = (1, 4, 16, 64, 256) if GPU else (1, 2, 4, 8, 16)
# MLKA takes a CPU over a minute per call beyond this.
CPU_SIDE = 128
# Dense scores beyond this many bytes are not tried on a CPU.
CPU_DENSE_SIDE = 64

pytestmark = timing.MARK


@dataclass(frozen=True)
class Point:
    """One point of a plot: a case, and the axis along which it lies, ``tokens`` or ``batch``."""

    axis: str
    case: Case

    @property
    def name(self) -> str:
        """The id of the benchmark."""
        return f"{self.axis}-{self.case.name}"


def cases(headline: bool, large: bool) -> list[Point]:
    """Return what this device times."""
    dtype = torch.bfloat16 if GPU else torch.float32
    names = ("triton", "tiled", "dense") if GPU else ("tiled", "dense")
    if headline:
        return []
    ours = [baseline for baseline in BASELINES if baseline.name in names]
    problems = []
    for operator in OPERATORS:
        for baseline in ours:
            for batch in SCALED_BATCHES:
                problems.append(("batch", baseline, Problem(operator, BATCH_SHAPE, batch, dtype)))
            for side in SIDES:
                problem = Problem(operator, Shape(side, WIDTH, WINDOW), 4 if GPU else 1, dtype)
                if problem.scores > MOST_SCORES and operator == "mlka":
                    continue
                if not GPU and not large and operator == "mlka" and side > CPU_SIDE:
                    continue
                if not GPU and baseline.name == "dense" and side > CPU_DENSE_SIDE:
                    continue
                problems.append(("tokens", baseline, problem))
    return [
        Point(axis, Case(problem, baseline, way))
        for axis, baseline, problem in problems
        for way in ("forward", "both")
    ]


def test_scaling(measure: Callable[..., None], case: Point) -> None:
    """Time one point."""
    timed = case.case
    assert timed.baseline is not None
    time_baseline(
        measure,
        timed,
        timed.info() | {"suite": "scaling", "axis": case.axis},
        f"scaling {case.axis} {timed.problem.operator} {timed.direction} {timed.baseline.name}",
    )
