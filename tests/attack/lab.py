"""A small data set, a run trained on it, and commands called in this process and judged."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import re
import resource
import signal
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from rlr_fast.cli import main
from rlr_fast.models import backbone

MODEL = [
    *("--backbone", "tf_efficientnet_lite0", "--backbone-weights", "random"),
    *("--out-indices", "2", "3", "--image-size", "32", "--blocks", "1", "--hidden", "16"),
    *("--heads", "2", "--windows", "3"),
]
RECIPE = ["--device", "cpu", "--quiet", "--workers", "1", "--batch-size", "4"]
SCORING = ["--device", "cpu", "--quiet", "--workers", "1"]

# Where waiting for the disk takes no time, so that more of the work is met.
MEMORY_DISK = "/dev/shm" if Path("/dev/shm").is_dir() else None

# Of the process, above its peak before a try; a picture of 179 megapixels takes 0.7 GB.
MEMORY = 2**31
# Of the processor; what takes longer hangs.
SECONDS = 60


class Hang(BaseException):
    """A try took too much of the processor's time."""


@dataclass(frozen=True)
class Verdict:
    """What a command did.

    Attributes:
        code: Exit code; None where it raised.
        out: What it printed.
        err: What it printed on standard error, warnings included.
        fault: What is wrong with that, in a line; None where nothing is.
    """

    code: int | None
    out: str
    err: str
    fault: str | None = None


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """End a block that hangs by `Hang`, and one that asks for memory without end by MemoryError."""

    def hang(_number: int, _frame: FrameType | None) -> None:
        raise Hang

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = signal.signal(signal.SIGPROF, hang)
    resource.setrlimit(resource.RLIMIT_AS, (used + 3 * MEMORY, hard))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGPROF, before)


def peak_memory() -> int:
    """Return the most memory that this process has held, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def judged(job: Any, *, named: str = "") -> Verdict:
    """Run a job that prints and returns an exit code; judge how it ended.

    Args:
        job: A function without arguments.
        named: What an error must name.
    """
    out, err, before = io.StringIO(), io.StringIO(), peak_memory()
    handler = logging.StreamHandler(err)
    root = logging.getLogger()
    root.addHandler(handler)
    code, fault = None, None
    crashed: list[str] = []
    hook, threading.excepthook = threading.excepthook, lambda args: crashed.append(str(args))
    try:
        with guarded(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = job()
    except Hang:
        fault = "hang"
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)
        ours = [f for f in where if "rlr_fast" in f.filename] or where
        place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"
        fault = f"traceback: {type(error).__name__} at {place}: {str(error)[:120]}"
    finally:
        threading.excepthook = hook
        root.removeHandler(handler)
    told = err.getvalue()
    if fault is None and crashed:
        fault = f"traceback in a thread: {crashed[0][:120]}"
    if fault is None and "Traceback (most recent" in told:
        fault = "traceback printed"
    if fault is None and peak_memory() - before > MEMORY:
        fault = f"memory: {(peak_memory() - before) >> 20} MiB"
    if fault is None and code == 2:
        lines = [line for line in told.splitlines() if line.startswith("rlr-fast: error: ")]
        if len(lines) != 1:
            fault = f"not one line of error: {told[-200:]!r}"
        elif named and named not in told:
            fault = f"names no file: {lines[0][:160]!r}"
    return Verdict(code, out.getvalue(), told, fault)


def call(*argv: object, named: str = "") -> Verdict:
    """Run a command in this process; see `judged`."""
    return judged(lambda: main([str(word) for word in argv]), named=named)


def picture(seed: int, size: tuple[int, int] = (24, 32)) -> Image.Image:
    """Return smooth noise, (height, width)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((size[1], size[0]))


def mask(size: tuple[int, int] = (24, 32)) -> Image.Image:
    """Return a mask with a marked rectangle."""
    pixels = np.zeros(size, dtype=np.uint8)
    pixels[4:12, 8:20] = 255
    return Image.fromarray(pixels)


def make_data(root: Path, classes: Sequence[str] = ("bolt", "cloth"), train: int = 4) -> Path:
    """Write a small set in MVTec-AD's layout: 2 normal and 2 defective test images per class."""
    for k, name in enumerate(classes):
        folders = {"train/good": train, "test/good": 2, "test/hole": 2, "ground_truth/hole": 2}
        for j, (folder, count) in enumerate(folders.items()):
            (root / name / folder).mkdir(parents=True)
            for i in range(count):
                if folder.startswith("ground"):
                    mask().save(root / name / folder / f"{i:03d}_mask.png")
                else:
                    picture(1000 * k + 100 * j + i).save(root / name / folder / f"{i:03d}.png")
    return root


@contextlib.contextmanager
def quick() -> Iterator[None]:
    """Build each network once, and draw no curves: most of a small command's time."""
    create, save = backbone._create, Figure.savefig
    curve = io.BytesIO()
    picture(0).save(curve, "PNG")

    @cache
    def template(*args: Any) -> torch.nn.Module:
        return create(*args)

    backbone._create = lambda *args: copy.deepcopy(template(*args))
    Figure.savefig = lambda _, path: Path(path).write_bytes(curve.getvalue())
    try:
        yield
    finally:
        backbone._create, Figure.savefig = create, save


class Lab:
    """A data set, a run trained on it and calibrated, and its feature cache, below ``root``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.data = make_data(root / "data")
        self.run = root / "run"
        self.cache = root / "cache"
        self.must(*self.train(self.run))
        split = ["--split", "test", "--checkpoint", self.run]
        self.must("calibrate", self.data, *split, *SCORING)

    def train(self, out: Path, *more: object, epochs: int = 2) -> list[object]:
        """Return the words of the command that trains a run in ``out``."""
        words: list[object] = ["train", self.data, "--out", out, "--cache-dir", self.cache]
        return [*words, *MODEL, *RECIPE, "--epochs", epochs, *more]

    def must(self, *argv: object) -> Verdict:
        """Run a command that must succeed."""
        verdict = call(*argv)
        assert verdict.code == 0 and verdict.fault is None, verdict
        return verdict


def without_seconds(text: str) -> str:
    """Return text without the numbers that differ between equal runs."""
    return re.sub(r'"images_per_s": [^,}]+', "", text)


def attacked(
    subjects: Mapping[str, tuple[Callable[[Lab, np.random.Generator, int], Iterator[Any]], float]],
    count: int,
    seed: int,
    only: str | None,
    *,
    first: int = 0,
    least: int = 1,
) -> Iterator[tuple[str, int, list[Any]]]:
    """Yield each subject with its share of the tries, ``least`` of them at least, and its finds."""
    with tempfile.TemporaryDirectory(dir=MEMORY_DISK) as place, quick():
        lab = Lab(Path(place, "lab"))
        for number, (name, (subject, share)) in enumerate(subjects.items()):
            if only is None or only in name:
                tries = max(least, round(share * count))
                random = np.random.default_rng([seed, first + number])
                yield name, tries, list(subject(lab, random, tries))
