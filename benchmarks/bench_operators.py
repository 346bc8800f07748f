"""Both operators at the paper's shapes: batch, direction and rival."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from benchmarks import check, rivals, timing
from benchmarks.record import bench_device
from benchmarks.rivals import RIVALS, Contest, CopyContest, Rival
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
    """One benchmark; no rival is the copy."""

    problem: Problem
    rival: Rival | None
    direction: str

    @property
    def name(self) -> str:
        """Of the problem, the direction and the rival: the id of the benchmark."""
        return f"{self.problem.name}-{self.direction}-{self.rival.name if self.rival else 'copy'}"

    def worth_while(self, headline: bool, large: bool) -> bool:
        """Whether the case tells more than the minutes that it takes."""
        assert self.rival is not None
        name, problem = self.rival.name, self.problem
        if headline:
            return self.direction != "both"
        if problem.shape.side > LARGEST_DENSE_SIDE or problem.scores > MOST_SCORES:
            return name == "triton" or (name == "tiled" and problem.scores <= 4 * MOST_SCORES)
        if DEVICE.type == "cpu" and not large and name in rivals.QUADRATIC:
            # N×N rivals take seconds a call: both directions apart, an image, a window a grid.
            first = problem.shape in HEADLINE and problem.batch == 1
            return first and self.direction != "both"
        return True

    def info(self) -> dict[str, object]:
        """As plain values for a record."""
        rival, label = rivals.COPY, rivals.COPY_LABEL
        if self.rival is not None:
            rival, label = self.rival.name, self.rival.label
        return {
            "suite": "operators",
            **self.problem.info(),
            "direction": self.direction,
            "rival": rival,
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
    """Yield benchmarks in an order that lets neighbors share inputs, truth and rival."""
    telling = rivals.HEADLINE if DEVICE.type == "cuda" else rivals.CPU_HEADLINE
    for problem in problems(headline, large):
        for rival in RIVALS:
            if DEVICE.type not in rival.devices or (headline and rival.name not in telling):
                continue
            for direction in DIRECTIONS:
                case = Case(problem, rival, direction)
                if case.worth_while(headline, large):
                    yield case
        if problem.operator == "lca" and not (headline and DEVICE.type == "cpu"):
            for direction in DIRECTIONS:
                yield Case(problem, None, direction)


class _Last:
    """The last problem's inputs and truths, and the last rival: the next case mostly shares them.

    What is replaced is dropped first, so that two never share the memory.
    """

    def __init__(self) -> None:
        self.problem: Problem | None = None
        self.inputs: Inputs | None = None
        self.truths: dict[bool, check.Truth] = {}
        self.contest: Contest | None = None

    def contest_of(self, problem: Problem, rival: Rival) -> Contest:
        held = self.contest
        if held is not None and held.problem == problem and held.rival is rival:
            return held
        self.contest = None
        self.contest = Contest(rival, problem, self._inputs_of(problem))
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


def time_rival(
    measure: Callable[..., None],
    case: Case,
    info: dict[str, object],
    group: str,
    graph: bool = False,
) -> None:
    """Check and time a rival; inputs and truth are the last problem's where it is the same."""
    problem, rival, direction = case.problem, case.rival, case.direction
    assert rival is not None

    def prepare() -> dict[str, float]:
        contest = _LAST.contest_of(problem, rival)  # says first whether it can run here at all
        return contest.check(direction, _LAST.truth_of(problem, rival.masked))

    def make() -> Callable[[], object]:
        return _LAST.contest_of(problem, rival).call(direction)

    try:
        measure(info, group, prepare, make, graph, rival.context)
    finally:
        if _LAST.contest is not None:
            _LAST.contest.release()


def test_operator(measure: Callable[..., None], case: Case) -> None:
    """Time one case."""
    group = f"{case.problem.name} {case.direction}"
    graph = case.problem.batch <= GRAPH_BATCHES
    if case.rival is not None:
        time_rival(measure, case, case.info(), group, graph)
        return
    copy = CopyContest(case.problem, DEVICE)
    measure(case.info(), group, dict, lambda: copy.call(case.direction), graph)
    copy.release()
