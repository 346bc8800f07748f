"""Timing of one call: device time on a GPU, wall time on a CPU, peak memory on both."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import psutil
import pytest
import torch

REPEATS = 50
# A call that takes longer than a fiftieth of this is repeated less often, and its record says so.
SECONDS = 4.0
LEAST_REPEATS = 5
GRAPH_REPEATS = 50
# More than the second-level cache of any GPU so far.
_FLUSHED_BYTES = 2**28


@dataclass
class Timing:
    """Figures of one call.

    Attributes:
        seconds: Of each repetition.
        host_seconds: What the host needs to enqueue the call on a GPU.
        graph_seconds: Of each replay of a CUDA graph of the call; empty where none was made.
        graph_refused: Why there is no graph.
        peak_bytes: Largest memory during the call, above what was held before it.
    """

    seconds: list[float]
    peak_bytes: int
    host_seconds: float | None = None
    graph_seconds: list[float] = field(default_factory=list)
    graph_refused: str | None = None

    def info(self) -> dict[str, object]:
        """As plain values for a record."""
        return {
            **_spread("", self.seconds),
            **({} if self.host_seconds is None else {"host_s": self.host_seconds}),
            **_spread("graph_", self.graph_seconds),
            **({"graph_refused": self.graph_refused} if self.graph_refused else {}),
            "peak_bytes": self.peak_bytes,
        }


def _spread(prefix: str, seconds: list[float]) -> dict[str, object]:
    if not seconds:
        return {}
    ordered = sorted(seconds)
    last = len(ordered) - 1
    return {
        f"{prefix}median_s": statistics.median(ordered),
        f"{prefix}p20_s": ordered[round(0.2 * last)],
        f"{prefix}p80_s": ordered[round(0.8 * last)],
        f"{prefix}repeats": len(ordered),
    }


class ReplayClock:
    """A timer for pytest-benchmark that replays durations measured on the device.

    It is read once before and once after each round, so every second reading moves it on.
    """

    def __init__(self) -> None:
        self._now = 0.0
        self._durations: Iterator[float] = iter(())
        self._running = False

    def load(self, durations: list[float]) -> None:
        """Take the durations of the next rounds."""
        self._durations, self._running = iter(durations), False

    def __call__(self) -> float:
        """Return the time in seconds."""
        if self._running:
            self._now += next(self._durations, 0.0)
        self._running = not self._running
        return self._now


CLOCK = ReplayClock()
# Of benchmarks whose calls are short: device time on a GPU, a few rounds on a CPU.
if torch.cuda.is_available():
    MARK = pytest.mark.benchmark(timer=CLOCK)
else:
    MARK = pytest.mark.benchmark(max_time=0.25, min_rounds=3)


def time_on_gpu(
    make: Callable[[], Callable[[], object]], graph: bool, repeats: int = REPEATS
) -> Timing:
    """Time a call by CUDA events, the L2 cache flushed before each repetition.

    The cache is flushed for as long as the host needs to enqueue the call and half as long again,
    so that the device never waits for the host; what the host needs is a figure of its own.

    Args:
        make: Makes the call; again on another stream for a graph.
        graph: Also time the replay of a graph.
        repeats: Least number of repetitions of a short call.
    """
    call = make()
    call()
    torch.cuda.synchronize()
    peak = _gpu_peak(call)
    flush = Flush(call)
    once = statistics.median(_events(call, flush, 3))
    # Clocks rise while the device works: at least a tenth of a second of the call itself.
    _events(call, flush, max(2, min(30, int(0.1 / once))))
    count = max(LEAST_REPEATS, min(repeats, int(SECONDS / once)))
    timing = Timing(_events(call, flush, count), peak, flush.host_seconds)
    if graph:
        try:
            timing.graph_seconds = _graph_times(make, flush)
        except RuntimeError as error:
            timing.graph_refused = str(error).strip().splitlines()[0][:200]
            torch.cuda.synchronize()
    return timing


class Flush:
    """Flushes the L2 cache for longer than the host needs to enqueue a call, see `time_on_gpu`.

    Attributes:
        host_seconds: What the host needs.
    """

    def __init__(self, call: Callable[[], object]) -> None:
        self._memory = torch.empty(_FLUSHED_BYTES, dtype=torch.uint8, device="cuda")
        hosts = []
        for _ in range(5):
            torch.cuda.synchronize()
            hosts.append(seconds_of(call))
        torch.cuda.synchronize()
        self.host_seconds = statistics.median(hosts)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._memory.zero_()
        start.record()
        self._memory.zero_()
        end.record()
        torch.cuda.synchronize()
        self._times = 1 + math.ceil(1.5 * self.host_seconds / (start.elapsed_time(end) / 1e3))

    def __call__(self) -> None:
        """Enqueue the flush."""
        for _ in range(self._times):
            self._memory.zero_()


def _events(call: Callable[[], object], flush: Callable[[], object], repeats: int) -> list[float]:
    pairs = []
    for _ in range(repeats):
        flush()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in pairs]


def _graph_times(
    make: Callable[[], Callable[[], object]], flush: Callable[[], object]
) -> list[float]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # Backward runs on the stream of its forward, which must be the one that is captured.
        call = make()
        for _ in range(3):
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()
    torch.cuda.synchronize()
    _events(graph.replay, flush, 5)
    return _events(graph.replay, flush, GRAPH_REPEATS)


def _gpu_peak(call: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def cpu_peak(call: Callable[[], object], seconds: float = 0.0005) -> int:
    """Return how far the process's resident memory rises during a call, looked at so often."""
    gc.collect()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # a C library other than GNU's
            ctypes.CDLL(None).malloc_trim(0)
    process = psutil.Process()
    before = process.memory_info().rss
    largest, done = before, threading.Event()

    def watch() -> None:
        nonlocal largest
        while not done.wait(seconds):
            largest = max(largest, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        kept = call()
        largest = max(largest, process.memory_info().rss)
        del kept
    finally:
        done.set()
        watcher.join()
    return largest - before


def seconds_of(call: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def in_words(seconds: float) -> str:
    """Return a time to three digits, with its unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size or unit == "µs":
            return f"{seconds / size:.3g} {unit}"
    raise AssertionError
