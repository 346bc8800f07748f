"""Commands at once, limits of the system, and full disks: each ends well or says why."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from tests.attack.damage import Random
from tests.attack.kills import Job, content, half_written
from tests.attack.lab import SCORING, Lab, attacked, make_data
from tests.attack.processes import Child, fault_of, leftovers

Found = tuple[str, bytes]


def two_in_one_folder(lab: Lab, random: Random, count: int) -> Iterator[Found]:
    """Two trainings and two evaluations in one folder: one does its work, the other is told."""
    run, out = lab.root / "two", lab.root / "two-results"
    words = ["eval", lab.data, "--checkpoint", lab.run, "--out", out, *SCORING]
    sound = (lab.run / "model.safetensors").read_bytes()
    lab.must(*words)
    figures = content(out)
    for i in range(count):
        shutil.rmtree(run, ignore_errors=True)
        argv = lab.train(run) if i % 2 else words
        first = Child(argv)
        time.sleep(random.uniform(0, 0.2))
        for child in (first, Child(argv)):
            code, told = child.wait()
            refused = "another process works in" in told or "already holds a run" in told
            fault = fault_of(code, told, (0, 2) if refused else (0,))
            if fault:
                yield fault, b""
        if i % 2 and (run / "model.safetensors").read_bytes() != sound:
            yield "another model", b""
        if not i % 2 and content(out) != figures:
            yield "other metrics", b""


def one_cache(lab: Lab, random: Random, count: int) -> Iterator[Found]:
    """Two trainings that make one cache, and one whose cache is deleted while it works."""
    sound = (lab.run / "model.safetensors").read_bytes()
    for i in range(count):
        runs = [lab.root / f"cached-{k}" for k in range(2)]
        for folder in (*runs, lab.cache) if i % 2 else runs:
            shutil.rmtree(folder, ignore_errors=True)
        children = [Child(lab.train(run, "--cache", "disk")) for run in runs]
        if not i % 2:
            time.sleep(random.uniform(0, 0.5))
            shutil.rmtree(lab.cache, ignore_errors=True)
        for child, run in zip(children, runs, strict=True):
            code, told = child.wait()
            fault = fault_of(code, told, (0,) if i % 2 else (0, 2))
            if fault:
                yield fault, b""
            elif code == 0 and (run / "model.safetensors").read_bytes() != sound:
                yield "another model", b""
        if leftovers(lab.cache) or [p for p in lab.cache.glob(".*-*")]:
            yield "an unfinished cache is left", b""


def jumping_clocks(lab: Lab, random: Random, count: int) -> Iterator[Found]:
    """Two trainings that make one cache while their clocks jump by up to a day either way."""
    sound = (lab.run / "model.safetensors").read_bytes()
    for _ in range(count):
        shutil.rmtree(lab.cache, ignore_errors=True)
        runs = [lab.root / f"jumped-{k}" for k in range(2)]
        for folder in runs:
            shutil.rmtree(folder, ignore_errors=True)
        seeds = random.integers(2**32, size=2)
        children = [
            Child(lab.train(run, "--cache", "disk"), partial(_jump, int(seed)))
            for run, seed in zip(runs, seeds, strict=True)
        ]
        for child, run in zip(children, runs, strict=True):
            code, told = child.wait()
            # A clock that is an hour ahead takes the other's cache for one that a kill has left.
            fault = fault_of(code, told, (0, 2))
            if fault:
                yield fault, b""
            elif code == 0 and (run / "model.safetensors").read_bytes() != sound:
                yield "another model", b""


def _jump(seed: int) -> None:
    """Let the clock of this process jump."""
    random, true, offset = np.random.default_rng(seed), time.time, 0.0

    def jumping() -> float:
        nonlocal offset
        if random.random() < 0.3:
            offset = random.uniform(-86400, 86400)
        return true() + offset

    time.time = jumping


def few_files(lab: Lab, random: Random, count: int) -> Iterator[Found]:
    """Two hundred open files, and far fewer."""
    for i in range(count):
        most = 200 if i % 2 == 0 else int(random.integers(12, 60))
        out = lab.root / "few"
        words = ["--checkpoint", lab.run, "--out", out, *SCORING, "--report", "--workers", 8]
        for argv in (
            ["predict", lab.data, *words[:-2]],
            ["eval", lab.data, *words[:-2], "--figures"],
            lab.train(out / "run"),
        ):
            limit = partial(resource.setrlimit, resource.RLIMIT_NOFILE, (most, most))
            code, told = Child(argv, limit).wait()
            fault = fault_of(code, told, (0,) if most == 200 else (0, 1, 2))
            if fault:
                yield f"{most} open files: {argv[0]}: {fault}", b""
        shutil.rmtree(out)


def long_files(lab: Lab, random: Random, count: int) -> Iterator[Found]:
    """No file may grow beyond a number of bytes: the write that fails is any of them."""

    def limit(size: int) -> Callable[[], None]:
        def prepare() -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

        return prepare

    run = lab.root / "long"
    largest = max(p.stat().st_size for p in lab.run.iterdir() if p.is_file())
    for _ in range(count):
        shutil.rmtree(run, ignore_errors=True)
        cache = random.random() < 0.3
        if cache:
            shutil.rmtree(lab.cache, ignore_errors=True)
        size = max(2000, int(largest ** random.uniform(0.5, 1.02)))
        yield from _stopped_and_gone_on(lab, run, limit(size), f"{size} bytes a file")


def _stopped_and_gone_on(
    lab: Lab, run: Path, prepare: Callable[[], object], what: str
) -> Iterator[Found]:
    argv = lab.train(run, "--resume")
    job = Job("train", argv, run, 1.0)
    code, told = Child(argv, prepare).wait()
    fault = fault_of(code, told, (0, 2)) or (half_written(job) if run.exists() else None)
    if fault is None and leftovers(run):
        fault = f"left: {leftovers(run)}"
    if fault:
        yield f"{what}: {fault}", b""


def full_disk(lab: Lab, random: Random, count: int) -> Iterator[Found]:
    """A disk that is full after any number of bytes, then has room, then cannot be written."""
    sound = (lab.run / "model.safetensors").read_bytes()
    disk = lab.root / "disk"
    disk.mkdir()
    for i in range(count):
        pages = 1 + int(400 ** random.uniform(0, 1))
        with _mounted(disk, f"size={4096 * pages}"):
            run = disk / "run"
            if i % 2:  # the features as well
                lab.cache, cache = disk / "cache", lab.cache
            yield from _stopped_and_gone_on(lab, run, lambda: None, f"{4 * pages} KiB")
            subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
            code, told = Child(lab.train(run, "--resume")).wait()
            fault = fault_of(code, told, (2,))
            if fault:
                yield f"read-only: {fault}", b""
            subprocess.run(["mount", "-o", "remount,rw,size=100m", disk], check=True)
            code, told = Child(lab.train(run, "--resume")).wait()
            fault = fault_of(code, told)
            if fault:
                yield f"with room again: {fault}", b""
            elif (run / "model.safetensors").read_bytes() != sound:
                yield "another model", b""
            if i % 2:
                lab.cache = cache


def little_memory(lab: Lab, random: Random, count: int) -> Iterator[Found]:
    """256 MiB to 1 GiB beside what this process holds: a command ends well or in a line."""
    data, out, run = lab.root / "many", lab.root / "little", lab.root / "large-run"
    make_data(data, train=64)

    def train(to: Path, side: int, batch: int) -> list[object]:
        words = [data if word == lab.data else word for word in lab.train(to, epochs=1)]
        for name, value in (("--image-size", side), ("--batch-size", batch)):
            words[words.index(name) + 1] = value
        return [*words, "--cache", "none"]

    lab.must(*train(run, 256, 4))
    for i in range(count):
        limit, batch = int(2 ** random.uniform(28, 30)), int(4 ** random.uniform(1, 3))
        argv = train(out, int(random.choice([64, 128, 256])), batch)
        if i % 2:
            scored = ["--checkpoint", run, "--out", out, *SCORING, "--batch-size", batch]
            argv = ["predict", data, *scored]
        with _group_of(limit) as join:
            code, told = Child(argv, join).wait()
        fault = fault_of(code, told, (0, 2))
        if code == 2 and "out of memory: " not in told:
            fault = f"another line: {told[-200:]}"
        if fault:
            yield f"{limit >> 20} MiB: {' '.join(map(str, argv))}: {fault}", b""
        shutil.rmtree(out, ignore_errors=True)


@contextlib.contextmanager
def _group_of(limit: int) -> Iterator[Callable[[], object]]:
    """Make a control group of so many bytes; yield what puts a process into it."""
    old, new = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    folder = (old if old.is_dir() else new) / f"rlr-fast-{os.getpid()}"
    folder.mkdir()
    try:
        name = "memory.limit_in_bytes" if old.is_dir() else "memory.max"
        (folder / name).write_text(str(limit))
        yield lambda: (folder / "cgroup.procs").write_text(str(os.getpid()))
    finally:
        folder.rmdir()


@contextlib.contextmanager
def _mounted(folder: Path, options: str) -> Iterator[None]:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


SUBJECTS = {
    "two commands in one folder": (two_in_one_folder, 0.2),
    "one cache for two, and deleted": (one_cache, 0.2),
    "200 open files, and fewer": (few_files, 0.1),
    "a limit on the size of files": (long_files, 0.25),
    "full and read-only disks": (full_disk, 0.25),
    "a container of little memory": (little_memory, 0.25),
    "clocks that jump": (jumping_clocks, 0.2),
}
_BY_ROOT = (full_disk, little_memory)


def attack(
    count: int, seed: int, only: str | None = None
) -> Iterator[tuple[str, int, list[Found]]]:
    """Yield each attack with its tries and what was found; root alone mounts and limits."""
    subjects = {k: v for k, v in SUBJECTS.items() if v[0] not in _BY_ROOT or os.geteuid() == 0}
    yield from attacked(subjects, count, seed, only, first=100)
