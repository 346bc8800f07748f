"""The methods: each learns from the normal training images of all classes, and scores images.

PatchCore and PaDiM are anomalib's, on the feature maps that RLR gets from the same network.
"""

from __future__ import annotations

from typing import Any, Protocol
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers.coreset import farthest_first
from rlr_fast.models.backbone import Backbone

_TOP_SHARE = 0.01
# Distances held at a time.
_CHUNK = 2**26


class Method(Protocol):
    """A method that keeps what it learned."""

    def learn(self, images: Tensor) -> None:
        """Take a batch (B, 3, H, W) of normal images in."""

    def finish(self) -> None:
        """End learning."""

    def score(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return image scores (B,) and score maps (B, H, W)."""


@torch.no_grad()
def infer(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the image scores (B,) and the maps (B, H, W) of one of anomalib's models."""
    batch = model(images)
    return batch.pred_score.flatten(), batch.anomaly_map.squeeze(1)


class _Features(nn.Module):
    """The backbone as anomalib takes a feature extractor."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.out_dims = list(backbone.channels)
        self.layers = [f"level {i}" for i in range(len(self.out_dims))]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.layers, self.backbone(images), strict=True))


class _Anomalib:
    """One of anomalib's models without its trainer."""

    def __init__(self, module: Any, model: str, backbone: Backbone, **options: Any) -> None:
        features = _Features(backbone)
        with mock.patch.object(module, "TimmFeatureExtractor", lambda **_: features):
            self.model = getattr(module, model)(
                layers=features.layers, backbone=backbone.name, pre_trained=False, **options
            )
        self.model.train()

    @torch.no_grad()
    def learn(self, images: Tensor) -> None:
        self.model(images)

    def score(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return infer(self.model, images)


class PatchCore(_Anomalib):
    """Distance to the nearest of a coreset of the training patches."""

    def __init__(self, backbone: Backbone, coreset: float) -> None:
        from anomalib.models.image.patchcore import torch_model

        super().__init__(torch_model, "PatchcoreModel", backbone)
        self.coreset = coreset

    def finish(self) -> None:
        """End learning."""
        from anomalib.models.components.sampling import k_center_greedy

        # anomalib passes over all patches for each that it keeps, and tells a log of each.
        with mock.patch.object(k_center_greedy.KCenterGreedy, "select_coreset_idxs", _select):
            self.model.subsample_embedding(self.coreset)
        self.model.eval()


def _select(sampler: Any) -> list[int]:
    """Choose anomalib's coreset, from the same random projection and patch."""
    sampler.model.fit(sampler.embedding)
    # Distances after the projection P are those after R of P = QR, which has fewer rows.
    features = sampler.embedding @ torch.linalg.qr(sampler.model.sparse_random_matrix).R.T
    first = int(torch.randint(sampler.n_observations, (1,)))
    return farthest_first(features, sampler.coreset_size, first)


class PaDiM(_Anomalib):
    """Mahalanobis distance to a Gaussian for each place, of 100 channels."""

    def __init__(self, backbone: Backbone) -> None:
        from anomalib.models.image.padim import torch_model

        options = {"n_features": min(100, sum(backbone.channels))}
        super().__init__(torch_model, "PadimModel", backbone, **options)

    def finish(self) -> None:
        """End learning."""
        self.model.fit()
        self.model.eval()


class NearestNeighbors:
    """Mean over the levels of the cosine distance to the nearest training token, anywhere.

    The image score is the mean of the highest hundredth of the map's pixels.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self.banks: list[Any] = [[] for _ in backbone.channels]

    def learn(self, images: Tensor) -> None:
        """Take a batch in."""
        for bank, tokens in zip(self.banks, self._tokens(images), strict=True):
            bank.append(tokens.flatten(0, 1))

    def finish(self) -> None:
        """End learning."""
        self.banks = [torch.cat(bank) for bank in self.banks]

    def score(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores and maps."""
        maps = []
        for bank, tokens, grid in zip(
            self.banks, self._tokens(images), self.backbone.grids, strict=True
        ):
            flat = tokens.flatten(0, 1)
            rows = flat.split(max(1, _CHUNK // len(bank)))
            nearest = torch.cat([(1 - part @ bank.T).amin(1) for part in rows])
            level = nearest.view(len(images), 1, *grid)
            maps.append(F.interpolate(level, self.backbone.image_size, mode="bilinear"))
        score_maps = torch.stack(maps).mean(0).squeeze(1)
        pixels = score_maps.flatten(1)
        highest = pixels.topk(max(1, int(_TOP_SHARE * pixels.shape[1]))).values
        return highest.mean(1), score_maps

    def _tokens(self, images: Tensor) -> list[Tensor]:
        return [F.normalize(m.flatten(2).mT, dim=-1) for m in self.backbone(images)]
