"""Local cross attention (LCA), over tiles of the grid and their halos."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from rlr_fast.ops.tiled import masks
from rlr_fast.ops.tiled.masks import Axis, InsideWindow, attend, computed

# What gathering one key of a halo costs, in scores: decides how small a tile pays.
KEY_COST = 96
TILE_SIDES = (1, 2, 4, 8, 16, 32)
# Keys that are gathered for a call, times their width (16 MiB in float32): larger tensors than the
# caches hold, and than the allocator keeps, cost more than they save calls.
HALO_ENTRIES = 1 << 22


def local_cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: tuple[int, int],
    window: tuple[int, int],
    scale: float,
) -> Tensor:
    """Attend to the keys inside the window: query (B, h, N, d), key and value ([B,] h, N, d)."""
    dtype = query.dtype
    query, key, value = (computed(x) for x in (query, key, value))
    if key.dim() == 3 and value.dim() == 3:
        return _tiled_local(query, key, value, grid, window, scale).to(dtype)
    # An image with keys of its own shares them with no other: images become heads of one image.
    output = _tiled_local(
        query.flatten(0, 1)[None],
        key.expand(query.shape).flatten(0, 1),
        value.expand(query.shape).flatten(0, 1),
        grid,
        window,
        scale,
    )
    return output.view(query.shape).to(dtype)


def _tiled_local(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: tuple[int, int],
    window: tuple[int, int],
    scale: float,
) -> Tensor:
    """Attend with query (B, h, N, d) to key and value (h, N, d) inside the window.

    The images of a batch stand side by side in a tile's rows, as they share keys and values: so the
    tile, and with it the halo, can be small.
    """
    batch, heads, tokens, width = query.shape
    # A traced batch may be a symbol, by which neither a tile nor a number of calls is chosen.
    known = type(batch) is int
    if torch.compiler.is_compiling():
        tiling = _best_tiling(grid, window, batch if known else 1)
    else:
        tiling = _remembered_tiling(grid, window, batch)
    (tiles_y, tile_y, pad_y, _), (tiles_x, tile_x, pad_x, _) = tiling
    rest_y, rest_x = tiles_y * tile_y - grid[0], tiles_x * tile_x - grid[1]
    halo_y, halo_x = tile_y + 2 * pad_y, tile_x + 2 * pad_x

    def padded(x: Tensor) -> Tensor:
        """(h, N, d) → (h, H', W', d): outside the grid zeros, which are masked."""
        return F.pad(x.unflatten(1, grid), (0, 0, pad_x, pad_x + rest_x, pad_y, pad_y + rest_y))

    def halos(x: Tensor, rows: slice) -> Tensor:
        """(h, H', W', d) → (h, ny, nx, d, halo_y, halo_x) of some rows of tiles."""
        # Cut before it is unfolded, or the gradient of a cut is all halos.
        x = x[:, rows.start * tile_y : rows.stop * tile_y + 2 * pad_y]
        return x.unfold(1, halo_y, tile_y).unfold(2, halo_x, tile_x)

    queries = query.unflatten(2, grid)
    if rest_y or rest_x:
        queries = F.pad(queries, (0, 0, 0, rest_x, 0, rest_y))
    queries = queries.unflatten(3, (tiles_x, tile_x)).unflatten(2, (tiles_y, tile_y))
    keys, values = padded(key), padded(value)
    scores = batch * tile_y * tile_x * halo_y * halo_x  # of a tile
    groups = [_Group(slice(0, tiles_y))]
    if known and tiles_y * tiles_x * scores > masks.MASK_ENTRIES:
        groups = _groups(
            tiling[0], HALO_ENTRIES // max(1, heads * tiles_x * halo_y * halo_x * width)
        )
    cut = queries.split([g.rows.stop - g.rows.start for g in groups], dim=2)
    outputs = []
    for (rows, like), part in zip(groups, cut, strict=True):
        # Rows of tiles that see the same mask become heads.
        to = "(ny nx) h" if like is None else "nx (ny h)"
        q = rearrange(part, f"b h ny ty nx tx d -> {to} (b ty tx) d")
        k, v = (
            rearrange(halos(x, rows), f"h ny nx d ky kx -> {to} (ky kx) d") for x in (keys, values)
        )
        tiles = max(1, masks.MASK_ENTRIES // max(1, scores)) if known else len(q)
        first = (rows.start if like is None else like) * tiles_x
        tile_masks = [
            InsideWindow(
                grid, window, tiling, batch, first + start, first + min(start + tiles, len(q))
            )
            for start in range(0, len(q), tiles)
        ]
        output = torch.cat(
            attend(q.split(tiles), k.split(tiles), v.split(tiles), tile_masks, scale)
        )
        outputs.append(
            rearrange(
                output,
                f"{to} (b ty tx) d -> b h ny ty nx tx d",
                ny=rows.stop - rows.start,
                h=heads,
                ty=tile_y,
                tx=tile_x,
            )
        )
    output = torch.cat(outputs, 2).flatten(4, 5).flatten(2, 3)
    return output[:, :, : grid[0], : grid[1]].reshape(batch, heads, tokens, width)


class _Group(NamedTuple):
    """Rows of tiles for one call; ``like``: the row whose mask all of them have, if they do."""

    rows: slice
    like: int | None = None


def _groups(axis: Axis, most: int) -> list[_Group]:
    """Cut the rows of tiles: those at the border, and up to ``most`` at once inside."""
    tiles, side, pad, length = axis
    top, bottom = -(-pad // side), (length - pad) // side
    if bottom - top < 2:
        return [_Group(slice(0, tiles))]
    inside = range(top, bottom, max(1, most))
    groups = [
        _Group(slice(0, top)),
        *(_Group(slice(row, min(row + inside.step, bottom)), top) for row in inside),
        _Group(slice(bottom, tiles)),
    ]
    return [group for group in groups if group.rows.start < group.rows.stop]


def _best_tiling(grid: tuple[int, int], window: tuple[int, int], batch: int) -> tuple[Axis, Axis]:
    """Choose the tiles of LCA: the least number of scores and gathered keys for the whole grid."""

    def axes(length: int, side: int) -> list[Axis]:
        cut = [(-(-length // t), t, side // 2, length) for t in TILE_SIDES if t < length]
        return [*cut, (1, length, 0, length)]

    def cost(tiling: tuple[Axis, Axis]) -> int:
        (tiles_y, tile_y, pad_y, _), (tiles_x, tile_x, pad_x, _) = tiling
        halo = (tile_y + 2 * pad_y) * (tile_x + 2 * pad_x)
        return tiles_y * tiles_x * halo * (batch * tile_y * tile_x + KEY_COST)

    rows, columns = axes(grid[0], window[0]), axes(grid[1], window[1])
    best, least = (rows[0], columns[0]), cost((rows[0], columns[0]))
    for tiling in ((y, x) for y in rows for x in columns):
        found = cost(tiling)  # not min(): the compiler traces it with no key
        if found < least:
            best, least = tiling, found
    return best


_remembered_tiling = lru_cache(maxsize=64)(_best_tiling)
