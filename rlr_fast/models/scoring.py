"""From original and reconstructed tokens to distance, loss, score map and image score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.fft import dct, idct
from scipy.ndimage import gaussian_filter1d
from torch import Tensor, nn

from rlr_fast.config import per_level
from rlr_fast.functional import Backend, kernels, refuse_transforms, resolve_backend


def distance(reconstructed: Tensor, original: Tensor, backend: Backend = "dense") -> Tensor:
    """Return each token's distance to its reconstruction: eq. 15-16, or 13-14 before the mean.

    ``mean_c (rec - org)^2 + 1 - cos(rec, org)``; a token of norm 0 has cosine 0.

    Args:
        reconstructed: (B, N, C).
        original: (B, N, C).
        backend: Where the attention is Triton's, so is this: a kernel that reads each input once.
            Else it is PyTorch's operators.

    Returns:
        (B, N), in float32 or wider.

    Raises:
        ValueError: The two are not of one shape (B, N, C), or not on one device.
        BackendError: The requested backend cannot run here.
        RuntimeError: The kernel has neither forward-mode nor second derivatives, nor those of
            `torch.func`.
    """
    if reconstructed.dim() != 3 or reconstructed.shape != original.shape:
        raise ValueError(
            "reconstructed and original must be of one shape (B, N, C), got "
            f"{tuple(reconstructed.shape)} and {tuple(original.shape)}"
        )
    if reconstructed.device != original.device:
        raise ValueError(
            "reconstructed and original must be on one device, got "
            f"{reconstructed.device} and {original.device}"
        )
    if resolve_backend(backend, reconstructed.device) == "triton":
        refuse_transforms(reconstructed, original)
        return kernels.token_distance(reconstructed, original)
    dtype = torch.promote_types(
        torch.promote_types(reconstructed.dtype, original.dtype), torch.float32
    )
    reconstructed, original = reconstructed.to(dtype), original.to(dtype)
    squared = (reconstructed - original).square().mean(-1)
    return squared + 1 - F.cosine_similarity(reconstructed, original, dim=-1)


def perturb(tokens: Tensor, strength: float, noise: Tensor) -> Tensor:
    """Return ``tokens + noise * |token|_2 / C * strength`` (eq. 3).

    Args:
        tokens: (B, N, C).
        strength: s; 0 leaves the tokens as they are.
        noise: Standard normal numbers, (B, N, C).
    """
    if strength == 0:
        return tokens
    scale = torch.linalg.vector_norm(tokens, dim=-1, keepdim=True) * (strength / tokens.shape[-1])
    return tokens + noise * scale


# Pixels of sigma from which the cosine transform of a picture is the faster filter.
_WIDE = 8


def smooth(values: NDArray[Any], smoothing: float, size: int, axis: int) -> NDArray[Any]:
    """Smooth along one axis by a Gaussian of the image score.

    Its sigma is ``smoothing * size / 256`` pixels; borders are mirrored, it is cut at 4 sigma.

    Args:
        values: An array of any shape.
        smoothing: Sigma in pixels at 256 px; 0 changes nothing.
        size: Pixels of an image of the model along the axis.
        axis: The axis.
    """
    if smoothing == 0:
        return values
    sigma = smoothing * size / 256
    smoothed: NDArray[Any]
    values = values if np.issubdtype(values.dtype, np.floating) else values.astype(np.float64)
    if sigma <= _WIDE or values.shape[axis] <= size:
        smoothed = gaussian_filter1d(values, sigma, axis=axis, mode="reflect")
    else:  # its time does not grow with sigma: mirrored borders are those of the cosine transform
        length = values.shape[axis]
        reach = np.arange(1, int(4 * sigma + 0.5) + 1)
        weights = np.exp(-0.5 * (reach / sigma) ** 2)
        waves = np.cos(np.pi / length * np.outer(np.arange(length), reach))
        gain = (1 + 2 * waves @ weights) / (1 + 2 * weights.sum())
        shape = [-1 if i == axis % values.ndim else 1 for i in range(values.ndim)]
        spectrum = dct(values, axis=axis) * gain.astype(values.dtype).reshape(shape)
        smoothed = idct(spectrum, axis=axis)
    return smoothed


def top_mean(values: Tensor, share: float, pixels: int) -> Tensor:
    """Return the mean of each row's highest values: ``share`` of ``pixels`` of them, at least one.

    Args:
        values: (B, N).
        share: From 0, which takes the maximum alone, to 1.
        pixels: Pixels of an image of the model.
    """
    return values.topk(min(max(1, round(share * pixels)), values.shape[1])).values.mean(1)


class ScoreMap(nn.Module):
    """Token distances of all levels → score map and image score (eq. 16).

    Each level's map is upsampled bilinearly; the score map is the mean over the levels of
    ``weight * (distance - offset)``, which is eq. 16 where weights are 1 and offsets 0, less what a
    wide Gaussian makes of it. The image score is the mean of the highest pixels after a Gaussian,
    less what a wider one makes of them. All sigmas grow with the image, see `smooth`.

    Args:
        image_size: (H, W) of the score map.
        smoothing: Sigma before the image score in pixels at 256 px; 0 leaves the map as it is.
        offsets: Of the levels' distances; one stands for all levels.
        weights: Of the levels; one stands for all levels.
        top_share: Share of the pixels that the image score is the mean of; 0 is their maximum.
        surround: Sigma of the map's wide Gaussian, in pixels at 256 px; 0 subtracts nothing.
        image_surround: The same of the image score's wider one.
        align_corners: See `torch.nn.functional.interpolate`.
    """

    def __init__(
        self,
        image_size: tuple[int, int],
        smoothing: float,
        offsets: Sequence[float] = (0.0,),
        weights: Sequence[float] = (1.0,),
        top_share: float = 0.0,
        surround: float = 0.0,
        image_surround: float = 0.0,
        align_corners: bool = True,
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.align_corners = align_corners
        self.offsets, self.weights, self.top_share = offsets, weights, top_share
        # A filter with its border rule as a matrix an axis: two small products, on any device.
        wide = {"surround": surround, "image_surround": image_surround}
        sigmas = {"blur": smoothing} | {name: sigma for name, sigma in wide.items() if sigma}
        self.filters = frozenset(sigmas)
        for filter_name, sigma in sigmas.items():
            for axis, size in zip("yx", image_size, strict=True):
                matrix = torch.from_numpy(smooth(np.eye(size), sigma, size, axis=0)).float()
                self.register_buffer(f"{filter_name}_{axis}", matrix, persistent=False)

    def forward(self, level_maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return ``score_map`` (B, 1, H, W) and ``score`` (B,) of ``level_maps`` [(B, 1, h, w)]."""
        levels = len(level_maps)
        maps = [
            F.interpolate(
                (level_map - offset) * weight,
                self.image_size,
                mode="bilinear",
                align_corners=self.align_corners,
            )
            for level_map, offset, weight in zip(
                level_maps,
                per_level(self.offsets, levels),
                per_level(self.weights, levels),
                strict=True,
            )
        ]
        score_map = torch.stack(maps).mean(0)
        score_map = score_map.to(torch.promote_types(score_map.dtype, torch.float32))
        with torch.autocast(score_map.device.type, enabled=False):
            if "surround" in self.filters:
                score_map = score_map - self._filtered("surround", score_map)
            smoothed = self._filtered("blur", score_map)
            if "image_surround" in self.filters:
                smoothed = smoothed - self._filtered("image_surround", smoothed)
        height, width = self.image_size
        return score_map, top_mean(smoothed.flatten(1), self.top_share, height * width)

    def _filtered(self, name: str, score_map: Tensor) -> Tensor:
        rows, columns = (getattr(self, f"{name}_{axis}").to(score_map.dtype) for axis in "yx")
        filtered: Tensor = rows @ score_map @ columns.T
        return filtered
