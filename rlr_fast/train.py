"""Training: one model on all classes, checkpointed each epoch and resumable to the bit."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from rlr_fast.calibration import CALIBRATION_FILE, calibrate
from rlr_fast.config import RLRConfig, TrainConfig
from rlr_fast.data import DataSet, ImageFailure, Sample
from rlr_fast.distributed import Processes, processes
from rlr_fast.environment import environment
from rlr_fast.feature_cache import FeatureCache, Placement, cached_features
from rlr_fast.figures import loss_curve
from rlr_fast.files import write_atomically, write_tensors
from rlr_fast.functional import Backend
from rlr_fast.model import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    CheckpointError,
    RLRModel,
    Standardize,
    read_weights,
)
from rlr_fast.progress import progress_bar

RUN_FILE = "run.json"
STATE_FILE = "training_state.safetensors"
HISTORY_FILE = "history.jsonl"
CURVE_FILE = "loss.png"

_log = logging.getLogger(__name__)

# 2**32 over the golden ratio: multiples of it lie far apart in the 32 bits that seed a CPU's
# generator, so that no process repeats another's numbers at another step.
_RANK_STRIDE = 0x9E3779B9
_LOG_EVERY = 20  # steps between two looks at the loss: each look waits for the device


class TrainingError(RuntimeError):
    """Training cannot start or go on; the message says why, and what is kept."""


@dataclass(frozen=True)
class TrainResult:
    """What a training run leaves.

    Attributes:
        out: The run's folder, a checkpoint for `RLRModel.from_pretrained`.
        history: Rows of the log: step, epoch, loss, level_0 …, grad_norm, lr, images_per_s.
        failures: Training images that could not be read and were left out.
        images_per_s: Median over the run.
    """

    out: Path
    history: list[dict[str, float]]
    failures: list[ImageFailure]
    images_per_s: float


def train(
    config: RLRConfig,
    recipe: TrainConfig,
    data: DataSet,
    out: Path,
    *,
    device: torch.device,
    resume: bool = False,
    backend: Backend = "auto",
    cache_root: Path | None = None,
    cache: Placement = "auto",
    workers: int | None = None,
    quiet: bool = False,
) -> TrainResult:
    """Train one model on the normal images of all classes and leave a checkpoint in ``out``.

    Minimises eq. 13-14 with Adam. The features of the frozen backbone are computed once. Images are
    shuffled and perturbed by numbers that depend on seed, epoch, step and process alone, so that a
    resumed run sees what an uninterrupted one sees.

    Started by torchrun, all processes call this together. Process r of W computes and holds the
    features of images r, r + W, r + 2W, … and shuffles them by itself, so each number of processes
    has its own order of images and its own noise. A step is exact whatever their number: the
    gradient is that of the mean loss over the images that all of them took, ``batch_size`` of them.

    Args:
        config: The model.
        recipe: Epochs, batch size, learning rate, precision, seed.
        data: Its ``train`` samples are used.
        out: Folder of the run: ``config.json``, ``model.safetensors``,
            ``training_state.safetensors``, ``run.json``, ``history.jsonl``, a TensorBoard log,
            ``loss.png``, ``calibration.json``. The first process alone reads and writes it.
        device: Where to train.
        resume: Go on from the last finished epoch of the run in ``out``, if there is one. Another
            number of processes may go on; the result is then not that of one uninterrupted run.
        backend: Backend of the attention operators.
        cache_root: Folder of feature caches.
        cache: Where the cached features lie while training.
        workers: Threads that decode images.
        quiet: No progress bar.

    Raises:
        ValueError: A class has no training images, an option does not fit the device, or the
            processes were not given the same run.
        TrainingError: ``out`` holds another run, the disk is full, the loss is not finite, or there
            are more processes than images.
        CacheError: The feature cache cannot be written.
        PeerError: Another process met one of these.
    """
    with processes() as group:
        with group.together():
            _check_request(recipe, data, device, group)
            record = {
                "model": dataclasses.asdict(config),
                "recipe": dataclasses.asdict(recipe),
                "data": _describe(data),
                "processes": group.count,
            }
            if group.leads:
                _check_folder(out, record, resume)
            torch.manual_seed(recipe.seed)
            model = RLRModel(config, backend=backend).to(device)
        group.agree(_decisive(record, model))
        features, samples, failures = _features(
            model, data, cache_root, cache, workers, quiet, group
        )
        if config.standardize:
            _fit_standardization(model, features, group)
        run = _Run(model, recipe, features, out, group)
        with group.together():
            if group.leads and not (out / STATE_FILE).exists():
                run.write_settings(record | {"environment": environment(device)})
        run.go(quiet)
        calibration = calibrate(model, features, [s.category for s in samples], group)
        with group.together():
            if group.leads:
                write_atomically(out / CALIBRATION_FILE, json.dumps(calibration, indent=2))
                loss_curve(run.history, out / CURVE_FILE)
        speed = statistics.median(row["images_per_s"] for row in run.history)
        return TrainResult(out, run.history, failures, speed)


def read_run(out: Path) -> dict[str, Any] | None:
    """Return the settings of the run in ``out``, or None where no epoch was finished.

    Raises:
        TrainingError: The record is missing beside a training state, or damaged.
    """
    if not (out / STATE_FILE).exists():
        return None
    try:
        return dict(json.loads((out / RUN_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise TrainingError(f"{out / RUN_FILE} cannot be read: {error}") from error


def _describe(data: DataSet) -> dict[str, Any]:
    """Say which images a run learns from, by names and sizes, wherever the folder lies."""
    digest, count = hashlib.sha256(), 0
    for samples in data.train.values():
        for sample in samples:
            name = os.path.relpath(sample.path, data.root)
            size = sample.path.stat().st_size if sample.path.exists() else None
            digest.update(f"{name}\0{size}\n".encode())
            count += 1
    return {
        "root": str(data.root),
        "layout": data.layout,
        "classes": list(data.classes),
        "images": count,
        "files_digest": digest.hexdigest(),
    }


def _check_request(
    recipe: TrainConfig, data: DataSet, device: torch.device, processes: Processes
) -> None:
    data.require_train()
    if recipe.precision == "fp16" and device.type != "cuda":
        raise ValueError(f"precision fp16 needs a CUDA device, got device={str(device)!r}")
    if processes.count > 1 and device.type not in ("cpu", "cuda"):
        raise ValueError(f"several processes need device cpu or cuda, got {str(device)!r}")
    images = sum(map(len, data.train.values()))
    if images < processes.count:
        raise TrainingError(
            f"{images} training images cannot be shared among {processes.count} processes; "
            f"start {images} at most"
        )


def _check_folder(out: Path, record: dict[str, Any], resume: bool) -> None:
    """Refuse a folder that holds another run, before any work."""
    if out.exists() and not out.is_dir():
        raise TrainingError(f"{out} is a file; a run needs a folder")
    previous = read_run(out)
    if previous is None:
        return
    if not resume:
        raise TrainingError(
            f"{out} already holds a run; go on with it by --resume, or choose another --out"
        )
    changed = [
        f"{name} was {old!r}, now {new!r}"
        for part in ("model", "recipe", "data")
        for name, old in previous[part].items()
        if (new := json.loads(json.dumps(record[part].get(name)))) != old and name != "root"
    ]
    if changed:
        raise TrainingError(f"{out} cannot be resumed with other settings: {'; '.join(changed)}")
    begun, now = previous.get("processes", 1), record["processes"]
    if begun != now:
        _log.warning(
            "%s was begun by %d process(es) and goes on with %d: other images share a step, so the "
            "result is not that of one uninterrupted run",
            out,
            begun,
            now,
        )


def _decisive(record: dict[str, Any], model: RLRModel) -> dict[str, Any]:
    """Return by name what all processes of a run must have in common."""
    values = {f"{p} {k}": v for p in ("model", "recipe", "data") for k, v in record[p].items()}
    # Each machine may keep images and weights where it likes; their digests decide.
    del values["data root"], values["model backbone_weights"]
    return values | {"fingerprint of the backbone": model.backbone.fingerprint}


def _features(
    model: RLRModel,
    data: DataSet,
    root: Path | None,
    placement: Placement,
    workers: int | None,
    quiet: bool,
    processes: Processes,
) -> tuple[FeatureCache, list[Sample], list[ImageFailure]]:
    """Return the features of this process's share, their samples, and all processes' failures."""
    samples = [sample for group in data.train.values() for sample in group]
    mine = samples[processes.rank :: processes.count]
    with (
        processes.together(),
        progress_bar("features", len(mine), quiet or not processes.leads) as bar,
    ):
        features = cached_features(
            model,
            mine,
            root,
            placement,
            workers=processes.workers(workers),
            progress=bar.update,
            sharers=processes.here,
        )
    shares = processes.exchange(features.failures)
    failures = sorted(
        (
            ImageFailure(rank + processes.count * failure.index, failure.error)
            for rank, share in enumerate(shares)
            for failure in share
        ),
        key=lambda failure: failure.index,
    )
    failed = {failure.index for failure in failures}
    readable = {sample.category for i, sample in enumerate(samples) if i not in failed}
    empty = set(data.classes) - readable
    if empty:
        reason = next(f.error for f in failures if samples[f.index].category in empty)
        raise processes.alike(
            TrainingError(f"no training image of {', '.join(sorted(empty))} can be read: {reason}")
        )
    mine_failed = {failure.index for failure in features.failures}
    return features, [s for i, s in enumerate(mine) if i not in mine_failed], failures


@torch.no_grad()
def _fit_standardization(model: RLRModel, features: FeatureCache, processes: Processes) -> None:
    """Set each level's channel mean and deviation over all processes' tokens, in float64."""
    for level, module in zip(features.levels, model.standardize, strict=True):
        standardize = cast(Standardize, module)
        total = torch.zeros(level.shape[2], dtype=torch.float64, device=level.device)
        squares = torch.zeros_like(total)
        for chunk in level.split(64):
            values = chunk.flatten(0, 1).double()
            total += values.sum(0)
            squares += values.square().sum(0)
        shares = processes.exchange((level.shape[0] * level.shape[1], total.cpu(), squares.cpu()))
        count = sum(tokens for tokens, _, _ in shares)
        mean = torch.stack([share for _, share, _ in shares]).sum(0) / count
        mean_square = torch.stack([share for _, _, share in shares]).sum(0) / count
        std = (mean_square - mean.square()).clamp_min(0).sqrt()
        standardize.fit(mean.float(), std.float())


def step_shares(counts: Sequence[int], rank: int, batch_size: int) -> list[int]:
    """Return how many images process ``rank`` takes in each step of an epoch.

    The processes' images are interleaved evenly and cut into batches. So a step has ``batch_size``
    images over all processes, the last one the rest, and each process has its part of them.

    Args:
        counts: Images of each process.
        rank: The process.
        batch_size: Images in a step, over all processes.
    """
    places = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
    owners = np.repeat(np.arange(len(counts)), counts)[np.argsort(places, kind="stable")]
    starts = range(0, len(owners), batch_size)
    return [int((owners[i : i + batch_size] == rank).sum()) for i in starts]


@dataclass
class _Run:
    """The loop and its state."""

    model: RLRModel
    recipe: TrainConfig
    features: FeatureCache
    out: Path
    processes: Processes
    history: list[dict[str, float]] = field(default_factory=list)
    epoch: int = 0

    def __post_init__(self) -> None:
        self.device = next(self.model.levels.parameters()).device
        self.level_parameters = [list(level.parameters()) for level in self.model.levels]
        self.parameters = [p for group in self.level_parameters for p in group]
        self.optimizer = torch.optim.Adam(self.parameters, lr=self.recipe.lr, fused=True)
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=self.recipe.precision == "fp16"
        )
        counts = self.processes.exchange(len(self.features))
        self.images = sum(counts)
        self.shares = step_shares(counts, self.processes.rank, self.recipe.batch_size)
        self.steps = len(self.shares)
        self.noise = torch.Generator(self.device)
        self.pending: list[tuple[Tensor, Tensor]] = []
        self.since = (0, 0.0)  # images seen and time of the last look at the loss

    # The loop

    def go(self, quiet: bool) -> None:
        """Train to the last epoch, from the last checkpoint if there is one."""
        self._load()
        if self.epoch >= self.recipe.epochs:
            with self.processes.together():
                if self.processes.leads:
                    self._export()  # the last one may have been killed before it was written
            return
        writer = None
        with self.processes.together():
            if self.processes.leads:
                writer = SummaryWriter(str(self.out), purge_step=self.epoch * self.steps + 1)
        self.model.train()
        with tqdm(
            total=self.recipe.epochs * self.images,
            initial=self.epoch * self.images,
            unit="img",
            desc="train",
            disable=quiet or not self.processes.leads,
        ) as bar:
            while self.epoch < self.recipe.epochs:
                self._train_epoch(bar, writer)
                self.epoch += 1
                with self.processes.together():
                    if self.processes.leads:
                        self._save()
        if writer is not None:
            writer.close()

    def _train_epoch(self, bar: Any, writer: SummaryWriter | None) -> None:
        order = torch.randperm(
            len(self.features), generator=torch.Generator().manual_seed(self._seed(-1 - self.epoch))
        ).to(self.features.device)
        self.since = (0, time.perf_counter())
        for i, rows in enumerate(order.split(self.shares)):
            step = self.epoch * self.steps + i
            self._step(step, rows)
            bar.update(self._count(step))
            self.since = (self.since[0] + self._count(step), self.since[1])
            if len(self.pending) == _LOG_EVERY or i + 1 == self.steps:
                self._look(step, bar, writer)

    def _step(self, step: int, rows: Tensor) -> None:
        rate = self.recipe.lr * self._schedule(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        losses = self._losses(step, rows)
        self.optimizer.zero_grad(set_to_none=True)
        scaled = self.scaler.scale(losses.sum())
        if len(rows) > 0:
            scaled.backward()
        losses = losses.detach()
        self.processes.add_gradients(self.parameters)
        self.processes.add(losses)
        self.scaler.unscale_(self.optimizer)
        norms = torch.stack([self._clip(group) for group in self.level_parameters])
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.pending.append((losses, norms))

    def _losses(self, step: int, rows: Tensor) -> Tensor:
        """Return this process's part of each level's loss: the processes' parts add up to it."""
        if len(rows) == 0:  # fewer images in the step than processes
            return torch.zeros(len(self.level_parameters), device=self.device)
        tokens = self.features.batch(rows, self.device)
        noise = None
        if self.model.config.perturbation > 0:
            self.noise.manual_seed(self._seed(step))
            noise = [torch.randn(t.shape, generator=self.noise, device=self.device) for t in tokens]
        precision = self.recipe.precision
        with torch.autocast(
            self.device.type,
            torch.float16 if precision == "fp16" else torch.bfloat16,
            enabled=precision != "fp32",
        ):
            distances = self.model.distances(tokens, noise)
        return torch.stack([d.mean(1).sum() / self._count(step) for d in distances])

    def _count(self, step: int) -> int:
        """Return the images of a step over all processes."""
        size = self.recipe.batch_size
        return min(size, self.images - step % self.steps * size)

    def _clip(self, parameters: Sequence[Tensor]) -> Tensor:
        """Return the gradient norm of one level, after limiting it where the recipe says so."""
        limit = self.recipe.clip_grad
        return torch.nn.utils.clip_grad_norm_(parameters, limit if limit > 0 else math.inf)

    def _schedule(self, step: int) -> float:
        progress = step / (self.steps * self.recipe.epochs)
        if self.recipe.schedule == "step":
            return 1.0 if progress < 0.8 else 0.1
        if self.recipe.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        return 1.0

    def _seed(self, index: int) -> int:
        """A seed of this process for each step (index from 0) and each epoch (index -1 - epoch)."""
        return ((self.recipe.seed << 33) + self.processes.rank * _RANK_STRIDE + index) % 2**63

    def _look(self, step: int, bar: Any, writer: SummaryWriter | None) -> None:
        """Read the losses since the last look; stop at the first that is not finite."""
        losses = torch.stack([loss for loss, _ in self.pending]).double().cpu()
        norms = torch.stack([norm for _, norm in self.pending]).double().cpu()
        first = step + 1 - len(self.pending)
        self.pending.clear()
        skipped = self.scaler.is_enabled()  # fp16 skips steps whose gradients overflow
        bad = ~losses.isfinite() if skipped else ~(losses.isfinite() & norms.isfinite())
        if bad.any():
            row, level = (int(i) for i in bad.nonzero()[0])
            what = "loss" if not losses[row, level].isfinite() else "gradient"
            message = (
                f"the {what} of level {level} is not finite at step {first + row} "
                f"(epoch {self.epoch + 1}); {self._kept()}. In another --out, a smaller --lr, "
                "--clip-grad 1 or --precision fp32 may help"
            )
            raise self.processes.alike(TrainingError(message))
        images, start = self.since
        speed = images / max(time.perf_counter() - start, 1e-9)
        row_values = {
            "step": step + 1,
            "epoch": (step + 1) / self.steps,
            "loss": float(losses.sum(1).mean()),
            **{f"level_{j}": float(v) for j, v in enumerate(losses.mean(0))},
            "grad_norm": float(norms.square().sum(1).sqrt().mean()),
            "lr": self.recipe.lr * self._schedule(step),
            "images_per_s": speed,
        }
        self.history.append(row_values)
        bar.set_postfix(loss=f"{row_values['loss']:.4f}", refresh=False)
        if writer is not None:
            for name, value in row_values.items():
                if name != "step":
                    writer.add_scalar(f"train/{name}", value, step + 1)
        self.since = (0, time.perf_counter())

    def _kept(self, epoch: int | None = None) -> str:
        epoch = self.epoch if epoch is None else epoch
        return (
            f"the checkpoint of epoch {epoch} is intact" if epoch > 0 else "no epoch was finished"
        )

    # The checkpoint: each file is whole at any time, and training_state alone suffices to resume.

    def write_settings(self, record: dict[str, Any]) -> None:
        """Write what the run is, before its first step."""
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            write_atomically(self.out / CONFIG_FILE, self.model.config.to_json())
            write_atomically(self.out / RUN_FILE, json.dumps(record, indent=2))
        except OSError as error:
            raise TrainingError(f"cannot write the run in {str(self.out)!r}: {error}") from error

    def _save(self) -> None:
        tensors = {f"model.{k}": v for k, v in self.model.checkpoint_state().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{k}": v for k, v in state.items()}
        progress = {"epoch": self.epoch, "scaler": self.scaler.state_dict()}
        metadata = {"progress": json.dumps(progress | self.model.checkpoint_metadata())}
        history = "".join(json.dumps(row) + "\n" for row in self.history)
        try:
            write_atomically(self.out / HISTORY_FILE, history)
            write_tensors(self.out / STATE_FILE, tensors, metadata)
            self._export()
        except OSError as error:
            raise TrainingError(
                f"cannot write the checkpoint of epoch {self.epoch} in {str(self.out)!r}: {error}; "
                f"{self._kept(self.epoch - 1)}: make room and go on with --resume"
            ) from error

    def _export(self) -> None:
        state, metadata = self.model.checkpoint_state(), self.model.checkpoint_metadata()
        write_tensors(self.out / WEIGHTS_FILE, state, metadata)

    def _load(self) -> None:
        state = self.processes.from_leader(self._read)
        if state is None:
            return
        tensors, progress, self.history = state
        self.model.load_checkpoint_state(
            {k[len("model.") :]: v for k, v in tensors.items() if k.startswith("model.")}
        )
        optimizer = self.optimizer.state_dict()
        optimizer["state"] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, index, name = key.split(".")
                optimizer["state"].setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict(optimizer)
        self.scaler.load_state_dict(progress["scaler"])
        self.epoch = progress["epoch"]

    def _read(self) -> tuple[dict[str, Tensor], dict[str, Any], list[dict[str, float]]] | None:
        """Return tensors, progress and history of the last finished epoch, if there is one."""
        path = self.out / STATE_FILE
        if not path.exists():
            return None
        try:
            tensors, metadata = read_weights(path)
        except CheckpointError as error:
            raise TrainingError(
                f"cannot resume: {error}. Delete it to start the run anew; "
                f"{WEIGHTS_FILE} beside it can still be used"
            ) from error
        progress = json.loads(metadata["progress"])
        self.model.check_backbone(progress, path)
        history: list[dict[str, float]] = []
        with contextlib.suppress(FileNotFoundError):
            rows = (self.out / HISTORY_FILE).read_text(encoding="utf-8").splitlines()
            last = progress["epoch"] * self.steps
            history = [row for row in map(json.loads, rows) if row["step"] <= last]
        return tensors, progress, history
