"""Threads that meet an operator at once: what one tries out or records, others launch."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from attention_cases import MLKA, make_inputs

from rlr_fast.kernels import _launch, _trial

GRID, WINDOW = (4, 5), (3, 3)


@pytest.fixture
def attend() -> Callable[[], torch.Tensor]:
    query, key, value, _ = make_inputs(MLKA, GRID)
    return lambda: MLKA(query, key, value, GRID, WINDOW, backend="triton")


@pytest.mark.parametrize("state", [_launch.compile_only, _launch.recorded])
def test_another_thread_launches_meanwhile(state, attend):
    expected = attend()

    with ThreadPoolExecutor(1) as thread, state():
        assert torch.equal(thread.submit(attend).result(), expected)


def test_one_thread_tries_at_a_time(monkeypatch):
    """So that no two compile the same."""
    passes, inside, met = _trial.launch_passes, [], []

    def slow(*arguments):
        met.append(len(inside))
        inside.append(True)
        time.sleep(0.05)
        passes(*arguments)
        inside.pop()

    def meet(grid: tuple[int, int]) -> str | None:
        query, _, value, _ = make_inputs(MLKA, grid)
        return _trial.refusal("mlka", query, value, grid, WINDOW, True)

    monkeypatch.setattr(_trial, "launch_passes", slow)
    _trial._try.cache_clear()  # other tests may have met these grids
    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(meet, [(6, 7), (7, 6)])) == [None, None]
    assert met == [0, 0]
