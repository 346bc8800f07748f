"""The portable path of both operators: PyTorch's fused attention over tiles, in linear memory.

All work is done by ``scaled_dot_product_attention`` with an additive mask:

- **MLKA**: chunks of ``QUERIES_PER_CALL`` queries against every key.
- **LCA**: the grid is cut into tiles of a few positions. A tile's queries see only its *halo*, the
  tile and ``window // 2`` positions around it. Keys and values shared over the batch let the
  images of a batch stand side by side in a tile's rows, so that the tile, and with it the halo,
  can be small.

Small masks are kept for the next step. MLKA's chunks see the same mask, moved by some rows of keys:
they share one, a little larger. A larger mask lives only as long as its call and is built again in
the backward pass: memory is linear in N in both passes. A mask is the sum or product of two tables,
one an axis, which is quick to build.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

# Fewer queries a call cost time (the fused kernel takes smaller blocks, and each call of the
# backward pass adds to all N key gradients); more cost memory: a mask has this many rows of N.
QUERIES_PER_CALL = 1024
# Largest mask of an LCA call, and largest of its masks kept for the next step (8 MiB in float32).
MASK_ENTRIES = 1 << 21
# Largest mask that MLKA's chunks share (128 MiB in float32; a grid of 64 x 64 needs 32).
SHARED_ENTRIES = 1 << 25
# What gathering one key of a halo costs, in scores: decides how small a tile pays.
KEY_COST = 96
TILE_SIDES = (1, 2, 4, 8, 16, 32)


def masked_learnable_key_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: tuple[int, int],
    window: tuple[int, int],
    scale: float,
) -> Tensor:
    """Attend to the keys outside the window: query (B, h, N, d), key and value ([B,] h, N, d)."""
    dtype = query.dtype
    query, key, value = (_computed(x) for x in (query, key, value))
    key, value = key.expand(query.shape), value.expand(query.shape)
    queries = query.split(QUERIES_PER_CALL, dim=2)
    starts = range(0, query.shape[2], QUERIES_PER_CALL)
    output = _attend(
        queries,
        [key] * len(queries),
        [value] * len(queries),
        [
            _OutsideWindow(grid, window, start, start + chunk.shape[2])
            for start, chunk in zip(starts, queries, strict=True)
        ],
        scale,
        dim=2,
    )
    if all(side // 2 >= length - 1 - side // 2 for side, length in zip(window, grid, strict=True)):
        output = output.masked_fill(_window_covers_grid(grid, window, query.device)[:, None], 0)
    return output.to(dtype)


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
    query, key, value = (_computed(x) for x in (query, key, value))
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


def _computed(tensor: Tensor) -> Tensor:
    """Return ``tensor`` in the dtype to compute in."""
    # PyTorch's fused attention on a CPU is up to five times slower in half precision than in
    # float32 for tiles as small as ours, most of all in its backward pass.
    half = tensor.dtype in (torch.bfloat16, torch.float16)
    return tensor.float() if half and tensor.device.type == "cpu" else tensor


def _tiled_local(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: tuple[int, int],
    window: tuple[int, int],
    scale: float,
) -> Tensor:
    """Attend with query (B, h, N, d) to key and value (h, N, d) inside the window."""
    batch, heads, tokens, width = query.shape
    if torch.compiler.is_compiling():
        # A traced batch may be a symbol, by which neither a tile nor a number of calls is chosen.
        known = type(batch) is int
        tiling = _best_tiling(grid, window, batch if known else 1)
    else:
        known, tiling = True, _remembered_tiling(grid, window, batch)
    (tiles_y, tile_y, pad_y, _), (tiles_x, tile_x, pad_x, _) = tiling
    rest_y, rest_x = tiles_y * tile_y - grid[0], tiles_x * tile_x - grid[1]

    def halos(x: Tensor) -> Tensor:
        """(h, N, d) → (tiles, h, keys of a halo, d); outside the grid zeros, which are masked."""
        x = x.unflatten(1, grid)
        x = F.pad(x, (0, 0, pad_x, pad_x + rest_x, pad_y, pad_y + rest_y))
        x = x.unfold(1, tile_y + 2 * pad_y, tile_y).unfold(2, tile_x + 2 * pad_x, tile_x)
        return rearrange(x, "h ny nx d ky kx -> (ny nx) h (ky kx) d")

    queries = query.unflatten(2, grid)
    if rest_y or rest_x:
        queries = F.pad(queries, (0, 0, 0, rest_x, 0, rest_y))
    queries = rearrange(
        queries, "b h (ny ty) (nx tx) d -> (ny nx) h (b ty tx) d", ty=tile_y, tx=tile_x
    )
    keys, values = halos(key), halos(value)
    tiles = len(queries)
    if known:
        tiles = max(1, MASK_ENTRIES // max(1, queries.shape[2] * keys.shape[2]))
    output = _attend(
        queries.split(tiles),
        keys.split(tiles),
        values.split(tiles),
        [
            _InsideWindow(grid, window, tiling, batch, start, min(start + tiles, len(queries)))
            for start in range(0, len(queries), tiles)
        ],
        scale,
        dim=0,
    )
    output = rearrange(
        output, "(ny nx) h (b ty tx) d -> b h (ny ty) (nx tx) d", ny=tiles_y, ty=tile_y, tx=tile_x
    )
    return output[:, :, : grid[0], : grid[1]].reshape(batch, heads, tokens, width)


def _attend(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    masks: Sequence[_OutsideWindow | _InsideWindow],
    scale: float,
    dim: int,
) -> Tensor:
    """Attend piece by piece and join the outputs along ``dim``."""
    outputs = []
    for query, key, value, geometry in zip(queries, keys, values, masks, strict=True):
        kept = _kept_mask(geometry, query)
        mask = geometry.build(query.dtype, query.device) if kept is None else kept
        # The compiler cannot trace the hooks, and decides itself what it computes again; tensors
        # without storage cannot be told apart by it.
        if kept is not None or len(masks) == 1 or not _has_storage(query):
            output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
        else:
            with _forgotten(mask, geometry):
                output = F.scaled_dot_product_attention(
                    query, key, value, attn_mask=mask, scale=scale
                )
        outputs.append(output)
    return torch.cat(outputs, dim)


def _forgotten(
    mask: Tensor, geometry: _OutsideWindow | _InsideWindow
) -> torch.autograd.graph.saved_tensors_hooks:
    """Make the graph keep the recipe of ``mask`` instead of its entries."""
    address, dtype, device = mask.data_ptr(), mask.dtype, mask.device

    def pack(saved: Tensor) -> Tensor | torch.Size:
        return saved.shape if saved.data_ptr() == address else saved

    def unpack(packed: Tensor | torch.Size) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        return geometry.build(dtype, device).expand(packed)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


@dataclass(frozen=True)
class _OutsideWindow:
    """The mask of MLKA for the queries ``start`` to ``stop``: (queries, N), additive."""

    grid: tuple[int, int]
    window: tuple[int, int]
    start: int
    stop: int

    def build(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        token = torch.arange(self.start, self.stop, device=device)
        key_y = torch.arange(self.grid[0], device=device)
        return _outside_window(token, key_y, self.grid[1], self.window, dtype).flatten(1)

    def kept(self, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """Return the mask as a part of the one that all chunks share, where that is small."""
        height, width = self.grid
        queries = min(QUERIES_PER_CALL, height * width)
        chunks = -(-height * width // queries)
        # Of the keys' rows, the lowest chunk sees those from 0 on, the highest those up to 0.
        rows = height if chunks == 1 else 2 * height - 1
        if (queries % width and chunks > 1) or queries * rows * width > SHARED_ENTRIES:
            return None
        shared = _shared_mask(self.grid, self.window, queries, rows, dtype, device)
        first = rows - height - self.start // width
        return shared[: self.stop - self.start, first : first + height].flatten(1)


def _outside_window(
    token: Tensor, key_y: Tensor, width: int, window: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """(queries, rows of keys, W): hidden where a key in a row ``key_y`` is in a token's window."""
    key_x = torch.arange(width, device=token.device)
    near_y = _near(token // width, key_y, window[0]).to(dtype) * _hidden(dtype)
    near_x = _near(token % width, key_x, window[1]).to(dtype)
    return near_y[:, :, None] * near_x[:, None, :]


@lru_cache(maxsize=8)
def _shared_mask(
    grid: tuple[int, int],
    window: tuple[int, int],
    queries: int,
    rows: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    with _outside_inference():
        token = torch.arange(queries, device=device)
        key_y = torch.arange(grid[0] - rows, grid[0], device=device)
        return _outside_window(token, key_y, grid[1], window, dtype)


# Of an axis: number of tiles, their length, the halo's margin, the grid's length.
_Axis = tuple[int, int, int, int]


@dataclass(frozen=True)
class _InsideWindow:
    """The mask of LCA for tiles ``start`` to ``stop``: (tiles, 1, B·positions, halo), additive."""

    grid: tuple[int, int]
    window: tuple[int, int]
    tiling: tuple[_Axis, _Axis]
    batch: int
    start: int
    stop: int

    def build(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        tile = torch.arange(self.start, self.stop, device=device)
        across = self.tiling[1][0]
        far_y = self._far(tile // across, 0, dtype)  # (tiles, tile_y, halo_y)
        far_x = self._far(tile % across, 1, dtype)  # (tiles, tile_x, halo_x)
        far_x = far_x[:, None, None, :, None, :].expand(-1, self.batch, -1, -1, -1, -1)
        # (tiles, B, tile_y, tile_x, halo_y, halo_x)
        return (far_y[:, None, :, None, :, None] + far_x).flatten(4).flatten(1, 3)[:, None]

    def kept(self, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """Return the mask, kept from an earlier call, where it is small and the only one."""
        (tiles_y, tile_y, pad_y, _), (tiles_x, tile_x, pad_x, _) = self.tiling
        queries, keys = tile_y * tile_x, (tile_y + 2 * pad_y) * (tile_x + 2 * pad_x)
        tiles = tiles_y * tiles_x
        if self.stop - self.start < tiles or tiles * self.batch * queries * keys > MASK_ENTRIES:
            return None
        return _remembered_mask(self, dtype, device)

    def _far(self, tile: Tensor, axis: int, dtype: torch.dtype) -> Tensor:
        _, side, pad, length = self.tiling[axis]
        first = tile[:, None] * side
        position = first + torch.arange(side, device=tile.device)
        key = first - pad + torch.arange(side + 2 * pad, device=tile.device)
        seen = _near(position, key, self.window[axis]) & ((key >= 0) & (key < length))[:, None, :]
        return (~seen).to(dtype) * _hidden(dtype)


def _near(position: Tensor, key: Tensor, side: int) -> Tensor:
    """(…, P) and (…, K) → (…, P, K): key within ``side // 2`` of the position, along one axis."""
    return (position[..., :, None] - key[..., None, :]).abs() <= side // 2


def _hidden(dtype: torch.dtype) -> float:
    # Finite: a row without keys, or of padding, must not give NaN. Twice this must fit the dtype.
    return -3e4 if dtype == torch.float16 else -1e30


def _kept_mask(geometry: _OutsideWindow | _InsideWindow, like: Tensor) -> Tensor | None:
    """Return a mask that is kept for later calls, or None."""
    # A tensor made while a graph is traced belongs to the trace.
    return geometry.kept(like.dtype, like.device) if _has_storage(like) else None


def _has_storage(tensor: Tensor) -> bool:
    """Whether a tensor has memory of its own, and is not traced."""
    traced = torch.compiler.is_compiling() or type(tensor.detach()) is not Tensor
    return not traced and tensor.device.type != "meta"


@lru_cache(maxsize=16)
def _remembered_mask(geometry: _InsideWindow, dtype: torch.dtype, device: torch.device) -> Tensor:
    with _outside_inference():
        return geometry.build(dtype, device)


@contextlib.contextmanager
def _outside_inference() -> Iterator[None]:
    """A mask made in inference mode could not be used in training later."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _window_covers_grid(
    grid: tuple[int, int], window: tuple[int, int], device: torch.device
) -> Tensor:
    """Return (N,): true for the tokens whose window holds every key."""
    covers_y, covers_x = (
        _near(
            torch.arange(length, device=device), torch.tensor([0, length - 1], device=device), side
        ).all(-1)
        for length, side in zip(grid, window, strict=True)
    )
    return (covers_y[:, None] & covers_x).flatten()


def _best_tiling(grid: tuple[int, int], window: tuple[int, int], batch: int) -> tuple[_Axis, _Axis]:
    """Choose the tiles of LCA: the least number of scores and gathered keys for the whole grid."""

    def axes(length: int, side: int) -> list[_Axis]:
        cut = [(-(-length // t), t, side // 2, length) for t in TILE_SIDES if t < length]
        return [*cut, (1, length, 0, length)]

    def cost(tiling: tuple[_Axis, _Axis]) -> int:
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
