"""The definition of both attention operators, with the whole N×N score matrix.

``output_i = Σ_j softmax_j(scale · q_i · k_j) v_j`` over the keys j that token i sees. Token i lies
at ``(i // W, i % W)``; its window holds the keys with ``|Δy| <= h // 2`` and ``|Δx| <= w // 2``,
clipped at the border. Local cross attention sees the keys inside the window (eq. 12), masked
learnable key attention the keys outside (eq. 9). A row without keys gives output and gradients 0.

Slow, short, any floating dtype, differentiable any number of times: the oracle of every faster
path.
"""

from __future__ import annotations

import torch
from torch import Tensor


def local_cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: tuple[int, int],
    window: tuple[int, int],
    scale: float,
) -> Tensor:
    """Attend to the keys inside the window: query (B, h, N, d), key and value ([B,] h, N, d)."""
    return _attention(query, key, value, inside_window(grid, window, query.device), scale)


def masked_learnable_key_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: tuple[int, int],
    window: tuple[int, int],
    scale: float,
) -> Tensor:
    """Attend to the keys outside the window: query (B, h, N, d), key and value ([B,] h, N, d)."""
    return _attention(query, key, value, ~inside_window(grid, window, query.device), scale)


def inside_window(
    grid: tuple[int, int], window: tuple[int, int], device: torch.device | str | None = None
) -> Tensor:
    """Return the mask (N, N), true where key j lies in the clipped window of token i."""
    token = torch.arange(grid[0] * grid[1], device=device)
    y, x = token // grid[1], token % grid[1]
    near_y = (y[:, None] - y).abs() <= window[0] // 2
    near_x = (x[:, None] - x).abs() <= window[1] // 2
    return near_y & near_x


def _attention(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float) -> Tensor:
    scores = query @ key.transpose(-2, -1) * scale
    # A softmax over no key is NaN, and NaN gradients survive a later masking: such a row is
    # computed over every key, and the second masking makes its weights 0.
    hidden = ~seen & seen.any(-1, keepdim=True)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1).masked_fill(~seen, 0)
    return weights @ value
