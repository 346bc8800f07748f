"""The trainer: the same steps to the bit, however often a run is stopped and resumed."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from rlr_fast.config import TrainConfig
from rlr_fast.models.precision import autocast
from rlr_fast.models.reconstructor import Reconstructor
from rlr_fast.models.rlr import RLRModel
from rlr_fast.training.distributed import Processes
from rlr_fast.training.features import Features
from rlr_fast.training.muon import Muon
from rlr_fast.training.run_dir import (
    Checkpoint,
    CheckpointWriter,
    Row,
    TrainingError,
    read_checkpoint,
)

_logger = logging.getLogger(__name__)

_LOG_EVERY = 20  # steps: to read the loss waits for the device


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


def _optimizers(model: RLRModel, recipe: TrainConfig) -> list[torch.optim.Optimizer]:
    """Return Adam, or Adam and Muon for the matrices of the blocks."""
    parameters = list(model.levels.parameters())
    if recipe.optimizer == "adam":
        return [torch.optim.Adam(parameters, lr=recipe.lr, fused=True)]
    levels = cast("list[Reconstructor]", list(model.levels))
    matrices = [p for level in levels for p in level.blocks.parameters() if p.dim() == 2]
    apart = {id(p) for p in matrices}
    others = [p for p in parameters if id(p) not in apart]
    return [torch.optim.Adam(others, lr=recipe.lr, fused=True), Muon(matrices, recipe.lr)]


def _parameter_count(optimizer: torch.optim.Optimizer) -> int:
    return sum(len(group["params"]) for group in optimizer.param_groups)


@contextlib.contextmanager
def _quiet_log_thread() -> Iterator[None]:
    """Keep TensorBoard's thread from printing the trace of an error that its caller raises, too."""
    before = threading.excepthook

    def hook(arguments: threading.ExceptHookArgs) -> None:
        if not isinstance(arguments.exc_value, OSError):
            before(arguments)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


