"""Compile survey: what users would launch, compiled for every supported GPU without having one.

    nice python -m benchmarks.survey [--sample N] [--arch 80 ...] [--dtype bf16 ...] [--jobs 2]

The problems are the levels of all presets at 128 to 1024 pixels and a seeded sample of others; the
launches are the launchers' own, with the tiles that they choose for a GPU of the architecture.
Launches that compile to the same kernel are compiled once. Each must compile, fit the shared and
tensor memory of the GPU, and keep its stack under `MOST_STACK`.

Results are kept one by one in ``--rows`` by what was compiled, sources included: a survey that was
stopped goes on, and a changed kernel is compiled again. The summary goes to ``--record``.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import multiprocessing
import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, cast

import timm
import torch
import triton
from triton.errors import TritonError

from benchmarks import sass
from benchmarks.arguments import positive
from benchmarks.compiling import DTYPES, compile_launch, specialization, tiles_of, version
from benchmarks.launches import Shape, launches
from rlr_fast.config import PRESETS, level_groups, per_level
from rlr_fast.functional import window_pair
from rlr_fast.kernels import _launch, distance
from rlr_fast.kernels._launch import HEAD_DIMS, Launch

ARCHES = (80, 86, 89, 90, 100, 120)
PIXELS = (128, 256, 384, 512, 1024)
# Images: the tiles know few and many.
BATCHES = (4, 64)
# Other problems than the presets', drawn with a fixed seed.
OTHERS = 40
# Bytes of local memory a thread.
MOST_STACK = 1536
MOST_TENSOR_MEMORY = 512
RECORD = Path(__file__).parent / "results" / "survey.json"


@dataclass(frozen=True)
class Task:
    """One kernel to compile, which one or more problems launch."""

    kernel: str
    shape: Shape
    channels: int
    dtype: str
    arch: int

    def about(self) -> dict[str, Any]:
        """As plain values."""
        problem = self.shape.name
        if self.kernel.startswith("distance"):
            problem = f"{self.shape.geometry.tokens} tokens, {self.channels} channels"
        return {"kernel": self.kernel, "problem": problem, "dtype": self.dtype, "arch": self.arch}


def preset_levels() -> list[tuple[Shape, int]]:
    """The levels of every preset at `PIXELS` and its own, each with the channels of its tokens."""
    found = []
    for preset in PRESETS.values():
        config = preset.model
        groups = level_groups(config.out_indices)
        with torch.device("meta"):
            network = timm.create_model(
                config.backbone,
                features_only=True,
                out_indices=[group[-1] for group in groups],
                pretrained=False,
            )
        info: Any = network.feature_info
        kept = zip(per_level(config.components, len(groups)), info.channels(), strict=True)
        levels = zip(
            info.reduction(), (count or channels for count, channels in kept), config.hidden,
            config.heads, config.windows, per_level(config.patches, len(groups)), strict=True,
        )  # fmt: skip
        sizes = sorted({*PIXELS, *config.image_size})
        for pixels, (stride, channels, hidden, heads, window, patch) in product(sizes, [*levels]):
            side = -(-pixels // (stride * patch))
            shape = Shape((side, side), hidden // heads, window_pair(window))
            found.append((shape, channels))
    return found


def other_shapes(count: int = OTHERS, seed: int = 0) -> list[Shape]:
    """Problems of other users: grids of 1×1 to 64×64, odd windows, every head width."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        # Small grids and windows are the common ones.
        height, width = (round(2 ** draw.uniform(0, 6)) for _ in range(2))
        rows, columns = (2 * round(2 ** draw.uniform(0, 4)) - 1 for _ in range(2))
        found.append(Shape((height, width), draw.choice(HEAD_DIMS), (rows, columns)))
    return found


def distance_launches(shape: Shape, channels: int, dtype: torch.dtype) -> dict[str, Launch]:
    """The launches of a level's token distance, between features and what autocast leaves."""
    size = (shape.batch, shape.geometry.tokens, channels)
    features = torch.empty(size, device="meta")
    rebuilt, d = features.to(dtype), features[..., 0].contiguous()
    with _launch.recorded() as records:
        distance.launch(distance.forward_kernel, rebuilt, features, (rebuilt, features, d))
        tensors = (d, rebuilt, features, rebuilt)
        distance.launch(distance.backward_kernel, rebuilt, features, tensors, d.stride())
    return dict(zip(("distance-forward", "distance-backward"), records, strict=True))


