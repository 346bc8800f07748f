"""Records: every figure with the device, clocks, versions, commit and command that made it."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rlr_fast.files import check_writable, write_atomically
from rlr_fast.models.environment import environment, package_version

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"
FORMAT = 1
_CLOCKS = "clocks.sm,clocks.mem,clocks.max.sm,power.draw,temperature.gpu"


def bench_device() -> torch.device:
    """Return the device that benchmarks run on: the GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def describe(command: str | None = None) -> dict[str, Any]:
    """Return where and from what a record was made, as plain values.

    Args:
        command: What was run; default: this process's command line.
    """
    device = bench_device()
    facts = environment(device)
    facts["device_name"] = facts["device_name"] if device.type == "cuda" else _processor()
    facts["packages"]["pytest-benchmark"] = package_version("pytest-benchmark")
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["multiprocessors"] = properties.multi_processor_count
        facts["memory_bytes"] = properties.total_memory
        facts["cuda"] = torch.version.cuda
        facts["cudnn"] = torch.backends.cudnn.version()
        facts["driver"] = _query("driver_version")
        facts["gpu"] = _gpu()
    return {
        "format": FORMAT,
        "made": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command or _command(),
        "commit": commit(),
        "environment": facts,
        "clocks": clocks(),
    }


def clocks() -> dict[str, str] | None:
    """Return clocks, power and temperature as nvidia-smi reads them now; None without a GPU."""
    values = _query(_CLOCKS) if torch.cuda.is_available() else None
    if values is None:
        return None
    return dict(zip(_CLOCKS.split(","), (v.strip() for v in values.split(",")), strict=False))


def megahertz(clock: str) -> float | None:
    """Return a clock as nvidia-smi reads it now; ``None`` where it does not tell."""
    found = re.match(r"([\d.]+) MHz", (clocks() or {}).get(clock, ""))
    return float(found[1]) if found else None


def commit() -> str | None:
    """Return the commit of this checkout, with ``+changes`` where files differ from it.

    ``BENCHMARK_COMMIT`` says it for a copy of the files without their history.
    """
    given = os.environ.get("BENCHMARK_COMMIT")
    if given:
        return given
    head = _run("git", "-C", str(ROOT), "rev-parse", "HEAD")
    if head is None:
        return None
    # New figures are no change of what was measured.
    changes = _run(
        "git", "-C", str(ROOT), "status", "--porcelain", "--", ".", ":!benchmarks/results"
    )
    return head.strip() + ("+changes" if changes else "")


class Recorder:
    """Collects results and keeps its file complete after each, so that a stopped run is kept."""

    def __init__(self, path: Path | None, command: str | None = None) -> None:
        self.path = path
        self.content: dict[str, Any] = {**describe(command), "results": []}
        self._write()

    def add(self, result: Mapping[str, Any]) -> None:
        """Add one result of plain values."""
        self.content["results"].append(dict(result))
        self._write()

    def close(self) -> None:
        """Read the clocks again: the device is warm now."""
        self.content["clocks_after"] = clocks()
        self._write()

    def _write(self) -> None:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, json.dumps(self.content, indent=1) + "\n")


def record_path(name: str) -> Path:
    """Return the file of a record: a name lies in `RESULTS`, a path where it says.

    Raises:
        argparse.ArgumentTypeError: The name is neither a file name's letters nor a path to a
            ``.json``; or no file can be written there.
    """
    if name.endswith(".json"):
        path = Path(name)
    elif re.fullmatch(r"[\w.-]+", name):
        path = RESULTS / f"{name}.json"
    else:
        raise argparse.ArgumentTypeError(
            f"must be letters, digits, '_', '-' or '.', or a path to a .json, got {name!r}"
        )
    try:
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder")
        check_writable(path.parent)
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"must be a file that can be written, got {name!r}: {error}"
        ) from error
    return path


def add_record_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--record NAME``, which is read as the path that a `Recorder` takes."""
    parser.add_argument(
        "--record", metavar="NAME", type=record_path, help="as of pytest --benchmark-record"
    )


def read_records(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """Return all records of a folder by file name.

    Raises:
        ValueError: A file is no JSON.
    """
    records = {}
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        if not isinstance(content, dict):
            continue
        if content.get("format") == FORMAT and "results" in content:
            records[path.name] = content
    return records


def _command() -> str:
    # Run as a module, the first argument is a file in the interpreter's or the package's folder.
    program = Path(sys.argv[0])
    name = program.parent.name if program.name == "__main__.py" else program.name
    if program.suffix == ".py" and program.parent.name == "benchmarks":
        name = f"python -m benchmarks.{program.stem}"
    return shlex.join([*name.split(), *sys.argv[1:]])


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else platform.machine()


def _query(fields: str) -> str | None:
    output = _run("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "-i", _gpu())
    return output.strip() if output else None


def _gpu() -> str:
    # nvidia-smi counts all GPUs of a machine, PyTorch those that a process may see.
    properties: Any = torch.cuda.get_device_properties(torch.cuda.current_device())
    return f"GPU-{properties.uuid}"


def _run(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
