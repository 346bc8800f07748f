"""Damaged input files: each must end in a result, or in one clear line."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch

from rlr_fast.models.authors import load_reconstructors
from tests.attack.damage import Random, damaged, damaged_json, damaged_text, flipped
from tests.attack.hostile import hostile_pickles
from tests.attack.lab import SCORING, Lab, Verdict, attacked, call, judged, mask
from tests.attack.pictures import encoded, hard_picture

Found = tuple[str, bytes]
"""A fault in a line, and the file that shows it."""

_PICTURES = 32  # of one command


def images(lab: Lab, random: Random, count: int) -> Iterator[Found]:
    """Predict folders of hard and damaged pictures."""
    for first in range(0, count, _PICTURES):
        files = [hard_picture(random) for _ in range(min(_PICTURES, count - first))]
        more = [] if random.random() < 0.3 else ["--no-pictures"]
        more += ["--report"] if random.random() < 0.2 else []
        more += ["--tile", "16"] if random.random() < 0.1 else []
        if _predict(lab, files, more):
            for file in files:
                fault = _predict(lab, [file], more)
                if fault:
                    yield f"{file[0]}: {fault}", file[2]


def _predict(lab: Lab, files: list[tuple[str, str, bytes]], more: list[str]) -> str | None:
    with tempfile.TemporaryDirectory(dir=lab.root) as place:
        folder, out = Path(place, "images"), Path(place, "out")
        folder.mkdir()
        for i, (_, suffix, data) in enumerate(files):
            (folder / f"{i:04d}.{suffix}").write_bytes(data)
        verdict = call(*("predict", folder, "--checkpoint", lab.run, "--out", out, *SCORING, *more))
        if verdict.fault or verdict.code not in (0, 1):
            return verdict.fault or f"code {verdict.code}: {verdict.err[-300:]}"
        rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
        told = verdict.err.count("left out: cannot ")
        scores = [row["score"] for row in rows if row["failure"] is None]
        if len(rows) != len(files) or len(scores) + told != len(files):
            return f"{len(files)} files, {len(rows)} rows, {len(scores)} scores, {told} left out"
        if not all(isinstance(score, float) and np.isfinite(score) for score in scores):
            return "a score is not finite"
        return None


def masks(lab: Lab, random: Random, count: int) -> Iterator[Found]:
    """Evaluate and check a set of which a mask is damaged."""
    root = lab.root / "masks"
    shutil.copytree(lab.data, root)
    target = root / "bolt/ground_truth/hole/000_mask.png"
    for _ in range(count):
        if random.random() < 0.5:
            name, _, data = hard_picture(random)
        else:
            name, data = "mask", damaged(random, encoded(mask(), "PNG"))
        target.write_bytes(data)
        if random.random() < 0.8:
            verdict = call("data", "check", root, "--image-size", "32", named="000_mask")
        else:
            words = ("eval", root, "--checkpoint", lab.run, "--out", lab.root / "out")
            verdict = call(*words, *SCORING, named="000_mask")
        if verdict.fault:
            yield f"{name}: {verdict.fault}", data
    shutil.rmtree(root)


def tables(lab: Lab, random: Random, count: int) -> Iterator[Found]:
    """Check a set in VisA's layout whose table is damaged."""
    root = lab.root / "visa"
    (lab.root / "out").mkdir(exist_ok=True)
    shutil.copytree(lab.data, root)
    rows = ["object,split,label,image,mask"]
    for name in ("bolt", "cloth"):
        rows += [f"{name},train,normal,{name}/train/good/{i:03d}.png," for i in range(4)]
        rows += [f"{name},test,normal,{name}/test/good/{i:03d}.png," for i in range(2)]
        masks = [f"{name}/ground_truth/hole/{i:03d}_mask.png" for i in range(2)]
        rows += [f"{name},test,anomaly,{name}/test/hole/{i:03d}.png,{masks[i]}" for i in range(2)]
    good = ("\n".join(rows) + "\n").encode()
    path = root / "split_csv/1cls.csv"
    path.parent.mkdir()
    for _ in range(count):
        data = _damaged_table(random, good)
        path.write_bytes(data)
        if random.random() < 0.9:
            verdict = call("data", "check", root, "--layout", "visa", named="visa")
        else:
            words = ("eval", root, "--layout", "visa", "--checkpoint", lab.run, "--figures")
            before = _outside(lab)
            verdict = call(*words, "--out", lab.root / "out", *SCORING)
            if _outside(lab) != before:
                yield f"files outside: {_outside(lab) - before}", data
        if verdict.fault:
            yield verdict.fault, data
    shutil.rmtree(root)