def launches_of(shape: Shape, channels: int, dtype: str, arch: int) -> dict[str, Launch]:
    """What a level launches on a GPU; no distance of tokens with 0 channels."""
    made = launches(shape, DTYPES[dtype], str(arch))
    return made | (distance_launches(shape, channels, DTYPES[dtype]) if channels else {})


def key_of(launch: Launch, arch: int) -> str:
    """What is compiled, in a word: equal for launches that share a compiled kernel."""
    signature, constants, divisible = specialization(launch)
    parts = (
        arch, launch.kernel.cache_key, sorted(signature.items()), divisible,
        sorted((repr(name), str(value)) for name, value in constants.items()),
        sorted(launch.options.items()),
    )  # fmt: skip
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:20]


def tasks(arches: Iterable[int], dtypes: Iterable[str]) -> dict[str, Task]:
    """Return what to compile by its key, in a random order that is always the same.

    The first few are as different as can be in architecture, dtype and kernel.
    """
    problems = dict.fromkeys([*preset_levels(), *((shape, 0) for shape in other_shapes())])
    found: dict[str, Task] = {}
    for arch, dtype, (shape, channels), batch in product(arches, dtypes, problems, BATCHES):
        sized = dataclasses.replace(shape, batch=batch)
        for name, launch in launches_of(sized, channels, dtype, arch).items():
            found.setdefault(key_of(launch, arch), Task(name, sized, channels, dtype, arch))
    keys = list(found)
    random.Random(0).shuffle(keys)
    seen: Counter[tuple[int, str, str]] = Counter()
    turns = {}
    for key in keys:
        kind = (found[key].arch, found[key].dtype, found[key].kernel)
        turns[key] = seen[kind]
        seen[kind] += 1
    return {key: found[key] for key in sorted(keys, key=turns.__getitem__)}


