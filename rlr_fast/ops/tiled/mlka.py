"""Masked learnable key attention (MLKA), over chunks of queries."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlr_fast.ops.tiled.masks import OutsideWindow, attend, computed, has_storage, mask_of, near

# Fewer queries a call cost time (the fused kernel takes smaller blocks, and each call of the
# backward pass adds to all N key gradients); more cost memory: a mask has this many rows of N.
QUERIES_PER_CALL = 1024
# The fewest of a chunk where only a band of rows needs a mask: from here on the fused kernel takes
# its largest blocks, and more queries have a higher band.
QUERIES_PER_BAND = 768

# What scaled_dot_product_attention calls on a CPU, with the log-sum-exp that it keeps to itself.
_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


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
    query, key, value = (computed(x) for x in (query, key, value))
    rows = math.ceil(grid[0] / max(1, math.prod(grid) // QUERIES_PER_BAND))
    banded = 2 * (rows + 2 * (window[0] // 2)) <= grid[0]  # else there is little to gain
    if banded and query.device.type == "cpu" and has_storage(query) and query.numel():
        cut = _Cut(grid, window, rows)
        output: Tensor = _Banded.apply(query, key, value, cut, scale)
    else:
        output = _chunked(query, key, value, grid, window, scale)
    if all(side // 2 >= length - 1 - side // 2 for side, length in zip(window, grid, strict=True)):
        output = output.masked_fill(_window_covers_grid(grid, window, query.device)[:, None], 0)
    return output.to(dtype)


def _chunked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: tuple[int, int],
    window: tuple[int, int],
    scale: float,
) -> Tensor:
    """Attend chunk by chunk, each with a mask of all its scores."""
    key, value = key.expand(query.shape), value.expand(query.shape)
    queries = query.split(QUERIES_PER_CALL, dim=2)
    starts = range(0, query.shape[2], QUERIES_PER_CALL)
    masks = [
        OutsideWindow(grid[1], window, start, start + chunk.shape[2], 0, grid[0])
        for start, chunk in zip(starts, queries, strict=True)
    ]
    calls = len(queries)
    return torch.cat(attend(queries, [key] * calls, [value] * calls, masks, scale), 2)


def _window_covers_grid(
    grid: tuple[int, int], window: tuple[int, int], device: torch.device
) -> Tensor:
    """Return (N,): true for the tokens whose window holds every key."""
    covers_y, covers_x = (
        near(
            torch.arange(length, device=device), torch.tensor([0, length - 1], device=device), side
        ).all(-1)
        for length, side in zip(grid, window, strict=True)
    )
    return (covers_y[:, None] & covers_x).flatten()


class _Band(NamedTuple):
    """A chunk of whole rows and its keys, which are counted on into a second copy of the grid.

    Attributes:
        queries: The chunk's tokens.
        near: The keys of the rows that a window of the chunk touches.
        far: All others, in the rows below and, in the second copy, above.
        mask: The part of `_Cut.mask` for queries and near keys.
    """

    queries: slice
    near: slice
    far: slice
    mask: tuple[slice, slice]


class _Cut(NamedTuple):
    """The cut of a grid into chunks of ``rows`` rows."""

    grid: tuple[int, int]
    window: tuple[int, int]
    rows: int

    def mask(self, query: Tensor) -> Tensor:
        """Return the mask of a chunk for its own rows of keys and all that its windows reach."""
        width, reach = self.grid[1], self.window[0] // 2
        return mask_of(
            OutsideWindow(width, self.window, 0, self.rows * width, -reach, self.rows + reach),
            query,
        )

    def bands(self) -> list[_Band]:
        """Return the chunks from top to bottom."""
        (height, width), reach = self.grid, self.window[0] // 2

        def tokens(first: int, last: int) -> slice:
            return slice(first * width, last * width)

        bands = []
        for first in range(0, height, self.rows):
            last = min(first + self.rows, height)
            top, bottom = max(0, first - reach), min(height, last + reach)
            hidden = tokens(0, last - first), tokens(top - first + reach, bottom - first + reach)
            bands.append(
                _Band(
                    tokens(first, last), tokens(top, bottom), tokens(bottom, height + top), hidden
                )
            )
        return bands


class _Banded(torch.autograd.Function):
    """Attention to a chunk's near and far keys in two calls, joined by their log-sum-exp.

    ``output = w · near + (1 - w) · far``, ``w = sigmoid(near_lse - far_lse)``. Only the near keys
    need a mask, which costs a third of a call. The fused backward pass takes weights from the
    log-sum-exp it is given: with that of both parts, and their joined output, it is exact for each.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, cut: _Cut, scale: float
    ) -> Tensor:
        # The operators below read the last axis as contiguous, whatever its stride.
        query = query if query.stride(-1) == 1 else query.contiguous()
        keys, values = (torch.cat((x, x), -2) for x in (key, value))
        every = (*query.shape[:2], -1, -1)
        all_keys, all_values, mask = keys.expand(every), values.expand(every), cut.mask(query)
        output, lse = _heads_inside(query), query.new_empty(query.shape[:-1])
        for queries, near_keys, far_keys, hidden in cut.bands():
            q = query[:, :, queries]
            (near_output, near_lse), (far_output, far_lse) = (
                _FLASH(q, all_keys[:, :, seen], all_values[:, :, seen], attn_mask=m, scale=scale)
                for seen, m in ((near_keys, mask[hidden]), (far_keys, None))
            )
            weight = torch.sigmoid(near_lse - far_lse)[..., None]
            torch.lerp(far_output, near_output, weight, out=output[:, :, queries])
            torch.logaddexp(near_lse, far_lse, out=lse[:, :, queries])
        ctx.save_for_backward(query, keys, values, output, lse)
        ctx.cut, ctx.scale = cut, scale
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, keys, values, output, lse = ctx.saved_tensors
        grad_output = grad_output.contiguous()
        every = (*query.shape[:2], -1, -1)
        all_keys, all_values, mask = keys.expand(every), values.expand(every), ctx.cut.mask(query)
        grad_query = _heads_inside(query).zero_()
        grad_keys, grad_values = torch.zeros_like(keys), torch.zeros_like(values)
        for queries, near_keys, far_keys, hidden in ctx.cut.bands():
            g, q, o, s = (x[:, :, queries] for x in (grad_output, query, output, lse))
            for seen, m in ((near_keys, mask[hidden]), (far_keys, None)):
                k, v = all_keys[:, :, seen], all_values[:, :, seen]
                dq, dk, dv = _FLASH_BACKWARD(
                    g, q, k, v, o, s, 0.0, False, attn_mask=m, scale=ctx.scale
                )
                grad_query[:, :, queries] += dq
                for total, part in ((grad_keys, dk), (grad_values, dv)):
                    total[..., seen, :] += part.sum_to_size(total[..., seen, :].shape)
        tokens = query.shape[2]
        grad_key, grad_value = (
            x[..., :tokens, :] + x[..., tokens:, :] for x in (grad_keys, grad_values)
        )
        return grad_query, grad_key, grad_value, None, None


def _heads_inside(like: Tensor) -> Tensor:
    """Return an empty tensor (B, h, N, d) that lies as (B, N, h, d), as an output map reads it."""
    return torch.empty_like(like.transpose(1, 2), memory_format=torch.contiguous_format).transpose(
        1, 2
    )
