"""Memory at hand: of the machine, or of the container that has less."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import psutil

_ROOT = Path("/")

# By version of control groups: below which folder they lie, and the files of limit and use. What
# of the use is the cache of files, the system gives back when it is asked for memory.
_GROUPS = (
    ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    (
        "sys/fs/cgroup/memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
)


def available_memory(root: Path = _ROOT) -> int:
    """Return how many bytes a process may still take before the system ends one for want of memory.

    That is what the machine has left or, where it is less, what is left of a limit that a container
    or a batch queue has set (a control group of Linux, version 1 or 2).

    Args:
        root: Of the file system.
    """
    return min([psutil.virtual_memory().available, *_left(root)])


def _left(root: Path) -> Iterator[int]:
    """Yield what is left of the limits of this process's groups, which lie in each other."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return
    paths = [line.split(":", 2)[2].strip("/") for line in lines if line.count(":") >= 2]
    for place, limit, use, cache in _GROUPS:
        # In a container the path may be that of the host: its own group is the root then.
        for path in {parent for name in paths for parent in (Path(name), *Path(name).parents)}:
            folder = root / place / path
            with contextlib.suppress(OSError, ValueError, KeyError):  # "max" is no number
                most = int((folder / limit).read_text())
                used = int((folder / use).read_text())
                stat = dict(map(str.split, (folder / "memory.stat").read_text().splitlines()))
                yield max(0, most - used + int(stat[cache]))
