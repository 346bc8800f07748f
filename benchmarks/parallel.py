"""Many compilations and checks at once: jobs in processes of their own, results as they come.

A kernel takes seconds to compile and milliseconds to run. Processes share Triton's cache of
compiled kernels, and one that breaks its CUDA context breaks no other's.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

from triton.errors import TritonError

_ROUNDS = 3
# Set in a process whose CUDA context a kernel has broken: its later jobs go to another.
_broken = False


class Outcome(NamedTuple):
    """What came of a job: its result, or the reason why there is none."""

    result: Any = None
    failure: str | None = None
    again: bool = False


def default_workers() -> int:
    """Return a number of processes that leaves memory and cores to each."""
    return max(1, min(12, (os.cpu_count() or 1) - 2))


def each(
    work: Callable[[Any], Any], jobs: Sequence[Any], workers: int, seconds: float
) -> Iterator[tuple[Any, Outcome]]:
    """Yield (job, outcome) in order of completion.

    Args:
        work: A function of an importable module.
        jobs: What it is called with, one at a time in a process.
        workers: Processes.
        seconds: Give up on what is not done then.
    """
    deadline = time.monotonic() + seconds
    pending = list(jobs)
    if not pending:
        return
    for last in (False,) * (_ROUNDS - 1) + (True,):
        again = []
        executor = concurrent.futures.ProcessPoolExecutor(
            min(workers, len(pending)), mp_context=multiprocessing.get_context("spawn")
        )
        futures = {executor.submit(_attempt, work, job): job for job in pending}
        left = max(0.0, deadline - time.monotonic())
        try:
            for future in concurrent.futures.as_completed(futures, timeout=left):
                try:
                    outcome = future.result()
                except BrokenProcessPool:
                    outcome = Outcome(again=True)
                if outcome.again and not last:
                    again.append(futures[future])
                elif outcome.again:
                    yield futures[future], Outcome(failure="its process died")
                else:
                    yield futures[future], outcome
        except concurrent.futures.TimeoutError:
            late = [job for future, job in futures.items() if not future.done()]
            for job in late + again:
                yield job, Outcome(failure=f"not done within {seconds:.0f} s")
            again = []
        finally:
            _stop(executor)
        pending = again
        if not pending:
            return


def _attempt(work: Callable[[Any], Any], job: Any) -> Outcome:
    global _broken
    if _broken:
        return Outcome(again=True)
    try:
        return Outcome(work(job))
    except (RuntimeError, ValueError, AssertionError, TypeError, TritonError) as error:
        _broken = "CUDA error" in str(error)
        return Outcome(failure=reason(error))


def _stop(executor: concurrent.futures.ProcessPoolExecutor) -> None:
    processes = list((executor._processes or {}).values())
    executor.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.join(0.5)
        if process.is_alive():
            process.terminate()


def reason(error: BaseException) -> str:
    """Say an error in a line: its first, and its last where it has several."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    text = lines[0] if len(lines) == 1 else f"{lines[0]} … {lines[-1]}"
    return f"{type(error).__name__}: {text}"[:300]
