"""Dinomaly and INP-Former: decoders that learn by gradient steps to reconstruct a ViT's tokens.

Model, initial weights, loss, optimizer, schedule and clipping are those of anomalib's Lightning
modules, without its trainer. The ViT's tokens are computed once for each training image and kept in
half precision: it is frozen, and the recipes augment nothing. The learning rate follows its
schedule step by step, as in the code of Dinomaly's authors; anomalib 2.7 leaves that to Lightning,
which by default moves it once an epoch.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib import import_module
from math import ceil
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.peers.methods import infer
from rlr_fast.models.backbone import Backbone

# The ViT's blocks that the decoders' eight are compared with, in two groups of four.
_LEVELS = 8
_REPORT_EVERY = 50


@dataclass(frozen=True)
class Training:
    """What is ours of the recipes.

    Attributes:
        steps: Gradient steps.
        batch_size: Images of a step; 16 in the code of Dinomaly's authors.
    """

    steps: int = 800
    batch_size: int = 8

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size: must be at least 1, got {self.batch_size}")


class _Encoder(nn.Module):
    """The backbone as anomalib takes a ViT, or tokens that it gave before."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        vit: Any = backbone.network.model
        self.backbone, self.vit = backbone, vit
        self.patch_size = vit.patch_embed.patch_size[0]
        self.num_register_tokens = vit.num_prefix_tokens - 1
        self.cached: Tensor | None = None

    @torch.no_grad()
    def tokens(self, images: Tensor) -> Tensor:
        """Return the tokens (B, levels, N, C): the class's, registers, patches in rows."""
        levels = self.vit.forward_intermediates(
            (images - self.backbone.mean) / self.backbone.std,
            indices=list(self.backbone.indices),
            return_prefix_tokens=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        return torch.stack([torch.cat((prefix, patches), 1) for patches, prefix in levels], 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the tokens of each level by its block's name; the cached ones if there are any."""
        tokens = self.tokens(images) if self.cached is None else self.cached.float()
        names = [f"blocks.{level}" for level in self.backbone.indices]
        return dict(zip(names, tokens.unbind(1), strict=True))


class _Transformer(ABC):
    """A Lightning module of anomalib, without its trainer.

    Raises:
        ValueError: The backbone is no ViT with a class token or has not eight levels, the image
            size is no multiple of a patch, or the steps end before the learning rate has risen.
    """

    name: str
    package: str

    def __init__(self, backbone: Backbone, training: Training) -> None:
        vit: Any = backbone.network.model
        if not getattr(vit, "num_prefix_tokens", 0):
            raise ValueError(
                f"{self.name}: the backbone must be a ViT with a class token, got {backbone.name!r}"
            )
        if len(backbone.indices) != _LEVELS:
            raise ValueError(
                f"{self.name}: needs {_LEVELS} levels, such as --levels 2-5 6-9 of a ViT of 12 "
                f"blocks, got {len(backbone.indices)}"
            )
        self.encoder, self.size = _Encoder(backbone), backbone.image_size
        if any(side % self.encoder.patch_size for side in self.size):
            raise ValueError(
                f"{self.name}: the image size must be a multiple of the "
                f"{self.encoder.patch_size} pixels of a patch, got {self.size[0]}"
            )
        lightning_model = import_module(f"{self.package}.lightning_model")
        warmup = lightning_model.TRAINING_CONFIG["scheduler"]["warmup_iters"]
        if training.steps <= warmup:
            raise ValueError(
                f"{self.name}: steps must be more than the {warmup} of warming up, got "
                f"{training.steps}"
            )
        self.training = training
        self.module = self._make_module(lightning_model, backbone)
        self.batches: list[Tensor] = []

    def _make_module(self, lightning_model: Any, backbone: Backbone) -> Any:
        torch_model = import_module(f"{self.package}.torch_model")
        vit: Any = backbone.network.model
        # What anomalib tells from the names of DINOv2's networks.
        architecture = {
            "embed_dim": vit.embed_dim,
            "num_heads": vit.blocks[0].attn.num_heads,
            "target_layers": list(backbone.indices),
        }
        model = getattr(torch_model, f"{self.name}Model")
        unused = dict.fromkeys(
            ("pre_processor", "post_processor", "evaluator", "visualizer"), False
        )
        with (
            mock.patch.object(torch_model, "TimmFeatureExtractor", lambda **_: self.encoder),
            mock.patch.object(model, "_get_architecture_config", lambda *_: architecture),
        ):
            return getattr(lightning_model, self.name)(
                encoder_name=backbone.name, target_layers=list(backbone.indices), **unused
            )

    @abstractmethod
    def loss(self, images: Tensor, step: int) -> Tensor:
        """Return the loss of a batch."""

    def learn(self, images: Tensor) -> None:
        """Keep a batch's tokens."""
        self.batches.append(self.encoder.tokens(images).half())

    def finish(self) -> None:
        """Train."""
        steps, batch_size = self.training.steps, self.training.batch_size
        tokens = torch.cat(self.batches)
        self.batches.clear()
        self.module.trainer = SimpleNamespace(max_steps=steps, max_epochs=None)
        [optimizer], [schedule] = self.module.configure_optimizers()
        clip = self.module.trainer_arguments["gradient_clip_val"]
        self.module.train()
        epochs = ceil(steps * batch_size / len(tokens))
        order = torch.cat([torch.randperm(len(tokens)) for _ in range(epochs)])
        losses: list[float] = []
        start = time.perf_counter()
        for step, rows in enumerate(order.split(batch_size)[:steps]):
            self.encoder.cached = tokens[rows]
            loss = self.loss(torch.empty(len(rows), 3, *self.size), step)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.module.trainable_modules.parameters(), clip)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            if len(losses) == _REPORT_EVERY or step + 1 == steps:
                seconds = (time.perf_counter() - start) / (step + 1)
                print(
                    f"{self.name}: step {step + 1} of {steps}, loss "
                    f"{sum(losses) / len(losses):.4f}, {seconds:.2f} s a step",
                    flush=True,
                )
                losses.clear()
        self.encoder.cached = None
        self.module.eval()

    def score(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores and maps."""
        return infer(self.module.model, images)


class Dinomaly(_Transformer):
    """Dinomaly: a decoder with linear attention behind a bottleneck with dropout."""

    name = "Dinomaly"
    package = "anomalib.models.image.dinomaly"

    def loss(self, images: Tensor, step: int) -> Tensor:
        """Return the cosine distance, of whose gradient easy tokens get a tenth."""
        return self.module.model(images, global_step=step)


class InpFormer(_Transformer):
    """INP-Former: a decoder that attends to six prototypes of the image itself."""

    name = "InpFormer"
    package = "anomalib.models.image.inp_former"

    def loss(self, images: Tensor, step: int) -> Tensor:
        """Return the cosine distance, its gradient weighted by difficulty, and the prototypes'."""
        return self.module.model(images)
