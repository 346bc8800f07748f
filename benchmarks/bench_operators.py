"""Both operators at the paper's shapes: batch, direction and baseline."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from benchmarks import baselines, check, timing
from benchmarks.baselines import BASELINES, Baseline, Contest, CopyContest
from benchmarks.record import bench_device
from benchmarks.shapes import (
    BATCHES,
    CPU_BATCHES,
    DIRECTIONS,
    HEADLINE,
    MOST_SCORES,
    OPERATORS,
    PAPER,
    Inputs,
    Problem,
    make_inputs,
)

DEVICE = bench_device()
# Calls of small batches are shorter than the host needs to launch them.
GRAPH_BATCHES = 16
# A gigabyte of masks an image would be timed, not an operator.
LARGEST_DENSE_SIDE = 128

pytestmark = timing.MARK


@dataclass(frozen=True)
class Case:
    """One benchmark; no baseline is the copy."""

    problem: Problem
    baseline: Baseline | None
    direction: str

    @property
    def name(self) -> str:
        """Of the problem, the direction and the baseline: the id of the benchmark."""
        baseline = baselines.COPY if self.baseline is None else self.baseline.name
        return f"{self.problem.name}-{self.direction}-{baseline}"

    def worth_while(self, headline: bool, large: bool) -> bool:
        """Whether the case tells more than the minutes that it takes."""
        assert self.baseline is not None
        name, problem = self.baseline.name, self.problem
        if headline:
            return self.direction != "both"
        if problem.shape.side > LARGEST_DENSE_SIDE or problem.scores > MOST_SCORES:
            return name == "triton" or (name == "tiled" and problem.scores <= 4 * MOST_SCORES)
        if DEVICE.type == "cpu" and not large and name in baselines.QUADRATIC:
            # N×N baselines take seconds per call: each direction of one image, one window per grid.
            first = problem.shape in HEADLINE and problem.batch == 1
            return first and self.direction != "both"
        return True

    def info(self) -> dict[str, object]:
        """As plain values for a record."""
        baseline, label = baselines.COPY, baselines.COPY_LABEL
        if self.baseline is not None:
            baseline, label = self.baseline.name, self.baseline.label
        return {
            "suite": "operators",
            **self.problem.info(),
            "direction": self.direction,
            "rival": baseline,
            "label": label,
            "least_bytes": self.problem.traffic(self.direction),
        }


def problems(headline: bool, large: bool) -> Iterator[Problem]:
    """Yield what this device times, the most telling first."""
    gpu = DEVICE.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    for shape in HEADLINE if headline else PAPER:
        if gpu:
            batches: tuple[int, ...] = (64,) if headline else BATCHES
        else:
            batches = (1,) if headline else CPU_BATCHES.get(shape.side, (1,) if large else ())
        for operator in reversed(OPERATORS):
            for batch in batches:
                problem = Problem(operator, shape, batch, dtype)
                if operator == "lca" or problem.scores <= MOST_SCORES:
                    yield problem


def cases(headline: bool, large: bool) -> Iterator[Case]:
    """Yield benchmarks in an order that lets neighbors share inputs, truth and baseline."""
    telling = baselines.HEADLINE if DEVICE.type == "cuda" else baselines.CPU_HEADLINE
    for problem in problems(headline, large):
        for baseline in BASELINES:
            if DEVICE.type not in baseline.devices or (headline and baseline.name not in telling):
                continue
            for direction in DIRECTIONS:
                case = Case(problem, baseline, direction)
                if case.worth_while(headline, large):
                    yield case
        if problem.operator == "lca" and not (headline and DEVICE.type == "cpu"):
            for direction in DIRECTIONS:
                yield Case(problem, None, direction)


class _Last:
    """The last problem's inputs and truths, and the last baseline: the next case often shares them.

    What is replaced is dropped first, so that two never share the memory.
    """

    def __init__(self) -> None:
        self.problem: Problem | None = None
        self.inputs: Inputs | None = None
        self.truths: dict[bool, check.Truth] = {}
        self.contest: Contest | None = None

    def contest_of(self, problem: Problem, baseline: Baseline) -> Contest:
        held = self.contest
        if held is not None and held.problem == problem and held.baseline is baseline:
            return held
        self.contest = None
        self.contest = Contest(baseline, problem, self._inputs_of(problem))
        return self.contest

    def truth_of(self, problem: Problem, masked: bool) -> check.Truth:
        inputs = self._inputs_of(problem)
        if masked not in self.truths:
            self.truths[masked] = check.definition(problem, inputs, masked)
        return self.truths[masked]

    def _inputs_of(self, problem: Problem) -> Inputs:
        if self.problem != problem or self.inputs is None:
            self.drop()
            self.inputs, self.problem = make_inputs(problem, DEVICE), problem
        return self.inputs

    def drop(self) -> None:
        self.problem = self.inputs = self.contest = None
        self.truths = {}


_LAST = _Last()


def time_baseline(
    measure: Callable[..., None],
    case: Case,
    info: dict[str, object],
    group: str,
    graph: bool = False,
) -> None:
    """Check and time a baseline; inputs and truth are the last problem's where it is the same."""
    problem, baseline, direction = case.problem, case.baseline, case.direction
    assert baseline is not None

    def prepare() -> dict[str, float]:
        contest = _LAST.contest_of(problem, baseline)  # says first whether it can run here at all
        return contest.check(direction, _LAST.truth_of(problem, baseline.masked))

    def make() -> Callable[[], object]:
        return _LAST.contest_of(problem, baseline).call(direction)

    try:
        measure(info, group, prepare, make, graph, baseline.context)
    finally:
        if _LAST.contest is not None:
            _LAST.contest.release()


def test_operator(measure: Callable[..., None], case: Case) -> None:
    """Time one case."""
    group = f"{case.problem.name} {case.direction}"
    graph = case.problem.batch <= GRAPH_BATCHES
    if case.baseline is not None:
        time_baseline(measure, case, case.info(), group, graph)
        return
    copy = CopyContest(case.problem, DEVICE)
    measure(case.info(), group, dict, lambda: copy.call(case.direction), graph)
    copy.release()