def _damaged_table(random: Random, good: bytes) -> bytes:
    if random.random() < 0.4:
        return damaged_text(random, good)
    lines = good.decode().splitlines()
    row = int(random.integers(1, len(lines)))
    cells = lines[row].split(",")
    hostile = (
        *("", " ", "..", "../../outside", "/outside", "a/b", "a\0b", "=1+1", '"', '"\n"', "é"),
        *("x" * 300, "x" * 200_000, "con", ".", "bolt/", "train", "<b>", "\x1b[2J", "a\\b"),
    )
    cells[int(random.integers(len(cells)))] = hostile[int(random.integers(len(hostile)))]
    lines[row] = ",".join(cells)
    return "\n".join(lines).encode()


def _outside(lab: Lab) -> set[str]:
    """Return the names beside the folder of results, where nothing may appear."""
    return {p.name for p in lab.root.iterdir()} | {p.name for p in lab.root.parent.iterdir()}


def configs(lab: Lab, random: Random, count: int) -> Iterator[Found]:
    """Give a command a damaged YAML file of flags."""
    good = b"layout: mvtec\nclasses: [bolt]\nimage_size: [32, 32]\nworkers: 1\n"
    # Ten to the ninth words, if every alias is written out.
    nested = ", ".join(
        f"&{new} [{', '.join([f'*{old}'] * 10)}]"
        for old, new in zip("abcdefgh", "bcdefghi", strict=True)
    )
    bomb = f"workers: [&a [{', '.join('x' * 10)}], {nested}]"
    hard = (
        "workers: *x",
        "workers: !!python/object/apply:os.system ['true']",
        "workers: 2001-99-99",
        "workers: {a: 1}",
        "? [1, 2]\n: 3",
        "&a workers: *a",
        "workers: &a [*a]",
        bomb,
        bomb.replace("workers", "classes"),
        "workers: " + "[" * 5000,
        "workers: " + "[" * 900 + "]" * 900,
        "- 1",
        "1",
        "\0",
        "\t",
        "---\n---\n",
        "workers: 1\nworkers: 2",
        "image-size: 32\nimage_size: 64",
        "config: x",
        "workers: !!binary aaaa",
        "workers: 1_000",
        "workers: " + "9" * 5000,
        "image_size: " + "9" * 4000,
        "<<: {workers: 1}",
        "classes: !!set {bolt}",
        "workers: .nan",
        "workers: .inf",
        "workers: ~",
        "workers: ''",
    )
    path = lab.root / "flags.yaml"
    for _ in range(count):
        if random.random() < 0.4:
            data = hard[int(random.integers(len(hard)))].encode()
        else:
            data = damaged_text(random, good)
        path.write_bytes(data)
        verdict = call("data", "check", lab.data, "--config", path)
        if verdict.fault:
            yield verdict.fault, data


def model_configs(lab: Lab, random: Random, count: int) -> Iterator[Found]:
    """Describe and predict with a run whose ``config.json`` is damaged."""

    def job(run: Path) -> Verdict:
        if random.random() < 0.6:
            return call("info", "--checkpoint", run, named="")
        return _predict_with(lab, run)

    yield from _damaged_run(lab, random, count, "config.json", damaged_json, job)


def weights(lab: Lab, random: Random, count: int) -> Iterator[Found]:
    """Predict with damaged weights: the scores are those of the sound ones, or there are none."""
    sound = _predict_with(lab, lab.run)
    expected = _results(lab)
    assert sound.code == 0

    def job(run: Path) -> Verdict:
        verdict = _predict_with(lab, run, named="damaged")
        if verdict.fault is None and verdict.code == 0 and _results(lab) != expected:
            return Verdict(0, "", "", "silently other scores")
        return verdict

    yield from _damaged_run(lab, random, count, "model.safetensors", _damaged_tensors, job)


