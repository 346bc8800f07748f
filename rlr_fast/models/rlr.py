"""RLRModel: images → score map and image score."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from rlr_fast.config import SCORE_FIELDS, RLRConfig, per_level
from rlr_fast.functional import Backend, require_head_width, unsupported_reason
from rlr_fast.models.authors import load_reconstructors
from rlr_fast.models.backbone import Backbone, neighborhood_mean
from rlr_fast.models.block import RLRBlock
from rlr_fast.models.pretrained import Pretrained
from rlr_fast.models.reconstructor import Reconstructor
from rlr_fast.models.scoring import ScoreMap, distance, perturb
from rlr_fast.models.standardization import Components, Standardize
from rlr_fast.models.uncertainty import Uncertainty


class RLROutput(NamedTuple):
    """What the model says of a batch of images.

    Attributes:
        score_map: (B, 1, H, W) anomaly score of each pixel, not smoothed (eq. 16).
        score: (B,) anomaly score of each image, by default the maximum of the smoothed
            score map, see `ScoreMap`.
        level_maps: [(B, 1, h_j, w_j)] token distances of each level, see
            `RLRModel.scored_distances`.
    """

    score_map: Tensor
    score: Tensor
    level_maps: list[Tensor]


class RLRModel(Pretrained):
    """Multi-class anomaly detector that rebuilds features from a learnable reference (RLR).

    Args:
        config: The model; default is the paper's.
        backend: Backend of the attention operators: ``auto``, ``triton``, ``tiled`` or ``dense``.

    Attributes:
        backbone: Frozen feature network (`Backbone`).
        levels: One `Reconstructor` per level.
        compiled_batch: Images in a batch for which
            `rlr_fast.pictures.batches.compile_model` compiled it.

    Raises:
        TypeError: ``config`` is something else.
        ValueError: The configuration does not fit the backbone.
        BackboneWeightsError: The backbone's weights cannot be had.
        BackendError: The backend has no operator for the width of a head.
    """

    def __init__(self, config: RLRConfig | None = None, backend: Backend = "auto") -> None:
        super().__init__()
        config = RLRConfig() if config is None else config
        if not isinstance(config, RLRConfig):
            raise TypeError(f"config must be an RLRConfig, got {config!r}")
        self.config = config
        self.backend = backend
        self.compiled_batch: int | None = None
        self.backbone = Backbone(
            config.backbone, config.backbone_weights, config.out_indices, config.image_size
        )
        levels = len(config.out_indices)
        kept = per_level(config.components, levels)
        for count, channels in zip(kept, self.backbone.channels, strict=True):
            if count > channels:
                raise ValueError(
                    f"components must be at most the channels of their level, "
                    f"{self.backbone.channels}, got components={config.components}"
                )
        self.levels = nn.ModuleList(
            Reconstructor(
                count or channels,
                hidden,
                heads,
                grid,
                window,
                blocks=config.blocks,
                attention=config.attention,
                alpha=config.alpha,
                fusion=config.fusion,
                references=config.references,
                ffn_ratio=config.ffn_ratio,
                residual=config.residual,
                patch=patch,
                backend=backend,
            )
            for count, channels, grid, hidden, heads, window, patch in zip(
                kept,
                self.backbone.channels,
                self.backbone.grids,
                config.hidden,
                config.heads,
                config.windows,
                per_level(config.patches, levels),
                strict=True,
            )
        )
        self.standardize = nn.ModuleList(
            Standardize(channels) if config.standardize else nn.Identity()
            for channels in self.backbone.channels
        )
        self.components = nn.ModuleList(
            Components(channels, count) if count else nn.Identity()
            for count, channels in zip(kept, self.backbone.channels, strict=True)
        )
        self.uncertainty = nn.ModuleList(
            Uncertainty(count or channels, config.uncertainty)
            for count, channels in zip(kept, self.backbone.channels, strict=True)
            if config.uncertainty
        )
        self.set_score()

    @property
    def device(self) -> torch.device:
        """Return the device on which the model lies."""
        return next(self.levels.parameters()).device

    def set_score(self, **fields: Any) -> None:
        """Change fields of the configuration that turn distances into scores, see `SCORE_FIELDS`.

        Raises:
            TypeError: A field is none of them.
            ValueError: A field breaks its rule.
        """
        unknown = fields.keys() - set(SCORE_FIELDS)
        if unknown:
            raise TypeError(f"set_score takes {', '.join(SCORE_FIELDS)}, got {min(unknown)}")
        self.config = dataclasses.replace(self.config, **fields)
        self.score_map = ScoreMap(
            self.config.image_size,
            self.config.smoothing,
            self.config.level_offsets,
            self.config.level_weights,
            self.config.top_share,
            self.config.surround,
            self.config.image_surround,
            self.config.align_corners,
        ).to(self.device)

    def set_backend(self, backend: Backend) -> None:
        """Change the backend of the attention operators.

        Raises:
            ValueError: There is no such backend.
            BackendError: It has no operator for the width of a head.
        """
        unsupported_reason(backend, self.device)  # refuses a name that is no backend
        for hidden, heads in zip(self.config.hidden, self.config.heads, strict=True):
            require_head_width(backend, hidden // heads)
        modules: Iterable[Any] = (self, *self.levels.modules())
        for module in modules:
            if hasattr(module, "backend"):  # the model, its blocks and their attention
                module.backend = backend
        for level in self._reconstructors():
            level.end_preparation()  # it was for the other

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Let training compute each block again in backward: less memory, the same gradients."""
        for level in self._reconstructors():
            level.grad_checkpointing = enable

    def requires_grad_(self, requires_grad: bool = True) -> RLRModel:
        """Let all ask for gradients, or none, but for what no gradient of the loss reaches."""
        super().requires_grad_(requires_grad)
        self.backbone.network.requires_grad_(False)
        self.uncertainty.requires_grad_(False)
        return self

    def prepare_for_inference(self) -> RLRModel:
        """Compute now, for later calls, what depends on no image; return the model.

        See `Reconstructor.prepare_for_inference`. `rlr_fast.pictures.batches.score_batches`, and so
        evaluation and prediction, call it where it is needed.

        Raises:
            RuntimeError: A CUDA graph is being captured, or code is being compiled.
        """
        for level in self._reconstructors():
            level.prepare_for_inference()
        return self

    def is_prepared(self) -> bool:
        """Return whether a call without gradients would take up what was prepared."""
        return all(level.is_prepared() for level in self._reconstructors())

    def __getstate__(self) -> dict[str, Any]:
        """Leave out compiled code, as `torch.nn.Module` does, and that there was any."""
        state: dict[str, Any] = super().__getstate__()
        return state | {"compiled_batch": None}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call `forward`, or what `torch.nn.Module.compile` made of it."""
        if self._compiled_call_impl is None or torch.compiler.is_compiling():
            return super().__call__(*args, **kwargs)
        # Compiled code cannot look for changes itself.
        with contextlib.ExitStack() as stack:
            for level in self._reconstructors():
                stack.enter_context(level.checked_preparation())
            return super().__call__(*args, **kwargs)

    def _reconstructors(self) -> list[Reconstructor]:
        return cast("list[Reconstructor]", list(self.levels))

    # One way for the data: images → tokens → reconstructed tokens → distance → map and score.

    def tokens(self, images: Tensor) -> list[Tensor]:
        """Return the pooled feature tokens [(B, N_j, C_j)] of ``images`` (eq. 1-2), as they are.

        Args:
            images: (B, 3, H, W) RGB: uint8, or floating point in [0, 1].

        Raises:
            ValueError: Another shape, size or dtype.
        """
        maps = self.backbone(images)
        return [neighborhood_mean(m, self.config.neighborhood).flatten(2).mT for m in maps]

    def feature_identity(self) -> dict[str, Any]:
        """Return by name what decides `tokens`, as plain values; where equal, so are features."""
        return {
            "backbone": self.config.backbone,
            "fingerprint": self.backbone.fingerprint,
            "out_indices": [v if isinstance(v, int) else list(v) for v in self.config.out_indices],
            "image_size": list(self.config.image_size),
            "neighborhood": self.config.neighborhood,
        }

    def score_identity(self) -> dict[str, Any]:
        """Return by name what decides the scores, as plain values; where equal, so are scores."""
        digest = hashlib.sha256(self.backbone.fingerprint.encode())
        for name, tensor in self.checkpoint_state().items():
            values = tensor.cpu().reshape(-1).view(torch.uint8)  # NumPy has no bfloat16
            digest.update(name.encode() + values.numpy().tobytes())
        config: dict[str, Any] = json.loads(self.config.to_json())
        # Where weights were taken from, and what was seen in training: the weights decide.
        del config["backbone_weights"], config["tile"], config["overlap"]
        identity = config | {"digest of the weights": digest.hexdigest()[:12]}
        if self.config.surround:
            # Once it was subtracted for the image score alone; scores from then are others.
            identity["surround is subtracted from"] = "the score map"
        return identity

    def reconstruct(self, tokens: Sequence[Tensor]) -> list[Tensor]:
        """Return the reconstructed tokens [(B, N_j, C_j)], in the features' own scale.

        With ``components`` they have nothing of those that are not kept.

        Args:
            tokens: [(B, N_j, C_j)] as from `tokens`.

        Raises:
            ValueError: They are not one a level, or of another shape.
        """
        self._require_levels("tokens", tokens)
        reconstructed = []
        for j in range(len(self.levels)):
            _, rebuilt = self._reconstruct_level(j, tokens[j])
            for scale in (self.components[j], self.standardize[j]):
                if isinstance(scale, (Components, Standardize)):
                    rebuilt = scale.undo(rebuilt)
            reconstructed.append(rebuilt)
        return reconstructed

    def compared(self, j: int, tokens: Tensor) -> Tensor:
        """Return a level's tokens (B, N_j, C_j) as they are reconstructed and compared.

        Args:
            j: The level's place in ``out_indices``.
            tokens: As from `tokens`, or from `reconstruct`.
        """
        scaled: Tensor = self.components[j](self.standardize[j](tokens))
        return scaled

    def distances(
        self, tokens: Sequence[Tensor], noise: Sequence[Tensor] | None = None
    ) -> list[Tensor]:
        """Return the token distances [(B, N_j)] between the features and their reconstructions.

        Both are compared as `compared` scales them.

        Args:
            tokens: [(B, N_j, C_j)] as from `tokens`.
            noise: Standard normal numbers in the tokens' shapes for eq. 3; None for no
                perturbation.
        """
        return [distances for _, distances in self.compare(tokens, noise)]

    def compare(
        self, tokens: Sequence[Tensor], noise: Sequence[Tensor] | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        """Return of each level the reconstruction (B, N_j, C), as compared, and the distances.

        Args:
            tokens: See `distances`.
            noise: See `distances`.

        Raises:
            ValueError: They are not one a level, or of another shape.
        """
        self._require_levels("tokens", tokens)
        if noise is not None:
            self._require_levels("noise", noise)
        pairs = []
        for j in range(len(self.levels)):
            original, rebuilt = self._reconstruct_level(
                j, tokens[j], None if noise is None else noise[j]
            )
            pairs.append((rebuilt, distance(rebuilt, original, self.backend)))
        return pairs

    def scored_distances(self, tokens: Sequence[Tensor]) -> list[Tensor]:
        """Return the token distances [(B, N_j)] that are scored: `distances`, times `Uncertainty`.

        Args:
            tokens: [(B, N_j, C_j)] as from `tokens`.
        """
        if not self.uncertainty:
            return self.distances(tokens)
        pairs = zip(self.uncertainty, self.compare(tokens), strict=True)
        return [uncertainty(rebuilt) * distances for uncertainty, (rebuilt, distances) in pairs]

    def _require_levels(self, name: str, tensors: Sequence[Tensor]) -> None:
        if len(tensors) != len(self.levels):
            raise ValueError(
                f"{name} must be one tensor for each of {len(self.levels)} levels, "
                f"got {len(tensors)}"
            )

    def _reconstruct_level(
        self, j: int, tokens: Tensor, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the level's tokens as they are compared, and their reconstruction."""
        original = self.compared(j, tokens)
        seen = original
        if noise is not None:
            # Eq. 3 divides by the channels of a token, which a patch has more of and a larger norm.
            patch = self._reconstructors()[j].patch
            noise = noise[..., : original.shape[-1]]
            seen = perturb(original, self.config.perturbation / patch, noise)
        return original, self.levels[j](seen)

    def predict_tokens(self, tokens: Sequence[Tensor]) -> RLROutput:
        """Return the output for images whose feature tokens [(B, N_j, C_j)] are known."""
        level_maps = [
            d.unflatten(1, grid).unsqueeze(1)
            for d, grid in zip(self.scored_distances(tokens), self.backbone.grids, strict=True)
        ]
        score_map, score = self.score_map(level_maps)
        return RLROutput(score_map, score, level_maps)

    def forward(self, images: Tensor) -> RLROutput:
        """Return score map, image score and level maps of images.

        Args:
            images: (B, 3, H, W) RGB: uint8, or floating point in [0, 1]. Floats in 0 to 255 are
                other images; they are not noticed.

        Raises:
            ValueError: Another shape, size or dtype.
        """
        return self.predict_tokens(self.tokens(images))

    def loss(self, images: Tensor) -> Tensor:
        """Return the training loss (eq. 13-14), a scalar; perturbed (eq. 3) in training mode.

        With ``diversity`` it has `diversity_loss` added, whatever the mode.

        Raises:
            ValueError: There is no image, or see `forward`.
        """
        if len(images) == 0:
            raise ValueError("images must be at least one to have a loss, got 0")
        tokens = self.tokens(images)
        noise = [torch.randn_like(t) for t in tokens] if self.training else None
        losses = [d.mean() for d in self.distances(tokens, noise)]
        if self.config.diversity > 0:
            losses.append(self.diversity_loss())
        return torch.stack(losses).sum()

    def diversity_loss(self) -> Tensor:
        """Return ``diversity`` times the similarity of the references, summed over the levels.

        The supplement says that the loss constrains the references' diversity, and not how; this
        is the simplest term that does, see `Reconstructor.reference_similarity`.

        Raises:
            ValueError: There is a single reference.
        """
        levels = self._reconstructors()
        similarity = torch.stack([level.reference_similarity() for level in levels]).sum()
        return self.config.diversity * similarity

    @classmethod
    def from_authors(
        cls, path: str | Path, config: RLRConfig | None = None, backend: Backend = "auto"
    ) -> RLRModel:
        """Build a model around the reconstructors of an authors' checkpoint.

        Args:
            path: The checkpoint, see `rlr_fast.models.authors.load_reconstructors`.
            config: Backbone, levels and image size; hidden widths, heads, windows and number of
                blocks are taken from the checkpoint, and the block is the paper's. Default: the
                ``authors`` preset.
            backend: See the class.

        Raises:
            ValueError: The checkpoint's levels are not the backbone's.
        """
        loaded = load_reconstructors(path, backend=backend)
        config = RLRConfig.preset("authors") if config is None else config
        model = cls(dataclasses.replace(config, patches=(1,), components=(0,)), backend=backend)
        levels = cast("list[Reconstructor]", list(loaded))
        ours = list(zip(model.backbone.channels, model.backbone.grids, strict=True))
        theirs = [(level.channels, level.grid) for level in levels]
        if ours != theirs:
            raise ValueError(
                f"config: the backbone gives levels of (channels, grid) {ours}, {path} has {theirs}"
            )
        model.levels = loaded
        model.config = dataclasses.replace(
            model.config,
            hidden=tuple(level.hidden for level in levels),
            heads=tuple(level.heads for level in levels),
            windows=tuple(level.window for level in levels),
            blocks=len(levels[0].blocks),
            ffn_ratio=cast(RLRBlock, levels[0].blocks[0]).fc1.out_features // levels[0].hidden,
            attention=("mlka", "lca"),
            residual=False,
            alpha=2.0,
            fusion="fixed",
            references=1,
            diversity=0.0,
        )
        return model.eval()
