"""One level's network of RLR blocks around its learnable reference: tokens → rebuilt tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlr_fast.attention import (
    CrossAttention,
    LocalCrossAttention,
    MaskedLearnableKeyAttention,
    SelfAttention,
)
from rlr_fast.config import ATTENTIONS, Window, suggest
from rlr_fast.functional import Backend

_BRANCHES = {
    "self": SelfAttention,
    "cross": CrossAttention,
    "mlka": MaskedLearnableKeyAttention,
    "lca": LocalCrossAttention,
}


def sincos_positions(grid: tuple[int, int], dim: int) -> Tensor:
    """Return fixed 2-D sine-cosine positions (N, dim): first half of the channels x, second half y.

    Within a half, channel ``2k`` is ``sin(p * f_k)`` and channel ``2k + 1`` is ``cos(p * f_k)``
    with ``f_k = exp(-ln(10000) * 2k / (dim / 2))`` and ``p`` the column or row, counted from 0.

    Raises:
        ValueError: ``dim`` is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"dim must be a multiple of 4, got {dim=}")
    half = dim // 2
    frequency = torch.exp(-math.log(10000.0) * torch.arange(0, half, 2, dtype=torch.float64) / half)
    rows, columns = torch.meshgrid(*(torch.arange(s) for s in grid), indexing="ij")

    def encode(position: Tensor) -> Tensor:
        angle = position.reshape(-1, 1) * frequency
        return torch.stack((angle.sin(), angle.cos()), -1).flatten(1)

    return torch.cat((encode(columns), encode(rows)), -1).float()


class RLRBlock(nn.Module):
    """One block of eq. 4-5: ``Z = LN(MLKA(Y, R_h) + α·LCA(Y, R_h))``, ``Y' = LN(FFN(Z) + Z)``.

    The branches are configurable for the paper's Table 3: α weighs those whose values come from the
    reference (``lca``, ``cross``), and ``residual`` adds ``Y`` inside the first LayerNorm.

    Args:
        dim: Width C_h.
        heads: Attention heads.
        grid: Token grid (H, W).
        window: Odd side, or (height, width), of the attention window.
        attention: Names of the summed branches.
        alpha: α of eq. 4.
        ffn_ratio: Hidden width of the FFN over ``dim``.
        residual: Add the block's input to its attention.
        backend: Backend of the windowed operators.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        grid: tuple[int, int],
        window: Window,
        *,
        attention: Sequence[str] = ("mlka", "lca"),
        alpha: float = 2.0,
        ffn_ratio: int = 4,
        residual: bool = False,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        for name in attention:
            if name not in _BRANCHES:
                raise ValueError(f"attention has no branch {name!r}; {suggest(name, ATTENTIONS)}")
        self.attention = nn.ModuleDict(
            {name: _BRANCHES[name](dim, heads, grid, window, backend=backend) for name in attention}
        )
        self.weights = {name: alpha if name in ("lca", "cross") else 1.0 for name in attention}
        self.residual = residual
        self.norm1 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, ffn_ratio * dim)
        self.fc2 = nn.Linear(ffn_ratio * dim, dim)
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, tokens: Tensor, reference: Tensor) -> Tensor:
        """Map tokens (B, N, C_h) with the projected reference (N, C_h) to tokens (B, N, C_h)."""
        mixed = tokens if self.residual else None
        for name, attend in self.attention.items():
            out = attend(tokens, reference)
            weight = self.weights[name]
            if mixed is None:
                mixed = out if weight == 1 else weight * out
            else:
                mixed = torch.add(mixed, out, alpha=weight)
        z = self.norm1(mixed)
        return self.norm2(z + self.fc2(F.gelu(self.fc1(z))))


class Reconstructor(nn.Module):
    """The network of one level: tokens (B, N, C) → reconstructed tokens (B, N, C).

    ``Y_0 = W_in F + P``, ``R_h = W_ref R + P``, K blocks, ``F_rec = W_out LN(Y_K)`` (eq. 4-6),
    where R is the learnable reference (N, C) and P fixed sine-cosine positions.

    Args:
        channels: Feature channels C of the level.
        hidden: Width C_h.
        heads: Attention heads; divides ``hidden``.
        grid: Token grid (H, W), N = H·W.
        window: Odd side, or (height, width), of the attention window.
        blocks: Number of blocks K.
        attention: Branches of a block, see `RLRBlock`.
        alpha: α of eq. 4.
        ffn_ratio: Hidden width of the FFN over ``hidden``.
        residual: See `RLRBlock`.
        backend: Backend of the windowed operators.
    """

    def __init__(
        self,
        channels: int,
        hidden: int,
        heads: int,
        grid: tuple[int, int],
        window: Window,
        *,
        blocks: int = 4,
        attention: Sequence[str] = ("mlka", "lca"),
        alpha: float = 2.0,
        ffn_ratio: int = 4,
        residual: bool = False,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.channels, self.hidden, self.heads = channels, hidden, heads
        self.grid, self.window = grid, window
        self.reference = nn.Parameter(torch.randn(grid[0] * grid[1], channels))
        self.token_in = nn.Linear(channels, hidden)
        self.reference_in = nn.Linear(channels, hidden)
        self.register_buffer("positions", sincos_positions(grid, hidden), persistent=False)
        self.positions: Tensor
        self.blocks = nn.ModuleList(
            RLRBlock(
                hidden,
                heads,
                grid,
                window,
                attention=attention,
                alpha=alpha,
                ffn_ratio=ffn_ratio,
                residual=residual,
                backend=backend,
            )
            for _ in range(blocks)
        )
        self.norm = nn.LayerNorm(hidden)
        self.token_out = nn.Linear(hidden, channels)

    def forward(self, tokens: Tensor) -> Tensor:
        """Reconstruct ``tokens`` (B, N, C) → (B, N, C).

        Raises:
            ValueError: ``tokens`` is not (B, H·W, C) of this level.
        """
        expected = (self.grid[0] * self.grid[1], self.channels)
        if tokens.dim() != 3 or tuple(tokens.shape[1:]) != expected:
            raise ValueError(
                f"tokens must be (B, {expected[0]}, {expected[1]}), got {tuple(tokens.shape)}"
            )
        reference = self.reference_in(self.reference) + self.positions
        y = self.token_in(tokens) + self.positions
        for block in self.blocks:
            y = block(y, reference)
        return self.token_out(self.norm(y))
