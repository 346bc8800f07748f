"""Attention piece by piece, and the additive masks of the pieces."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

# Largest mask of an LCA call, and largest that is kept for the next step (8 MiB in float32).
MASK_ENTRIES = 1 << 21

# Of an axis: number of tiles, their length, the halo's margin, the grid's length.
Axis = tuple[int, int, int, int]


@dataclass(frozen=True)
class OutsideWindow:
    """The mask of MLKA: hides the keys inside the window of the queries ``start`` to ``stop``.

    The keys are those of the rows ``top`` to ``bottom``, which may lie outside the grid.
    """

    width: int
    window: tuple[int, int]
    start: int
    stop: int
    top: int
    bottom: int

    @property
    def entries(self) -> int:
        """Return the number of entries."""
        return (self.stop - self.start) * (self.bottom - self.top) * self.width

    def build(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the mask (queries, keys)."""
        token = torch.arange(self.start, self.stop, device=device)
        key_y = torch.arange(self.top, self.bottom, device=device)
        key_x = torch.arange(self.width, device=device)
        near_y = near(token // self.width, key_y, self.window[0]).to(dtype) * _hidden(dtype)
        near_x = near(token % self.width, key_x, self.window[1]).to(dtype)
        return (near_y[:, :, None] * near_x[:, None, :]).flatten(1)


@dataclass(frozen=True)
class InsideWindow:
    """The mask of LCA: hides the keys outside the window of the tiles ``start`` to ``stop``."""

    grid: tuple[int, int]
    window: tuple[int, int]
    tiling: tuple[Axis, Axis]
    batch: int
    start: int
    stop: int

    @property
    def entries(self) -> int:
        """Return the number of entries."""
        (_, tile_y, pad_y, _), (_, tile_x, pad_x, _) = self.tiling
        queries, keys = tile_y * tile_x, (tile_y + 2 * pad_y) * (tile_x + 2 * pad_x)
        return (self.stop - self.start) * self.batch * queries * keys

    def build(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the mask (tiles, 1, B·positions, halo)."""
        tile = torch.arange(self.start, self.stop, device=device)
        across = self.tiling[1][0]
        far_y = self._far(tile // across, 0, dtype)  # (tiles, tile_y, halo_y)
        far_x = self._far(tile % across, 1, dtype)  # (tiles, tile_x, halo_x)
        far_x = far_x[:, None, None, :, None, :].expand(-1, self.batch, -1, -1, -1, -1)
        # (tiles, B, tile_y, tile_x, halo_y, halo_x)
        return (far_y[:, None, :, None, :, None] + far_x).flatten(4).flatten(1, 3)[:, None]

    def _far(self, tile: Tensor, axis: int, dtype: torch.dtype) -> Tensor:
        _, side, pad, length = self.tiling[axis]
        first = tile[:, None] * side
        position = first + torch.arange(side, device=tile.device)
        key = first - pad + torch.arange(side + 2 * pad, device=tile.device)
        seen = near(position, key, self.window[axis]) & ((key >= 0) & (key < length))[:, None, :]
        return (~seen).to(dtype) * _hidden(dtype)


Mask = OutsideWindow | InsideWindow


def computed(tensor: Tensor) -> Tensor:
    """Return ``tensor`` in the dtype to compute in."""
    # PyTorch's fused attention on a CPU is up to five times slower in half precision than in
    # float32 for tiles as small as ours, most of all in its backward pass.
    half = tensor.dtype in (torch.bfloat16, torch.float16)
    return tensor.float() if half and tensor.device.type == "cpu" else tensor


def near(position: Tensor, key: Tensor, side: int) -> Tensor:
    """(…, P) and (…, K) → (…, P, K): key within ``side // 2`` of the position, along one axis."""
    return (position[..., :, None] - key[..., None, :]).abs() <= side // 2


def _hidden(dtype: torch.dtype) -> float:
    # Finite: a row without keys, or of padding, must not give NaN. Twice this and a score must fit
    # the dtype, and no score may come near it.
    return -3e4 if dtype == torch.float16 else torch.finfo(dtype).min / 4


def attend(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    masks: Sequence[Mask],
    scale: float,
) -> list[Tensor]:
    """Attend piece by piece: queries (A, h, Q, d), keys and values (A, h, K, d)."""
    outputs = []
    for query, key, value, geometry in zip(queries, keys, values, masks, strict=True):
        if query.shape[1] == 0:  # of an empty batch; PyTorch 2.11 divides by the heads on a CPU
            outputs.append(query @ key.mT @ value)
            continue
        single = len(masks) == 1
        mask = mask_of(geometry, query) if single else geometry.build(query.dtype, query.device)
        # The compiler cannot trace the hooks, and decides itself what it computes again; tensors
        # without storage cannot be told apart by it.
        forget = not single and has_storage(query)
        with _forgotten(mask, geometry) if forget else contextlib.nullcontext():
            output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
        outputs.append(output)
    return outputs


def mask_of(geometry: Mask, query: Tensor) -> Tensor:
    """Return the mask for ``query``; a small one is kept for later calls."""
    # A tensor made while a graph is traced belongs to the trace.
    if has_storage(query) and geometry.entries <= MASK_ENTRIES:
        return _kept_mask(geometry, query.dtype, query.device)
    return geometry.build(query.dtype, query.device)


def _forgotten(mask: Tensor, geometry: Mask) -> torch.autograd.graph.saved_tensors_hooks:
    """Make the graph keep the recipe of ``mask`` instead of its entries."""
    address, dtype, device = mask.data_ptr(), mask.dtype, mask.device

    def pack(saved: Tensor) -> Tensor | torch.Size:
        return saved.shape if saved.data_ptr() == address else saved

    def unpack(packed: Tensor | torch.Size) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        return geometry.build(dtype, device).expand(packed)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


@lru_cache(maxsize=32)
def _kept_mask(geometry: Mask, dtype: torch.dtype, device: torch.device) -> Tensor:
    with _outside_inference():
        return geometry.build(dtype, device)


def has_storage(tensor: Tensor) -> bool:
    """Return whether a tensor has memory of its own, and is not traced or transformed."""
    # What `torch.func` transforms is a plain tensor by its type.
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return type(tensor.detach()) is Tensor and tensor.device.type != "meta"


@contextlib.contextmanager
def _outside_inference() -> Iterator[None]:
    """A mask made in inference mode could not be used in training later."""
    with torch.inference_mode(False), torch.no_grad():
        yield