class Trainer:
    """Trains one model on features, from the run's last checkpoint to its last epoch.

    Args:
        model: On its device.
        recipe: Epochs, batch size, learning rate, precision, seed.
        features: This process's share of the training images.
        out: The run's folder.
        processes: Those that train together.
        compile: Compile the reconstructors (`torch.compile`; CUDA graphs on a GPU).
        micro_batch_size: Images of a step whose activations lie in memory at once; None is all.
        progress: Called with the images of the epochs that are done already, then of each step.

    Attributes:
        history: Rows of the log.
        epoch: Finished epochs.
    """

    def __init__(
        self,
        model: RLRModel,
        recipe: TrainConfig,
        features: Features,
        out: Path,
        processes: Processes,
        *,
        compile: bool = False,
        micro_batch_size: int | None = None,
        progress: Callable[[int], object] = lambda _: None,
    ) -> None:
        self.model, self.recipe, self.features, self.out = model, recipe, features, out
        self.processes, self.progress = processes, progress
        self.compile, self.micro_batch_size = compile, micro_batch_size
        self.history: list[Row] = []
        self.epoch = 0
        self.device = model.device
        self.level_parameters = [list(level.parameters()) for level in model.levels]
        self.parameters = [p for group in self.level_parameters for p in group]
        self.optimizers = _optimizers(model, recipe)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=recipe.precision == "fp16")
        counts = processes.all_gather(len(features))
        self.images = sum(counts)
        self.shares = step_shares(counts, processes.rank, recipe.batch_size)
        self.steps = len(self.shares)
        self.noise = torch.Generator(self.device)
        self.pending: list[tuple[Tensor, Tensor]] = []
        self.terms = [f"level_{j}" for j in range(len(self.level_parameters))]
        if model.config.diversity > 0:
            self.terms.append("diversity")
        self.since = (0, 0.0)  # images seen and time when the loss was last logged
        self.distances: Callable[..., list[Tensor]] = model.distances
        if compile:
            mode = "reduce-overhead" if self.device.type == "cuda" else "default"
            self.distances = torch.compile(model.distances, mode=mode, dynamic=False)

    def fit(self, quiet: bool) -> None:
        """Train to the last epoch.

        Raises:
            TrainingError: The disk is full, or the loss is not finite.
            PeerError: Another process met one of these.
        """
        self._load()
        self.progress(self.epoch * self.images)
        if self.epoch >= self.recipe.epochs:
            with self.processes.together():
                if self.processes.is_main:  # it may have been killed before its last file
                    with CheckpointWriter(self.out, self.epoch) as checkpoints:
                        checkpoints.write(self._checkpoint())
            return
        bar = tqdm(
            total=self.recipe.epochs * self.images,
            initial=self.epoch * self.images,
            unit="img",
            desc="train",
            disable=quiet or not self.processes.is_main,
        )
        self.model.train()
        with bar, CheckpointWriter(self.out, self.epoch) as checkpoints, _quiet_log_thread():
            log = None
            with self.processes.together(), self._writing_log(checkpoints):
                if self.processes.is_main:
                    log = SummaryWriter(str(self.out), purge_step=self.epoch * self.steps + 1)
            while self.epoch < self.recipe.epochs:
                self._train_epoch(bar, log, checkpoints)
                self.epoch += 1
                with self.processes.together():
                    if self.processes.is_main:
                        self._save(checkpoints)
            if log is not None:
                with self._writing_log(checkpoints):
                    log.close()

    @contextlib.contextmanager
    def _writing_log(self, checkpoints: CheckpointWriter) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise TrainingError(
                f"cannot write the TensorBoard log in {str(self.out)!r}: {error}; "
                f"{checkpoints.kept()}: make room and resume"
            ) from error

    def _train_epoch(
        self, bar: Any, log: SummaryWriter | None, checkpoints: CheckpointWriter
    ) -> None:
        order = torch.randperm(
            len(self.features), generator=torch.Generator().manual_seed(self._seed(-1 - self.epoch))
        )
        self.since = (0, time.perf_counter())
        batches = self.features.batches(order.split(self.shares), self.device)
        for i, tokens in enumerate(batches):
            step = self.epoch * self.steps + i
            self._step(step, tokens)
            bar.update(self._count(step))
            self.progress(self._count(step))
            self.since = (self.since[0] + self._count(step), self.since[1])
            if len(self.pending) == _LOG_EVERY or i + 1 == self.steps:
                self._log(step, bar, log, checkpoints)

    # A step; nothing in it waits for the device.

    def _step(self, step: int, tokens: list[Tensor]) -> None:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.recipe.lr * self._schedule(step)
        losses = self._gradients(step, tokens)
        self.processes.all_reduce_gradients(self.parameters)
        self.processes.all_reduce(losses)
        if self.recipe.loss_power != 1:
            losses = self._power_means(losses)
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norms = torch.stack([self._clip(group) for group in self.level_parameters])
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
        self.pending.append((losses, norms))

    def _power_means(self, means: Tensor) -> Tensor:
        """Turn mean powers of distances into power means, in their gradients as well.

        The mean is that of the whole step, which no part of it knows before its gradients are made.
        """
        power = self.recipe.loss_power
        losses = means ** (1 / power)
        factors = losses / (power * means.clamp_min(torch.finfo(means.dtype).tiny))
        for parameters, factor in zip(self.level_parameters, factors, strict=True):
            gradients = [p.grad for p in parameters if p.grad is not None]
            torch._foreach_mul_(gradients, factor)
        return losses

    def _gradients(self, step: int, tokens: list[Tensor]) -> Tensor:
        """Leave this process's part of the gradients; return its part of each term of the loss.

        The processes' parts, and those of a share's micro-batches, add up to the whole.
        """
        noise = self._noise(step, tokens)
        while True:
            for parameter in self.parameters:
                parameter.grad = None
            try:
                losses = torch.zeros(len(self.terms), device=self.device)
                for micro_batch in self._micro_batches(tokens, noise):
                    part = self._losses(step, *micro_batch)
                    self.scaler.scale(part.sum()).backward()
                    losses += part.detach()
                return losses
            except torch.OutOfMemoryError:
                images = min(len(tokens[0]), self.micro_batch_size or len(tokens[0]))
                if images == 1:
                    raise
                self.micro_batch_size = math.ceil(images / 2)
                _logger.warning(
                    "out of memory with %d images at once; going on with %d at once, which changes "
                    "no more than rounding",
                    images,
                    self.micro_batch_size,
                )

    def _noise(self, step: int, tokens: list[Tensor]) -> list[Tensor] | None:
        if self.model.config.perturbation == 0:
            return None
        self.noise.manual_seed(self._seed(step))
        return [torch.randn(t.shape, generator=self.noise, device=self.device) for t in tokens]

    def _micro_batches(
        self, tokens: list[Tensor], noise: list[Tensor] | None
    ) -> Iterator[tuple[list[Tensor], list[Tensor] | None]]:
        images = len(tokens[0])
        size = self.micro_batch_size or images
        for start in range(0, images, max(1, size)):
            rows = slice(start, start + size)
            yield [t[rows] for t in tokens], None if noise is None else [n[rows] for n in noise]

    def _losses(self, step: int, tokens: list[Tensor], noise: list[Tensor] | None) -> Tensor:
        if self.compile:
            torch.compiler.cudagraph_mark_step_begin()
        with autocast(self.device, self.recipe.precision):
            distances = self.distances(tokens, noise)
        power = self.recipe.loss_power
        if power != 1:
            distances = [d**power for d in distances]
        losses = [d.mean(1).sum() / self._count(step) for d in distances]
        if self.model.config.diversity > 0:  # by the images: the parts of a step add up to one
            losses.append(self.model.diversity_loss() * (len(tokens[0]) / self._count(step)))
        return torch.stack(losses)

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
        """Return this process's seed of a step (index from 0) or of an epoch (index -1 - epoch)."""
        # Hashed: a CPU's generator takes the low 32 bits alone.
        name = f"{self.recipe.seed} {self.processes.rank} {index}".encode()
        return int.from_bytes(hashlib.blake2b(name, digest_size=7).digest(), "little")

    # What the user sees

    def _log(
        self, step: int, bar: Any, log: SummaryWriter | None, checkpoints: CheckpointWriter
    ) -> None:
        """Log the losses since the last row; stop at the first that is not finite."""
        losses = torch.stack([loss for loss, _ in self.pending]).double().cpu()
        norms = torch.stack([norm for _, norm in self.pending]).double().cpu()
        first = step + 1 - len(self.pending)
        self.pending.clear()
        skipped = self.scaler.is_enabled()  # fp16 skips steps whose gradients overflow
        bad = ~losses.isfinite()
        if not skipped:
            bad[:, : norms.shape[1]] |= ~norms.isfinite()
        if bad.any():
            row, term = (int(i) for i in bad.nonzero()[0])
            what = "loss" if not losses[row, term].isfinite() else "gradient"
            name = self.terms[term].replace("_", " ")
            message = (
                f"the {what} of {name} is not finite at step {first + row} "
                f"(epoch {self.epoch + 1}); {checkpoints.kept()}. In another --out, a smaller "
                "--lr, --clip-grad 1 or --precision fp32 may help"
            )
            raise self.processes.alike(TrainingError(message))
        images, start = self.since
        speed = images / max(time.perf_counter() - start, 1e-9)
        row_values = {
            "step": step + 1,
            "epoch": (step + 1) / self.steps,
            "loss": float(losses.sum(1).mean()),
            **{name: float(v) for name, v in zip(self.terms, losses.mean(0), strict=True)},
            "grad_norm": float(norms.square().sum(1).sqrt().mean()),
            "lr": self.recipe.lr * self._schedule(step),
            "images_per_s": speed,
        }
        self.history.append(row_values)
        bar.set_postfix(loss=f"{row_values['loss']:.4f}", refresh=False)
        if log is not None:
            with self._writing_log(checkpoints):
                for name, value in row_values.items():
                    if name != "step":
                        log.add_scalar(f"train/{name}", value, step + 1)
        self.since = (0, time.perf_counter())

    # The checkpoint

    def _save(self, checkpoints: CheckpointWriter) -> None:
        """Write this epoch's checkpoint behind the next epoch; not each, where the disk is slow."""
        last = self.epoch == self.recipe.epochs
        if last or not checkpoints.busy:
            checkpoints.write(self._checkpoint())
        if last:
            checkpoints.finish()

    def _checkpoint(self) -> Checkpoint:
        """Copy what the next step will change."""

        def copy(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor.detach().clone() for name, tensor in tensors.items()}

        states = {
            first + index: state
            for first, optimizer in self._numbered_optimizers()
            for index, state in optimizer.state_dict()["state"].items()
        }
        return Checkpoint(
            epoch=self.epoch,
            model=copy(self.model.checkpoint_state()),
            optimizer={number: copy(tensors) for number, tensors in states.items()},
            progress={"steps": self.epoch * self.steps, "scaler": self.scaler.state_dict()},
            metadata=self.model.checkpoint_metadata(),
            history=list(self.history),
        )

    def _load(self) -> None:
        saved = self.processes.broadcast(lambda: read_checkpoint(self.out))
        if saved is None:
            return
        self.model.check_backbone(dict(saved.metadata), self.out)
        self.model.load_checkpoint_state(dict(saved.model))
        for first, optimizer in self._numbered_optimizers():
            whole = optimizer.state_dict()
            numbers = range(first, first + _parameter_count(optimizer))
            # A parameter without a gradient, such as an unused reference, has no state.
            states = {n - first: dict(saved.optimizer[n]) for n in numbers if n in saved.optimizer}
            optimizer.load_state_dict(whole | {"state": states})
        self.scaler.load_state_dict(saved.progress["scaler"])
        self.epoch, self.history = saved.epoch, list(saved.history)

    def _numbered_optimizers(self) -> Iterator[tuple[int, torch.optim.Optimizer]]:
        """Yield each optimizer behind the number that its first parameter has in a checkpoint."""
        first = 0
        for optimizer in self.optimizers:
            yield first, optimizer
            first += _parameter_count(optimizer)