def compile_task(task: Task) -> dict[str, Any]:
    """Compile a kernel and return what it takes of a GPU, or the error."""
    launch = launches_of(task.shape, task.channels, task.dtype, task.arch)[task.kernel]
    about = task.about() | {"tiles": tiles_of(launch), **launch.options}
    try:
        compiled = compile_launch(launch, str(task.arch))
    except (RuntimeError, TritonError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return about | {"error": lines[0]}
    used = sass.resources(compiled, ())
    return about | {
        "shared": used.shared,
        "tensor_memory": getattr(compiled.metadata, "tmem_size", None) or 0,
        "registers": used.registers,
        "stack": used.stack,
    }


def refusal(row: Mapping[str, Any]) -> str:
    """Say why a GPU would refuse a compiled kernel, or a person would; empty if neither does."""
    if "error" in row:
        return str(row["error"])
    most = _launch.SHARED[row["arch"]]
    if row["shared"] > most:
        return f"{row['shared']} bytes of shared memory, of {most}"
    if row["tensor_memory"] > MOST_TENSOR_MEMORY:
        return f"{row['tensor_memory']} columns of tensor memory, of {MOST_TENSOR_MEMORY}"
    if row["stack"] > MOST_STACK:
        return f"{row['stack']} bytes of stack, of {MOST_STACK}"
    return ""


def compile_all(todo: Mapping[str, Task], jobs: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (key, row) as kernels are compiled, each in a process that may die of it."""
    context = multiprocessing.get_context("fork")
    waiting = list(todo.items())
    running: dict[Any, tuple[str, Task, Any]] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            key, task = waiting.pop(0)
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(task, sender))
            process.start()
            sender.close()
            running[receiver] = key, task, process
        for done in cast("list[Connection]", wait(list(running))):
            key, task, process = running.pop(done)
            try:
                row: dict[str, Any] = done.recv()
            except EOFError:
                row = {**task.about(), "error": "the compiler ended its process"}
            process.join()
            done.close()
            yield key, row


def _child(task: Task, sender: Any) -> None:
    # Compilers print what they die of.
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        sender.send(compile_task(task))
    sender.close()


def read_rows(path: Path) -> dict[str, dict[str, Any]]:
    """Return what an earlier survey kept, by key; the last line may be cut off."""
    rows = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        rows[row.pop("key")] = row
    return rows


def _is_cut_off(path: Path) -> bool:
    text = path.read_bytes()
    return bool(text) and not text.endswith(b"\n")


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the figures of the table, an architecture and dtype at a time."""
    found = []
    for arch, dtype in sorted({(row["arch"], row["dtype"]) for row in rows}):
        group = [r for r in rows if (r["arch"], r["dtype"]) == (arch, dtype)]
        sound = [r for r in group if "error" not in r]
        reasons = [f"{r['kernel']} {r['problem']}: {refusal(r)}" for r in group if refusal(r)]
        found.append(
            {
                "arch": arch,
                "dtype": dtype,
                "kernels": len(group),
                "shared": max((r["shared"] for r in sound), default=0),
                "shared_most": _launch.SHARED[arch],
                "tensor_memory": max((r["tensor_memory"] for r in sound), default=0),
                "stack": max((r["stack"] for r in sound), default=0),
                "with_stack": sum(r["stack"] > 0 for r in sound),
                "refused": sorted(reasons),
            }
        )
    return found


def table(groups: Sequence[Mapping[str, Any]]) -> str:
    """The summary as text."""
    lines = [
        "arch   dtype kernels   largest shared B  tensor memory  worst stack B              refused"
    ]
    for g in groups:
        cells = (
            f"sm_{g['arch']:<4}{g['dtype']:<6}{g['kernels']:>7}",
            f"{g['shared']} of {g['shared_most']}".rjust(17),
            f"{g['tensor_memory']:>13}",
            f"{g['stack']:>13} ({g['with_stack']} have one)",
            f"{len(g['refused']):>7}",
        )
        lines.append("  ".join(cells))
        lines += [f"    {reason}" for reason in g["refused"]]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print and record; 1 if a kernel is refused."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.survey", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--arch", nargs="+", type=int, choices=ARCHES, default=ARCHES)
    parser.add_argument("--dtype", nargs="+", choices=tuple(DTYPES), default=tuple(DTYPES))
    parser.add_argument(
        "--sample", type=positive, help="compile so many, drawn from all; default: all"
    )
    parser.add_argument("--jobs", type=positive, default=1, help="processes that compile")
    parser.add_argument(
        "--rows", type=Path, default=Path(f"build/survey-{triton.__version__}.jsonl")
    )
    parser.add_argument(
        "--record",
        type=Path,
        help="write the table into this file; default: benchmarks/results/survey.json, "
        "where all is compiled",
    )
    options = parser.parse_args(arguments)
    whole = options.sample is None and {*options.arch} == {*ARCHES}
    whole = whole and {*options.dtype} == {*DTYPES}
    record = options.record or (RECORD if whole else None)
    if _launch.INTERPRETING:
        raise SystemExit("nothing compiles under Triton's interpreter: unset TRITON_INTERPRET")
    torch.set_num_threads(1)
    everything = tasks(options.arch, options.dtype)
    chosen = dict(list(everything.items())[: options.sample])
    known = read_rows(options.rows)
    rows = {key: known[key] for key in chosen if key in known}
    todo = {key: task for key, task in chosen.items() if key not in rows}
    print(f"{len(everything)} kernels, {len(chosen)} chosen, {len(rows)} known", flush=True)
    options.rows.parent.mkdir(parents=True, exist_ok=True)
    with options.rows.open("a") as file:
        file.write("\n" if _is_cut_off(options.rows) else "")
        for key, row in compile_all(todo, options.jobs):
            rows[key] = row
            file.write(json.dumps({"key": key, **row}) + "\n")
            file.flush()
            if refusal(row):
                name = f"sm_{row['arch']} {row['dtype']} {row['kernel']} {row['problem']}"
                print(f"{name}: {refusal(row)}", flush=True)
    groups = summary(list(rows.values()))
    if record is not None:
        content = json.loads(record.read_text()) if record.exists() else {}
        content[version()] = {
            "triton": triton.__version__, "kernels": len(rows), "of": len(everything),
            "groups": groups,
        }  # fmt: skip
        record.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    print(table(groups))
    return int(any(group["refused"] for group in groups))


if __name__ == "__main__":
    sys.exit(main())
