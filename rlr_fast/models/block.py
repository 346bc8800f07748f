"""One level's network of RLR blocks around its learnable reference: tokens → rebuilt tokens."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlr_fast.config import REFERENCE_VALUES, Window, check_branches
from rlr_fast.functional import (
    Backend,
    PreparedReference,
    block_attention,
    local_cross_attention,
    prepare_reference,
)
from rlr_fast.models.attention import (
    CrossAttention,
    LocalCrossAttention,
    MaskedLearnableKeyAttention,
    SelfAttention,
)

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


class PreparedBlock(NamedTuple):
    """What a block of the paper makes of its parameters and the reference, for any images.

    Attributes:
        weight_in: (3C, C), tokens to [q_mlka | v_mlka | q_lca].
        bias_in: (3C,).
        reference: Keys and values of both attentions.
        weight_out: (C, 2C), the output maps side by side, each times its weight.
        bias_out: (C,).
        more: Keys and values (h, N, d) of LCA for each reference after the first.
    """

    weight_in: Tensor
    bias_in: Tensor
    reference: PreparedReference
    weight_out: Tensor
    bias_out: Tensor
    more: tuple[tuple[Tensor, Tensor], ...] = ()


class RLRBlock(nn.Module):
    """One block of eq. 4-5: ``Z = LN(MLKA(Y, R_h) + α·LCA(Y, R_h))``, ``Y' = LN(FFN(Z) + Z)``.

    The branches are configurable for the paper's Table 3: α weighs those whose values come from the
    reference (``lca``, ``cross``), and ``residual`` adds ``Y`` inside the first LayerNorm. The
    paper's pair of branches runs as one: one matrix product in, one out (unless a module of theirs
    was replaced or has hooks).

    The supplement's variants: learned fusion (eq. 17) has ``θ₁·MLKA + θ₂·LCA`` instead, with a pair
    of parameters ``theta`` a block; θ₁ weighs the branches that α does not. The paper gives them no
    initial values; here they start from 1 and α, as the fixed model. With K references LCA becomes
    the sum of ``LCA(Y, R_h^i)`` over them. The supplement changes LCA alone, so every other branch
    keeps a single reference, the first.

    Args:
        dim: Width C_h.
        heads: Attention heads.
        grid: Token grid (H, W).
        window: Odd side, or (height, width), of the attention window.
        attention: Names of the summed branches.
        alpha: α of eq. 4; the first value of θ₂.
        fusion: ``fixed`` weights 1 and α, or ``learned`` θ₁ and θ₂.
        ffn_ratio: Hidden width of the FFN over ``dim``.
        residual: Add the block's input to its attention.
        backend: Backend of the windowed operators.

    Raises:
        ValueError: There is no such branch or fusion, or learned fusion has not both a branch that
            θ₁ weighs and one that θ₂ weighs.
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
        fusion: str = "fixed",
        ffn_ratio: int = 4,
        residual: bool = False,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        check_branches(attention, fusion)
        self.attention = nn.ModuleDict(
            {name: _BRANCHES[name](dim, heads, grid, window, backend=backend) for name in attention}
        )
        self.weights = {name: alpha if name in REFERENCE_VALUES else 1.0 for name in attention}
        self.theta = nn.Parameter(torch.tensor([1.0, alpha])) if fusion == "learned" else None
        self.grid, self.window, self.heads, self.backend = grid, window, heads, backend
        self.residual = residual
        self.norm1 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, ffn_ratio * dim)
        self.fc2 = nn.Linear(ffn_ratio * dim, dim)
        self.norm2 = nn.LayerNorm(dim)

    def prepare(self, reference: Tensor) -> Tensor | PreparedBlock:
        """Do all that depends on no image, for the projected reference (N, C_h), or (K, N, C_h)."""
        if set(self.attention) != {"mlka", "lca"} or not _are_plain(self.attention):
            return reference
        mlka: Any = self.attention["mlka"]
        lca: Any = self.attention["lca"]
        (q_mlka, k_mlka, v_mlka), (q_lca, k_lca, v_lca) = (
            module.in_proj_weight.chunk(3) for module in (mlka, lca)
        )
        (qb_mlka, _, vb_mlka), (qb_lca, _, vb_lca) = (
            module.in_proj_bias.chunk(3) for module in (mlka, lca)
        )
        dim = vb_lca.shape[0]
        first, *others = _each(reference)
        # Keys have no bias, see `rlr_fast.models.attention`.
        projected = F.linear(first, torch.cat((k_mlka, k_lca, v_lca)), F.pad(vb_lca, (2 * dim, 0)))
        more = (
            F.linear(other, lca.in_proj_weight[dim:], F.pad(vb_lca, (dim, 0)))
            .unflatten(-1, (2, self.heads, -1))
            .permute(1, 2, 0, 3)
            for other in others
        )
        weigh, bias = self._weigh, lca.out_proj.bias
        if others:
            bias = (1 + len(others)) * bias  # one of each LCA in the sum
        return PreparedBlock(
            torch.cat((q_mlka, v_mlka, q_lca)),
            torch.cat((qb_mlka, vb_mlka, qb_lca)),
            prepare_reference(projected, self.heads, self.backend),
            torch.cat((weigh("mlka", mlka.out_proj.weight), weigh("lca", lca.out_proj.weight)), 1),
            weigh("mlka", mlka.out_proj.bias) + weigh("lca", bias),
            tuple((key, value) for key, value in more),
        )

    def forward(self, tokens: Tensor, prepared: Tensor | PreparedBlock) -> Tensor:
        """Map tokens (B, N, C_h) to tokens (B, N, C_h); ``prepared`` comes from `prepare`."""
        if isinstance(prepared, PreparedBlock):
            mixed = self._attend(tokens, prepared)
        else:
            mixed = self._sum_branches(tokens, prepared)
        z = self.norm1(tokens + mixed if self.residual else mixed)
        return self.norm2(z + self.fc2(F.gelu(self.fc1(z))))

    def _attend(self, tokens: Tensor, prepared: PreparedBlock) -> Tensor:
        projected = F.linear(tokens, prepared.weight_in, prepared.bias_in)
        attended = block_attention(projected, prepared.reference, self.grid, self.window)
        if prepared.more:
            masked, local = attended.chunk(2, -1)
            query = projected.chunk(3, -1)[2].unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for key, value in prepared.more:
                output = local_cross_attention(
                    query, key, value, self.grid, self.window, backend=self.backend
                )
                local = local + output.transpose(1, 2).flatten(2)
            attended = torch.cat((masked, local), -1)
        return F.linear(attended, prepared.weight_out, prepared.bias_out)

    def _sum_branches(self, tokens: Tensor, reference: Tensor) -> Tensor:
        references = _each(reference)
        outputs = (
            self._weigh(name, attend(tokens, seen))
            for name, attend in self.attention.items()
            for seen in (references if name == "lca" else references[:1])
        )
        return functools.reduce(torch.add, outputs)

    def _weigh(self, name: str, output: Tensor) -> Tensor:
        """Multiply a branch's output, or its output map, by 1 or α (eq. 4), by θ (eq. 17)."""
        if self.theta is not None:
            return self.theta[int(name in REFERENCE_VALUES)] * output
        weight = self.weights[name]
        return weight * output if weight != 1 else output


