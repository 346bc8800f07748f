"""Multi-head attention modules between tokens and the learnable reference.

Each has the parameters of `torch.nn.MultiheadAttention` (``in_proj_weight``, ``in_proj_bias``,
``out_proj``), by the same names and with the same initial values.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from rlr_fast.functional import (
    Backend,
    local_cross_attention,
    masked_learnable_key_attention,
    require_head_width,
    unsupported_reason,
    window_pair,
)


class _Attention(nn.Module):
    """Projections, heads and output map; a subclass says what is projected and what is seen.

    Args:
        dim: Width C of tokens and reference.
        heads: Number of heads; divides ``dim``.
        grid: Token grid (H, W), N = H·W.
        window: Odd side, or (height, width), of the attention window in tokens.
        backend: Backend of the windowed operators, see `rlr_fast.functional`.

    Raises:
        ValueError: An argument breaks a rule above.
        BackendError: The backend has no operator for the head width C / h.
    """

    windowed = True

    def __init__(
        self,
        dim: int,
        heads: int,
        grid: tuple[int, int],
        window: int | Sequence[int],
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"heads must be positive and divide dim, got {heads=} and {dim=}")
        unsupported_reason(backend, "cpu")  # refuses a name that is no backend
        if self.windowed:
            require_head_width(backend, dim // heads)
        self.dim, self.heads, self.grid = dim, heads, grid
        self.window, self.backend = window_pair(window), backend
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the initial values of `torch.nn.MultiheadAttention`."""
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.in_proj_bias)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, tokens: Tensor, reference: Tensor) -> Tensor:
        """Attend with tokens (B, N, C) and reference (N, C); returns (B, N, C).

        Raises:
            ValueError: ``tokens`` or ``reference`` has another shape.
        """
        expected = (self.grid[0] * self.grid[1], self.dim)
        if tokens.dim() != 3 or tuple(tokens.shape[1:]) != expected:
            raise ValueError(
                f"tokens must be (B, {expected[0]}, {expected[1]}), got {tuple(tokens.shape)}"
            )
        if tuple(reference.shape) != expected:
            raise ValueError(f"reference must be {expected}, got {tuple(reference.shape)}")
        sources = self._sources(tokens, reference)
        query_bias, _, value_bias = self.in_proj_bias.chunk(3)
        # A key's bias adds one score to all keys of a row, and no softmax sees that. Left out, its
        # gradient is exactly 0, not rounding noise that Adam would turn into steps of full size.
        biases = (query_bias, None, value_bias)
        # (B, h, N, d) from tokens; (h, N, d) from the reference, which is projected once a batch.
        query, key, value = (
            rearrange(F.linear(source, weight, bias), "... n (h d) -> ... h n d", h=self.heads)
            for source, weight, bias in zip(
                sources, self.in_proj_weight.chunk(3), biases, strict=True
            )
        )
        output = self._attend(query, key, value)
        return self.out_proj(rearrange(output, "b h n d -> b n (h d)"))

    def _sources(self, tokens: Tensor, reference: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what query, key and value are projected from."""
        return tokens, reference, reference

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend to every key: query (B, h, N, d), key and value ([B,] h, N, d)."""
        return F.scaled_dot_product_attention(
            query, key.expand(query.shape), value.expand(query.shape)
        )

    def extra_repr(self) -> str:
        """Return the arguments, for ``print(module)``."""
        text = f"dim={self.dim}, heads={self.heads}, grid={self.grid}"
        return f"{text}, window={self.window}, backend={self.backend!r}" if self.windowed else text


class LocalCrossAttention(_Attention):
    """LCA (eq. 10-12): queries from tokens, keys and values from the reference, in the window."""

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return local_cross_attention(
            query, key, value, self.grid, self.window, backend=self.backend
        )


class MaskedLearnableKeyAttention(_Attention):
    """MLKA (eq. 7-9): queries, values from tokens, keys from the reference, outside the window."""

    def _sources(self, tokens: Tensor, reference: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return tokens, reference, tokens

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return masked_learnable_key_attention(
            query, key, value, self.grid, self.window, backend=self.backend
        )


class CrossAttention(_Attention):
    """Queries from tokens, keys and values from the reference; every key is seen (Table 3).

    ``window`` and ``backend`` are taken so that every branch of a block is made alike; neither
    matters.
    """

    windowed = False


class SelfAttention(_Attention):
    """Queries, keys and values from tokens; every key is seen (Table 3).

    ``window`` and ``backend`` are taken so that every branch of a block is made alike; neither
    matters.
    """

    windowed = False

    def _sources(self, tokens: Tensor, reference: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return tokens, tokens, tokens
