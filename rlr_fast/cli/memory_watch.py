"""A line before the system ends the command for want of memory, which it does without a word."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

import psutil

from rlr_fast.memory import group_memory

# Where less than this is left of a limit, the next allocation may be the last.
_RESERVE = 64 * 2**20
# Faster than this, in bytes per second, memory is hardly filled; it says when to look again.
_FASTEST = 8e9
_SHORTEST, _LONGEST = 0.002, 0.5  # seconds between two looks


@contextlib.contextmanager
def watched_memory(advice: str) -> Iterator[None]:
    """End the process with a line and code 2 in the block where its container's memory ends.

    Files appear whole or not at all, so that ending at once loses no more than the system's kill
    would. Where no control group of Linux sets a limit, or where the machine has swap space,
    nothing is watched.

    Args:
        advice: What needs less memory.
    """
    if group_memory() is None or psutil.swap_memory().total:
        yield
        return
    done = threading.Event()
    watch = threading.Thread(target=_watch, args=(done, advice), name="memory", daemon=True)
    watch.start()
    try:
        yield
    finally:
        done.set()
        watch.join()


def _watch(done: threading.Event, advice: str) -> None:
    wait = 0.0
    while not done.wait(wait):
        memory = group_memory()
        if memory is None:
            return
        if memory.left < _RESERVE:
            end_for_want_of_memory(memory.limit, advice)
        wait = min(_LONGEST, max(_SHORTEST, (memory.left - _RESERVE) / _FASTEST))


def end_for_want_of_memory(limit: int, advice: str) -> None:
    """Tell that the limit is reached, and end the process."""
    line = (
        f"\nrlr-fast: error: out of memory: the {limit >> 20} MiB that this container may take are "
        f"nearly full; {advice}\n"
    )
    os.write(2, line.encode())
    os._exit(2)
