"""Kills at random moments: the same command again gives what an uninterrupted one gives."""

from __future__ import annotations

import json
import re
import shutil
import signal
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import safetensors.torch
from PIL import Image

from tests.attack.lab import MEMORY_DISK, MODEL, RECIPE, SCORING, Lab, quick, without_seconds
from tests.attack.processes import Child, fault_of

Found = tuple[str, bytes]


@dataclass
class Job:
    """A command that is killed.

    Attributes:
        name: What is killed.
        argv: The command; the same one goes on.
        out: What it writes.
        share: Of the tries.
        clear: What else is removed before each try.
        streamed: Files that grow as the command works, so that the last line may be unfinished.
        done: What it says, with code 2, where all is done already.
    """

    name: str
    argv: Sequence[object]
    out: Path
    share: float
    clear: Sequence[Path] = ()
    streamed: Sequence[str] = field(default=("results.csv", "results.jsonl"))
    done: str | None = None


def jobs(lab: Lab) -> list[Job]:
    """Return what is killed."""
    train, results = lab.root / "killed", lab.root / "killed-results"
    table, made = lab.root / "killed-table", lab.root / "killed-data"
    words = ["--checkpoint", lab.run, "--out", results, *SCORING]
    resumed = [*words[:2], "--out", lab.root / "killed-prediction", *SCORING]
    recipe = [*MODEL, *RECIPE, "--epochs", 1, "--cache-dir", lab.cache, "--seeds", 1]
    package = lab.root / "killed-package"
    to = ["--to", "torch", "--out", package / "model.pt2"]
    # Trained to the end, or gone on with: the command is the same.
    begin = [*lab.train(train, "--resume", epochs=3), "--score-fit", "scaled", "--uncertainty", 0.5]
    return [
        Job("train", begin, train, 0.28),
        Job("train, with the features", begin, train, 0.1, (lab.cache,)),
        Job("eval", ["eval", lab.data, *words, "--figures", "--report"], results, 0.15),
        Job(
            "predict",
            ["predict", lab.data, *words, "--report", "--masks", "--alpha", 0.4],
            results,
            0.15,
        ),
        Job(
            "export",
            ["export", lab.run, *to, "--alpha", 0.4],
            package,
            0.02,
            done="exists already",
        ),
        Job("paper", ["paper", "perturbation", lab.data, "--out", table, *recipe], table, 0.1),
        Job(
            "data make",
            ["data", "make", made, "--size", 32, "--train", 2, "--classes", "wood", "--quiet"],
            made,
            0.05,
        ),
        Job(
            "predict, resumed",
            ["predict", lab.data, *resumed, "--resume", "--masks", "--alpha", 0.4],
            lab.root / "killed-prediction",
            0.15,
        ),
    ]


def attack(
    count: int, seed: int, only: str | None = None
) -> Iterator[tuple[str, int, list[Found]]]:
    """Yield each job with its tries and what was found."""
    for job, tries, random in attacked_jobs(count, seed, only):
        yield f"kill: {job.name}", tries, list(killed(job, random, tries))
        yield (
            f"SIGINT, SIGTERM: {job.name}",
            tries // 4,
            list(killed(job, random, tries // 4, (signal.SIGINT, signal.SIGTERM))),
        )


def attacked_jobs(
    count: int, seed: int, only: str | None, *, first: int = 0
) -> Iterator[tuple[Job, int, np.random.Generator]]:
    """Yield each job with its share of the tries and its random numbers."""
    with tempfile.TemporaryDirectory(dir=MEMORY_DISK) as place, quick():
        for number, job in enumerate(jobs(Lab(Path(place, "lab")))):
            if only is None or only in job.name:
                tries = max(1, round(job.share * count))
                yield job, tries, np.random.default_rng([seed, first + number])


def killed(
    job: Job,
    random: np.random.Generator,
    count: int,
    signals: Sequence[int] = (signal.SIGKILL,),
) -> Iterator[Found]:
    """Kill a job ``count`` times, each at its own moment, and let the same command go on."""
    clear(job)
    start = time.perf_counter()
    code, told = Child(job.argv).wait()
    seconds = time.perf_counter() - start
    assert code == 0, told
    expected = content(job.out)
    for _ in range(count):
        clear(job)
        for _ in range(int(random.integers(1, 3))):
            number = signals[int(random.integers(len(signals)))]
            code, told = Child(job.argv).after(random.uniform(0, seconds), number).wait()
            asked = {signal.SIGINT: 130, signal.SIGTERM: 143}
            codes = (0, -number, asked.get(signal.Signals(number), 0), *done_code(job, told))
            fault = fault_of(code, told, codes)
            fault = fault or half_written(job)
            if fault:
                yield f"{signal.Signals(number).name}: {fault}", b""
        code, told = Child(job.argv).wait()
        fault = fault_of(code, told, (0, *done_code(job, told)))
        if fault:
            yield f"going on: {fault}", b""
            continue
        fault = another_result(job, expected)
        if fault:
            yield fault, b""


def done_code(job: Job, told: str) -> tuple[int, ...]:
    """Return the exit code of a command that says that all is done."""
    return (2,) if job.done is not None and job.done in told else ()


def clear(job: Job) -> None:
    """Remove what a job writes, and what it is to make again."""
    for folder in (job.out, *job.clear):
        shutil.rmtree(folder, ignore_errors=True)


def another_result(job: Job, expected: Mapping[str, bytes]) -> str | None:
    """Return which files of a job are not the expected ones."""
    found = content(job.out)
    names = sorted(k for k in found.keys() | expected if found.get(k) != expected.get(k))
    return f"another result: {', '.join(names[:6])}" if names else None


def content(folder: Path) -> dict[str, bytes]:
    """Return the files below a folder, but for logs, locks, and what differs between equal runs."""
    files = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir() or "tfevents" in name or path.name == ".lock":
            continue
        data = path.read_bytes()
        if path.suffix in (".jsonl", ".json", ".md"):
            data = without_seconds(data.decode(errors="surrogateescape")).encode(
                errors="surrogateescape"
            )
        if path.suffix == ".html":
            data = re.sub(rb'"date":"[^"]*"', b"", data)
            # Rows come in the order in which threads finish.
            data = b"\n".join(sorted(line.rstrip(b",") for line in data.splitlines()))
        if path.name == "loss.png":  # of times
            data = b""
        files[name] = data
    return files


def half_written(job: Job) -> str | None:
    """Return which file under its final name cannot be read to its end."""
    for path in job.out.rglob("*"):
        if path.is_dir() or path.name.startswith("."):
            continue
        try:
            if path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".jsonl" and path.name not in job.streamed:
                list(map(json.loads, path.read_text().splitlines()))
            elif path.suffix == ".safetensors":
                safetensors.torch.load_file(path)
            elif path.suffix == ".pt2":
                with zipfile.ZipFile(path) as archive:
                    archive.testzip()
            elif path.suffix in (".png", ".jpg") and job.name != "data make":
                with Image.open(path) as image:
                    image.load()
            elif path.suffix == ".html" and not path.read_text().rstrip().endswith("</html>"):
                return f"half-written: {path.name}"
        except Exception as error:
            return f"half-written: {path.name}: {type(error).__name__}"
    return None
