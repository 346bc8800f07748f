"""The trainer: the same steps to the bit, however often a run is stopped and resumed."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from rlr_fast.config import TrainConfig
from rlr_fast.models.rlr import RLRModel
from rlr_fast.training.distributed import Processes
from rlr_fast.training.features import Features
from rlr_fast.training.run_dir import (
    Checkpoint,
    CheckpointWriter,
    Row,
    TrainingError,
    read_checkpoint,
)
from rlr_fast.training.steps import Steps, parameter_count

_logger = logging.getLogger(__name__)

_LOG_EVERY = 20  # steps: to read the loss waits for the device


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
        began: Finished epochs when `fit` began: those of a run that goes on.
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
        self.history: list[Row] = []
        self.epoch = self.began = 0
        self.steps = Steps(
            model,
            recipe,
            processes.all_gather(len(features)),
            processes,
            compile=compile,
            micro_batch_size=micro_batch_size,
        )
        self.pending: list[tuple[Tensor, Tensor]] = []
        self.since = (0, 0.0)  # images seen and time when the loss was last logged

    def fit(self, quiet: bool) -> None:
        """Train to the last epoch.

        Raises:
            TrainingError: The disk is full, or the loss is not finite.
            PeerError: Another process met one of these.
        """
        self._load()
        self.began = self.epoch
        self.progress(self.epoch * self.steps.images)
        if self.epoch >= self.recipe.epochs:
            self.save()  # it may have been killed before its last file
            return
        bar = tqdm(
            total=self.recipe.epochs * self.steps.images,
            initial=self.epoch * self.steps.images,
            unit="img",
            desc="train",
            disable=quiet or not self.processes.is_main,
        )
        self.model.train()
        with bar, CheckpointWriter(self.out, self.epoch) as checkpoints, _quiet_log_thread():
            log = None
            with self.processes.together(), self._writing_log(checkpoints):
                if self.processes.is_main:
                    log = SummaryWriter(
                        str(self.out), purge_step=self.epoch * self.steps.per_epoch + 1
                    )
            while self.epoch < self.recipe.epochs:
                self._train_epoch(bar, log, checkpoints)
                self.epoch += 1
                with self.processes.together():
                    if self.processes.is_main:
                        self._save(checkpoints)
            if log is not None:
                with self._writing_log(checkpoints):
                    log.close()

    def save(self) -> None:
        """Write the checkpoint of the last finished epoch with the model as it is now.

        Raises:
            TrainingError: The disk is full.
            PeerError: Another process met this.
        """
        with self.processes.together():
            if self.processes.is_main:
                with CheckpointWriter(self.out, self.epoch) as checkpoints:
                    checkpoints.write(self._checkpoint())
                    checkpoints.finish()

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
        steps = self.steps
        order = steps.order(self.epoch, len(self.features))
        self.since = (0, time.perf_counter())
        batches = self.features.batches(order.split(steps.shares), steps.device)
        for i, tokens in enumerate(batches):
            step = self.epoch * steps.per_epoch + i
            self.pending.append(steps.take(step, tokens))
            bar.update(steps.count(step))
            self.progress(steps.count(step))
            self.since = (self.since[0] + steps.count(step), self.since[1])
            if len(self.pending) == _LOG_EVERY or i + 1 == steps.per_epoch:
                self._log(step, bar, log, checkpoints)

    # What the user sees

    def _log(
        self, step: int, bar: Any, log: SummaryWriter | None, checkpoints: CheckpointWriter
    ) -> None:
        """Log the losses since the last row; stop at the first that is not finite."""
        losses = torch.stack([loss for loss, _ in self.pending]).cpu().double()
        norms = torch.stack([norm for _, norm in self.pending]).cpu().double()
        first = step + 1 - len(self.pending)
        self.pending.clear()
        skipped = self.steps.scaler.is_enabled()  # fp16 skips steps whose gradients overflow
        bad = ~losses.isfinite()
        if not skipped:
            bad[:, : norms.shape[1]] |= ~norms.isfinite()
        if bad.any():
            row, term = (int(i) for i in bad.nonzero()[0])
            what = "loss" if not losses[row, term].isfinite() else "gradient"
            name = self.steps.terms[term].replace("_", " ")
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
            "epoch": (step + 1) / self.steps.per_epoch,
            "loss": float(losses.sum(1).mean()),
            **{name: float(v) for name, v in zip(self.steps.terms, losses.mean(0), strict=True)},
            "grad_norm": float(norms.square().sum(1).sqrt().mean()),
            "lr": self.steps.lr(step),
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
            progress={
                "steps": self.epoch * self.steps.per_epoch,
                "scaler": self.steps.scaler.state_dict(),
            },
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
            numbers = range(first, first + parameter_count(optimizer))
            # A parameter without a gradient, such as an unused reference, has no state.
            states = {n - first: dict(saved.optimizer[n]) for n in numbers if n in saved.optimizer}
            optimizer.load_state_dict(whole | {"state": states})
        self.steps.scaler.load_state_dict(saved.progress["scaler"])
        self.epoch, self.history = saved.epoch, list(saved.history)

    def _numbered_optimizers(self) -> Iterator[tuple[int, torch.optim.Optimizer]]:
        """Yield each optimizer behind the number that its first parameter has in a checkpoint."""
        first = 0
        for optimizer in self.steps.optimizers:
            yield first, optimizer
            first += parameter_count(optimizer)
