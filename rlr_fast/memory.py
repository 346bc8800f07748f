"""Memory at hand: of the machine, or of the container that has less."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

_ROOT = Path("/")

# By version of control groups: below which folder they lie, the files of limit and use, and what of
# the use the system takes back when it is asked for memory: caches of files.
_GROUPS = (
    (
        "sys/fs/cgroup",
        "memory.max",
        "memory.current",
        ("inactive_file", "active_file", "slab_reclaimable"),
    ),
    (
        "sys/fs/cgroup/memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        ("total_inactive_file", "total_active_file"),
    ),
)
# Version 1 writes the largest number of whole pages where there is no limit.
_NO_LIMIT = 2**60


class GroupMemory(NamedTuple):
    """Memory of a control group, in bytes.

    Attributes:
        left: What its processes may still take before the system ends one of them.
        limit: What they may take in all.
    """

    left: int
    limit: int


def available_memory(root: Path = _ROOT) -> int:
    """Return how many bytes a process may still take before the system ends one for want of memory.

    That is what the machine has left or, where it is less, what is left of a limit that a container
    or a batch queue has set (a control group of Linux, version 1 or 2).

    Args:
        root: Of the file system.
    """
    group = group_memory(root)
    there = psutil.virtual_memory().available
    return there if group is None else min(there, group.left)


def group_memory(root: Path = _ROOT) -> GroupMemory | None:
    """Return the memory of the control group that has least left; None where none has a limit.

    Args:
        root: Of the file system.
    """
    return min(_groups(root), default=None)


def _groups(root: Path) -> Iterator[GroupMemory]:
    """Yield the memory of this process's groups, which lie in each other."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return
    paths = [line.split(":", 2)[2].strip("/") for line in lines if line.count(":") >= 2]
    for place, limit, use, caches in _GROUPS:
        # In a container the path may be that of the host: its own group is the root then.
        for path in {parent for name in paths for parent in (Path(name), *Path(name).parents)}:
            folder = root / place / path
            with contextlib.suppress(OSError, ValueError):  # "max" is no number
                most = int((folder / limit).read_text())
                if most >= _NO_LIMIT:
                    continue
                used = int((folder / use).read_text())
                stat = dict(map(str.split, (folder / "memory.stat").read_text().splitlines()))
                cached = sum(int(stat.get(name, 0)) for name in caches)
                yield GroupMemory(max(0, most - used + cached), most)