def _each(reference: Tensor) -> list[Tensor]:
    """Return each reference (N, C_h) of one (N, C_h) or several (K, N, C_h)."""
    return [reference] if reference.dim() == 2 else list(reference.unbind())


def _are_plain(attention: nn.ModuleDict) -> bool:
    """Whether parameters say all: no hook and no module of another's, such as an adapter."""
    branches: list[Any] = list(attention.values())
    linear = [module.out_proj for module in branches]
    return all(type(module) is nn.Linear for module in linear) and not any(
        hooks
        for module in (*branches, *linear)
        for hooks in (
            module._forward_pre_hooks,
            module._forward_hooks,
            module._backward_pre_hooks,
            module._backward_hooks,
        )
    )


class _Kept(NamedTuple):
    """Prepared blocks, with the parameters that they were made of."""

    versions: tuple[Any, ...]
    aliases: list[Tensor]
    blocks: list[Tensor | PreparedBlock]


class Reconstructor(nn.Module):
    """The network of one level: tokens (B, N, C) → reconstructed tokens (B, N, C).

    ``Y_0 = W_in F + P``, ``R_h = W_ref R + P``, K blocks, ``F_rec = W_out LN(Y_K)`` (eq. 4-6),
    where R is the learnable reference (N, C) and P fixed sine-cosine positions. Several references
    (K, N, C) share ``W_ref`` and P; see `RLRBlock` for what sees them.

    Args:
        channels: Feature channels C of the level.
        hidden: Width C_h.
        heads: Attention heads; divides ``hidden``.
        grid: Token grid (H, W), N = H·W.
        window: Odd side, or (height, width), of the attention window.
        blocks: Number of blocks K.
        attention: Branches of a block, see `RLRBlock`.
        alpha: α of eq. 4.
        fusion: See `RLRBlock`.
        references: Number of learnable references.
        ffn_ratio: Hidden width of the FFN over ``hidden``.
        residual: See `RLRBlock`.
        backend: Backend of the windowed operators.

    In inference, what depends on no image is kept from call to call, until a parameter is replaced
    or changed in place. A change behind autograd's back, ``parameter.data.copy_(…)``, is not seen:
    call `eval` after it.

    Raises:
        ValueError: ``attention``, ``fusion`` and ``references`` do not fit together.

    Attributes:
        reference: The learnable reference (N, C); (K, N, C) where there are several.
        grad_checkpointing: Compute each block again in backward instead of keeping what it made:
            less memory, about a third more time, the same gradients.
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
        fusion: str = "fixed",
        references: int = 1,
        ffn_ratio: int = 4,
        residual: bool = False,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        check_branches(attention, fusion, references)
        self.channels, self.hidden, self.heads = channels, hidden, heads
        self.grid, self.window = grid, window
        shape = (grid[0] * grid[1], channels)
        self.reference = nn.Parameter(
            torch.randn(shape if references == 1 else (references, *shape))
        )
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
                fusion=fusion,
                ffn_ratio=ffn_ratio,
                residual=residual,
                backend=backend,
            )
            for _ in range(blocks)
        )
        self.grad_checkpointing = False
        self._kept: _Kept | None = None
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
        y = self.token_in(tokens) + self.positions
        for block, prepared in zip(self.blocks, self._prepared_blocks(), strict=True):
            if self.grad_checkpointing and torch.is_grad_enabled():
                # There is no dropout, so no state of random numbers to keep.
                y = checkpoint(block, y, prepared, use_reentrant=False, preserve_rng_state=False)
            else:
                y = block(y, prepared)
        return self.token_out(self.norm(y))

    def reference_similarity(self) -> Tensor:
        """Return the mean cosine of the references' tokens, a scalar from -1 / (K - 1) to 1.

        It is taken over the tokens and over the pairs of references. A single one has no pair.

        Raises:
            ValueError: There is a single reference.
        """
        if self.reference.dim() == 2:
            raise ValueError("references must be at least 2 to be alike, got references=1")
        pairs = itertools.combinations(self.reference, 2)
        return torch.stack([F.cosine_similarity(*pair, dim=-1) for pair in pairs]).mean()

    def train(self, mode: bool = True) -> Reconstructor:
        """Set the mode as `torch.nn.Module.train` does; forget what inference has kept."""
        self._kept = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what inference has kept: a copy makes its own."""
        return self.__dict__ | {"_kept": None}

    def _prepared_blocks(self) -> list[Tensor | PreparedBlock]:
        """Prepare every block; in inference, only where a parameter has changed since."""
        kept = self._kept
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._prepare_blocks()
        parameters = list(self.parameters())
        if any(p.is_inference() or p.device.type == "meta" for p in parameters):
            return self._prepare_blocks()  # nothing tells when they change
        device = self.reference.device.type
        lowered = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        versions = (lowered, *(p._version for p in parameters))
        # The kept aliases hold their memory, so no other parameter can come to lie at its address.
        if (
            kept is None
            or kept.versions != versions
            or any(
                p.data_ptr() != q.data_ptr() for p, q in zip(parameters, kept.aliases, strict=True)
            )
        ):
            aliases = [p.detach() for p in parameters]
            self._kept = kept = _Kept(versions, aliases, self._prepare_blocks())
        return kept.blocks

    def _prepare_blocks(self) -> list[Tensor | PreparedBlock]:
        reference = self.reference_in(self.reference) + self.positions
        return [block.prepare(reference) for block in self.blocks]  # type: ignore[operator]
