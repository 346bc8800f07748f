"""Threads that read ahead of the caller, or write behind it."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from typing_extensions import Self

T = TypeVar("T")
R = TypeVar("R")


def default_workers() -> int:
    """Return how many threads decode images: the processors this process may use, 8 at most."""
    # sched_getaffinity sees the limits of a container or a batch queue; only Linux has it.
    if hasattr(os, "sched_getaffinity"):
        return min(8, len(os.sched_getaffinity(0)))
    return min(8, os.cpu_count() or 1)


def map_ahead(
    function: Callable[[T], R],
    items: Iterable[T],
    workers: int | None = None,
    ahead: int | None = None,
) -> Iterator[R]:
    """Yield ``function(item)`` in order, computed ahead by threads while the caller is busy.

    What has not begun when the iteration ends, however it ends, is left undone.

    Args:
        function: Called in the threads; what it raises is raised in its turn.
        items: Its arguments.
        workers: Threads; `default_workers` by default.
        ahead: Most results that are waiting or being made; two per thread by default.
    """
    workers = default_workers() if workers is None else workers
    pending: deque[Future[R]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="ahead")
    try:
        for item in items:
            if len(pending) == (ahead or 2 * workers):
                yield pending.popleft().result()
            pending.append(pool.submit(function, item))
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class BackgroundWriter:
    """Threads that do jobs in order, with a bounded number of them waiting.

    A context manager: leaving it waits for every job, whatever the reason for leaving, so that an
    interruption loses nothing that was handed over. The first error of a job is raised by a later
    `submit`, or on leaving.

    Args:
        threads: Threads; one does the jobs strictly one after the other.
        jobs: Most unfinished jobs; `submit` waits for room.
        cost: Most cost of the unfinished jobs together, whatever the jobs' costs count; a job that
            costs more is done while no other waits.
    """

    def __init__(self, threads: int, jobs: int, cost: float = float("inf")) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="writer")
        self._jobs, self._cost = jobs, cost
        self._pending: deque[tuple[Future[None], float]] = deque()

    def submit(self, job: Callable[[], None], cost: float = 0) -> Future[None]:
        """Hand over a job, when there is room for it; return what tells that it is done.

        Raises:
            Exception: Whatever an earlier job raised.
        """
        while self._pending and (
            self._pending[0][0].done()
            or len(self._pending) >= self._jobs
            or sum(c for _, c in self._pending) + cost > self._cost
        ):
            self._pending.popleft()[0].result()
        future = self._pool.submit(job)
        self._pending.append((future, cost))
        return future

    @property
    def busy(self) -> bool:
        """Whether a job is unfinished."""
        return any(not job.done() for job, _ in self._pending)

    def finish(self) -> None:
        """Wait for every job.

        Raises:
            Exception: Whatever a job raised.
        """
        while self._pending:
            self._pending.popleft()[0].result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._pool.shutdown(wait=True)
        if error is None:  # the block's own error comes first
            self.finish()
