"""The steps of a training: gradients, optimizers and all random numbers."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor

from rlr_fast.config import TrainConfig
from rlr_fast.models.precision import autocast
from rlr_fast.models.reconstructor import Reconstructor
from rlr_fast.models.rlr import RLRModel
from rlr_fast.training.distributed import Processes
from rlr_fast.training.muon import Muon

_logger = logging.getLogger(__name__)


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


def parameter_count(optimizer: torch.optim.Optimizer) -> int:
    """Return how many parameters an optimizer has."""
    return sum(len(group["params"]) for group in optimizer.param_groups)


def number_seed(seed: int, rank: int, index: int) -> int:
    """Return the seed of a step (index from 0) or of an epoch (index -1 - epoch).

    Args:
        seed: Of the recipe.
        rank: Of the process.
        index: Of the step or the epoch.
    """
    # Hashed: a CPU's generator takes the low 32 bits alone.
    name = f"{seed} {rank} {index}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=7).digest(), "little")


def epoch_order(seed: int, rank: int, epoch: int, images: int) -> Tensor:
    """Return the order in which an epoch takes a process's images, (images,)."""
    generator = torch.Generator().manual_seed(number_seed(seed, rank, -1 - epoch))
    return torch.randperm(images, generator=generator)


class Steps:
    """Takes the steps of a training; each depends on the model, its number and its images alone.

    Args:
        model: On its device.
        recipe: Epochs, batch size, learning rate, precision, seed.
        counts: Training images of each process.
        processes: Those that train together.
        compile: Compile the reconstructors (`torch.compile`; CUDA graphs on a GPU).
        micro_batch_size: Images of a step whose activations lie in memory at once; None is all.

    Attributes:
        images: Training images of all processes.
        shares: Images that this process takes in each step of an epoch.
        per_epoch: Steps of an epoch.
        terms: Names of the terms of the loss.
    """

    def __init__(
        self,
        model: RLRModel,
        recipe: TrainConfig,
        counts: Sequence[int],
        processes: Processes,
        *,
        compile: bool = False,
        micro_batch_size: int | None = None,
    ) -> None:
        self.model, self.recipe, self.processes = model, recipe, processes
        self.compile, self.micro_batch_size = compile, micro_batch_size
        self.device = model.device
        self.level_parameters = [list(level.parameters()) for level in model.levels]
        self.parameters = [p for group in self.level_parameters for p in group]
        self.optimizers = _optimizers(model, recipe)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=recipe.precision == "fp16")
        # The scale is made by the first use, and a process may have no image in its first step.
        self.scaler.scale(torch.zeros((), device=self.device))
        self.images = sum(counts)
        self.shares = step_shares(counts, processes.rank, recipe.batch_size)
        self.per_epoch = len(self.shares)
        self.noise = torch.Generator(self.device)
        self.terms = [f"level_{j}" for j in range(len(self.level_parameters))]
        if model.config.diversity > 0:
            self.terms.append("diversity")
        self.distances: Callable[..., list[Tensor]] = model.distances
        if compile:
            mode = "reduce-overhead" if self.device.type == "cuda" else "default"
            self.distances = torch.compile(model.distances, mode=mode, dynamic=False)

    def order(self, epoch: int, images: int) -> Tensor:
        """Return the order in which an epoch takes this process's images, (images,)."""
        return epoch_order(self.recipe.seed, self.processes.rank, epoch, images)

    def take(self, step: int, tokens: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Take a step; nothing in it waits for the device.

        Args:
            step: Its number, from 0 on over all epochs.
            tokens: [(B, N_j, C_j)] of this process's images.

        Returns:
            The terms of the loss over all processes, as in ``terms``; norms of levels' gradients.
        """
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.lr(step)
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
        return losses, norms

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
        self.noise.manual_seed(self.seed(step))
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
        losses = [d.mean(1).sum() / self.count(step) for d in distances]
        if self.model.config.diversity > 0:  # by the images: the parts of a step add up to one
            losses.append(self.model.diversity_loss() * (len(tokens[0]) / self.count(step)))
        return torch.stack(losses)

    def count(self, step: int) -> int:
        """Return the images of a step over all processes."""
        size = self.recipe.batch_size
        return min(size, self.images - step % self.per_epoch * size)

    def _clip(self, parameters: Sequence[Tensor]) -> Tensor:
        """Return the gradient norm of one level, after limiting it where the recipe says so."""
        limit = self.recipe.clip_grad
        return torch.nn.utils.clip_grad_norm_(parameters, limit if limit > 0 else math.inf)

    def lr(self, step: int) -> float:
        """Return the learning rate of a step."""
        progress = step / (self.per_epoch * self.recipe.epochs)
        factor = 1.0
        if self.recipe.schedule == "step":
            factor = 1.0 if progress < 0.8 else 0.1
        elif self.recipe.schedule == "cosine":
            factor = 0.5 * (1 + math.cos(math.pi * progress))
        return self.recipe.lr * factor

    def seed(self, step: int) -> int:
        """Return this process's seed of a step's noise."""
        return number_seed(self.recipe.seed, self.processes.rank, step)
