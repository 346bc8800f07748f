"""Pictures larger than a model's images: scored in overlapping tiles, blended into one map."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from rlr_fast.config import InferenceExecution, Sides, checked_tiles
from rlr_fast.data import resize_image
from rlr_fast.models.rlr import RLRModel
from rlr_fast.models.scoring import smooth, top_mean
from rlr_fast.pictures.batches import score_batches

# Weights are multiples of this: products of two, and their sums to 1, are exact in float32.
_WEIGHT_STEP = 2.0**-12


class TiledOutput(NamedTuple):
    """What `predict_tiled` says of a picture.

    Attributes:
        score_map: (H, W) float32 anomaly score of each pixel, not smoothed.
        score: Anomaly score of the picture, see `predict_tiled`.
    """

    score_map: Tensor
    score: float


def predict_tiled(
    model: RLRModel,
    image: Tensor,
    tile: Sides,
    overlap: Sides | None = None,
    *,
    batch_size: int = InferenceExecution.batch_size,
    precision: str = InferenceExecution.precision,
) -> TiledOutput:
    """Score a picture of any size at its own resolution.

    It is cut into the fewest tiles that cover it and share ``overlap`` pixels, spread evenly from
    border to border. Each is resized to the model's image size (Lanczos), scored, and its map, less
    the surround within the tile, resized back (bilinear). Where two tiles meet, the map goes
    linearly from one to the other; where one tile is alone it is that tile's own map. The score is
    that of a model whose image is as large as a tile: its Gaussians, and the mean of as many
    highest pixels.

    One batch of tiles is held at a time (two on a GPU).

    Args:
        model: A trained model, on its device.
        image: (3, H, W) RGB, uint8, on the host; at least a tile in both directions.
        tile: Pixels of a tile: side, or (height, width).
        overlap: Pixels that neighbors share at least; an eighth of the tile by default.
        batch_size: Tiles scored at once.
        precision: See `rlr_fast.pictures.batches.score_batches`.

    Raises:
        TypeError: ``image`` is no tensor.
        ValueError: An argument breaks its rule, or the picture is smaller than a tile.
    """
    tiles = checked_tiles(tile, overlap)
    if not isinstance(image, Tensor):
        raise TypeError(f"image must be a tensor, got {type(image).__name__}")
    if image.dim() != 3 or image.shape[0] != 3 or image.dtype != torch.uint8:
        raise ValueError(f"image must be (3, H, W) uint8, got {tuple(image.shape)} {image.dtype}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be positive, got {batch_size=}")
    height, width = image.shape[1:]
    misfit = tiles.misfit(height, width)
    if misfit is not None:
        raise ValueError(f"image: {misfit}")
    tops, lefts = tiles.starts(height, width)
    weights = [blend_weights(s, side) for s, side in zip((tops, lefts), tiles.size, strict=True)]
    cells = [(row, column) for row in range(len(tops)) for column in range(len(lefts))]
    h, w = tiles.size

    def batches() -> Iterator[tuple[list[tuple[int, int]], Tensor]]:
        for start in range(0, len(cells), batch_size):
            batch = cells[start : start + batch_size]
            parts = [
                image[:, tops[i] : tops[i] + h, lefts[j] : lefts[j] + w].contiguous()
                for i, j in batch
            ]
            if tiles.size != model.config.image_size:
                parts = [resize_image(part, model.config.image_size) for part in parts]
            yield batch, torch.stack(parts)

    score_map = torch.zeros(height, width)
    for places, scored in score_batches(model, batches(), precision):
        maps = torch.from_numpy(scored.maps)
        for (i, j), tile_map in zip(places, maps, strict=True):
            if tiles.size != model.config.image_size:
                tile_map = F.interpolate(
                    tile_map[None, None], tiles.size, mode="bilinear", antialias=True
                )[0, 0]
            part = score_map[tops[i] : tops[i] + h, lefts[j] : lefts[j] + w]
            part += weights[0][i][:, None] * weights[1][j] * tile_map

    def smoothed(values: NDArray[np.float32], sigma: float) -> NDArray[np.float32]:
        for axis, side in enumerate(tiles.size):
            values = smooth(values, sigma, side, axis)
        return values

    pixels = smoothed(score_map.numpy(), model.config.smoothing)
    if model.config.image_surround:
        pixels = pixels - smoothed(pixels, model.config.image_surround)
    score = top_mean(torch.from_numpy(pixels).flatten()[None], model.config.top_share, h * w)
    return TiledOutput(score_map, float(score))


def blend_weights(starts: list[int], tile: int) -> Tensor:
    """Return the weights (n, tile) of tiles along an axis; at each pixel they sum to exactly 1.

    A ramp leads from each tile to the next, over all that the two share; if they share more than
    half a tile, over its middle, so that no pixel mixes more than two of many tiles.
    """
    weights = torch.ones(len(starts), tile)
    for i in range(1, len(starts)):
        step = starts[i] - starts[i - 1]
        shared = tile - step
        ramp = shared if len(starts) == 2 else min(shared, step)
        lead = (shared - ramp) // 2
        rise = (torch.arange(ramp) + 0.5) / max(ramp, 1)
        rise = torch.round(rise / _WEIGHT_STEP) * _WEIGHT_STEP
        weights[i, :lead] = 0
        weights[i, lead : lead + ramp] = rise
        weights[i - 1, step + lead : step + lead + ramp] = 1 - rise
        weights[i - 1, step + lead + ramp :] = 0
    return weights
