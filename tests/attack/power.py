"""Losses of power, replayed: what the disk had not been told to keep is gone, in any order.

A job runs once and tells what it does to its files: what it syncs, renames and removes. From that
come the folders that a loss of power may leave: every file is its version at any moment since its
folder was last synced, and of its content only what was synced is sure. The same command must go on
from each of them.
"""

from __future__ import annotations

import os
import pickle
import stat
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.attack.kills import Found, Job, another_result, attacked_jobs, clear, content
from tests.attack.lab import MEMORY_DISK
from tests.attack.processes import Child, fault_of

_CHANGES = {"os.rename": 2, "os.remove": 1, "os.rmdir": 1, "os.truncate": 1}  # paths of each

_NOT_RECORDED = (".lock", "tfevents")


@dataclass(frozen=True)
class Moment:
    """A job's files between two changes.

    Attributes:
        files: Content by path.
        synced: How many bytes of each are sure.
        durable: By folder, number of the moment when its names were last sure.
    """

    files: Mapping[Path, bytes]
    synced: Mapping[Path, int]
    durable: Mapping[Path, int]


class Recorder:
    """Writes down the moments of folders, in the process that works there.

    Args:
        folders: What is recorded.
        log: File for the moments.
    """

    def __init__(self, folders: Sequence[Path], log: Path) -> None:
        self._folders = folders
        self._log = log
        self._synced: dict[int, int] = {}  # of inodes
        self._durable: dict[Path, int] = {}
        self._moments = 0
        self._at_work = False

    def install(self) -> None:
        """Begin; there is no end before that of the process."""
        sync = os.fsync

        def fsync(number: int) -> None:
            sync(number)
            status = os.fstat(number)
            if stat.S_ISDIR(status.st_mode):
                self._take()
                self._durable[Path(os.readlink(f"/proc/self/fd/{number}"))] = self._moments - 1
            else:
                self._synced[status.st_ino] = status.st_size

        os.fsync = fsync
        sys.addaudithook(self._hook)

    def _hook(self, event: str, values: tuple[Any, ...]) -> None:
        if event not in _CHANGES or self._at_work:
            return
        paths = [Path(os.fsdecode(v)) for v in values[: _CHANGES[event]] if not isinstance(v, int)]
        if any(path.is_relative_to(folder) for path in paths for folder in self._folders):
            self._take()
            if paths[-1].is_file():  # its number may be given to another file
                self._synced.pop(paths[-1].stat().st_ino, None)
            if paths[0] in self._durable:  # a folder that is renamed with all that is sure in it
                self._durable[paths[-1]] = self._moments

    def _take(self) -> None:
        self._at_work = True
        files, synced = {}, {}
        for path in (path for folder in self._folders for path in folder.rglob("*")):
            if path.is_file() and not any(part in path.name for part in _NOT_RECORDED):
                files[path] = path.read_bytes()
                synced[path] = min(self._synced.get(path.stat().st_ino, 0), len(files[path]))
        with open(self._log, "ab") as log:
            pickle.dump(Moment(files, synced, dict(self._durable)), log)
        self._moments += 1
        self._at_work = False


def recorded(job: Job, log: Path) -> list[Moment]:
    """Run a job to its end and return the moments of its folders."""
    clear(job)
    code, told = Child(job.argv, Recorder((job.out, *job.clear), log).install).wait()
    assert code == 0, told
    moments = []
    with open(log, "rb") as file:
        while file.peek(1):
            moments.append(pickle.load(file))
    return moments


def lost(moments: list[Moment], random: np.random.Generator) -> dict[Path, bytes]:
    """Return the files that are left where the power is lost at some moment."""
    last = int(random.integers(len(moments)))
    files = {}
    for path in sorted({path for moment in moments[: last + 1] for path in moment.files}):
        first = moments[last].durable.get(path.parent, 0)
        chosen = int(random.integers(first, last + 1)) if random.random() < 0.5 else last
        moment = moments[chosen]
        if path in moment.files:
            sure, whole = moment.synced[path], len(moment.files[path])
            kept = whole if random.random() < 0.5 else int(random.integers(sure, whole + 1))
            files[path] = moment.files[path][:kept]
    return files


def losses(job: Job, random: np.random.Generator, count: int) -> Iterator[Found]:
    """Lose power ``count`` times in a job, and let the same command go on."""
    with tempfile.TemporaryDirectory(dir=MEMORY_DISK) as place:
        moments = recorded(job, Path(place, "log"))
    expected = content(job.out)
    for _ in range(count):
        clear(job)
        left = lost(moments, random)
        for path, data in left.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        code, told = Child(job.argv).wait()
        fault = fault_of(code, told) or another_result(job, expected)
        if fault:
            yield fault, "\n".join(f"{path} {len(data)}" for path, data in left.items()).encode()


def attack(
    count: int, seed: int, only: str | None = None
) -> Iterator[tuple[str, int, list[Found]]]:
    """Yield each job with its tries and what was found."""
    for job, tries, random in attacked_jobs(count, seed, only, first=200):
        yield f"loss of power: {job.name}", tries, list(losses(job, random, tries))