def calibrations(lab: Lab, random: Random, count: int) -> Iterator[Found]:
    """Decide by a damaged ``calibration.json``."""

    def job(run: Path) -> Verdict:
        return _predict_with(lab, run, *(["--alpha", "0.4"] if random.random() < 0.5 else []))

    yield from _damaged_run(lab, random, count, "calibration.json", damaged_json, job)


def histories(lab: Lab, random: Random, count: int) -> Iterator[Found]:
    """Resume a run whose history or record is damaged."""
    for name in ("history.jsonl", "run.json"):

        def job(run: Path, name: str = name) -> Verdict:
            verdict = call(*lab.train(run, "--resume"), named=name)
            if verdict.fault and "names no file" in verdict.fault and name == "run.json":
                return Verdict(verdict.code, "", "")  # a changed setting is told by its name
            return verdict

        yield from _damaged_run(lab, random, count // 2, name, damaged_json_lines, job)


def damaged_json_lines(random: Random, data: bytes) -> bytes:
    """Return JSON, of one value or one a line, with one of the values damaged."""
    try:
        json.loads(data)
    except ValueError:
        lines = data.splitlines()
        place = int(random.integers(len(lines)))
        lines[place] = damaged_json(random, lines[place])
        return b"\n".join(lines)
    return damaged_json(random, data)


def states(lab: Lab, random: Random, count: int) -> Iterator[Found]:
    """Resume from a damaged training state: to the result of the sound one, or not at all."""
    whole = lab.root / "states"
    lab.must(*lab.train(whole, epochs=3))
    first = lab.root / "states-1"
    shutil.copytree(lab.run, first)
    settings = json.loads((first / "run.json").read_text())
    settings["recipe"]["epochs"] = 3
    (first / "run.json").write_text(json.dumps(settings))
    expected = (whole / "model.safetensors").read_bytes()

    def job(run: Path) -> Verdict:
        verdict = call(*lab.train(run, "--resume", epochs=3), named="training_state")
        is_done = verdict.fault is None and verdict.code == 0
        if is_done and (run / "model.safetensors").read_bytes() != expected:
            return Verdict(0, "", "", "silently another model")
        return verdict

    yield from _damaged_run(
        lab, random, count, "training_state.safetensors", _damaged_tensors, job, first
    )
    shutil.rmtree(whole)
    shutil.rmtree(first)


def _damaged_tensors(random: Random, data: bytes) -> bytes:
    """Return a safetensors file, damaged in its header, its numbers, its names or its metadata."""
    way = random.random()
    if way < 0.3:
        return damaged(random, data)
    length = int.from_bytes(data[:8], "little")
    if way < 0.5:
        return data[: 8 + length] + flipped(random, data[8 + length :], 1)
    if way < 0.7:
        header = damaged_json(random, data[8 : 8 + length])
        return len(header).to_bytes(8, "little") + header + data[8 + length :]
    tensors = safetensors.torch.load(data)
    metadata = {k: str(v) for k, v in json.loads(data[8 : 8 + length])["__metadata__"].items()}
    name = list(tensors)[int(random.integers(len(tensors)))]
    if way < 0.85:
        value = tensors.pop(name)
        others = (
            value.double(),
            value.flatten(),
            value[..., None].contiguous(),
            value * float("nan"),
            value.flatten()[:0],
            torch.zeros(3),
            None,
        )
        new = others[int(random.integers(len(others)))]
        tensors |= {} if new is None else {name: new}
        tensors |= {"x": torch.zeros(2)} if random.random() < 0.2 else {}
    else:
        for key, value in metadata.items():
            metadata[key] = damaged_json_lines(random, value.encode()).decode(errors="replace")
    return safetensors.torch.save(tensors, metadata)


def caches(lab: Lab, random: Random, count: int) -> Iterator[Found]:
    """Train from a damaged feature cache: to the same weights, or not at all."""
    (folder,) = (p for p in lab.cache.iterdir() if p.is_dir() and not p.name.startswith("."))
    sound = {path: path.read_bytes() for path in sorted(folder.iterdir())}
    expected = (lab.run / "model.safetensors").read_bytes()
    run = lab.root / "caches"
    for _ in range(count):
        path = list(sound)[int(random.integers(len(sound)))]
        damage = damaged_json if path.suffix == ".json" else damaged
        data = damage(random, sound[path])
        path.write_bytes(data)
        verdict = call(*lab.train(run), named=folder.name)
        if verdict.fault:
            yield f"{path.name}: {verdict.fault}", data
        elif verdict.code == 0 and (run / "model.safetensors").read_bytes() != expected:
            yield f"{path.name}: silently another model", data
        shutil.rmtree(run, ignore_errors=True)
        folder.mkdir(exist_ok=True)
        for each, content in sound.items():
            each.write_bytes(content)


def pickles(lab: Lab, random: Random, count: int) -> Iterator[Found]:
    """Import damaged and hostile checkpoints of the authors; none of them may run."""
    path, ran = lab.root / "authors.pth", lab.root / "ran"
    makers = hostile_pickles(ran)
    for _ in range(count):
        data = makers[int(random.integers(len(makers)))]()
        if random.random() < 0.5:
            data = damaged(random, data)
        path.write_bytes(data)

        def job() -> int:
            try:
                load_reconstructors(path, windows=[3], heads=2)
            except ValueError as error:
                print(f"rlr-fast: error: {error}".splitlines()[0], file=__import__("sys").stderr)
                return 2
            return 0

        verdict = judged(job, named="authors.pth")
        if verdict.fault:
            yield verdict.fault, data
        if ran.exists():
            ran.unlink()
            yield "a pickle ran", data


def _predict_with(lab: Lab, run: Path, *more: str, named: str = "") -> Verdict:
    words = ("predict", lab.data / "bolt/test", "--checkpoint", run, "--out", lab.root / "out")
    verdict = call(*words, *SCORING, "--no-pictures", *more, named=named)
    if verdict.fault is None and verdict.code == 0:
        rows = (json.loads(line) for line in _results(lab).splitlines())
        if not all(isinstance(row["score"], float) and np.isfinite(row["score"]) for row in rows):
            return Verdict(0, "", "", "a score is not finite")
    return verdict


def _results(lab: Lab) -> str:
    lines = (lab.root / "out/results.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return "\n".join(json.dumps({"path": row["path"], "score": row["score"]}) for row in rows)


def _damaged_run(
    lab: Lab,
    random: Random,
    count: int,
    name: str,
    damage: Callable[[Random, bytes], bytes],
    job: Callable[[Path], Verdict],
    source: Path | None = None,
) -> Iterator[Found]:
    """Do a job with copies of a run, a file of which is damaged."""
    good = ((source or lab.run) / name).read_bytes()
    run = lab.root / "damaged"
    for _ in range(count):
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(source or lab.run, run)
        data = damage(random, good)
        (run / name).write_bytes(data)
        verdict = job(run)
        if verdict.fault:
            yield verdict.fault, data


SUBJECTS: dict[str, tuple[Any, float]] = {
    "images": (images, 0.58),
    "masks": (masks, 0.12),
    "split tables": (tables, 0.08),
    "YAML files": (configs, 0.08),
    "config.json": (model_configs, 0.03),
    "model.safetensors": (weights, 0.02),
    "training_state": (states, 0.02),
    "run.json, history.jsonl": (histories, 0.01),
    "calibration.json": (calibrations, 0.02),
    "feature caches": (caches, 0.02),
    "authors' pickles": (pickles, 0.02),
}
"""Attack → its function, and its share of the tries."""


def attack(
    count: int, seed: int, only: str | None = None
) -> Iterator[tuple[str, int, list[Found]]]:
    """Yield each attack with its tries and what it found."""
    yield from attacked(SUBJECTS, count, seed, only, least=2)
