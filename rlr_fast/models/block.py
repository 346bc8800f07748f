"""One block of RLR, and what it computes from its parameters and the reference for any images."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
from rlr_fast.models.preparation import hooks

_BRANCHES = {
    "self": SelfAttention,
    "cross": CrossAttention,
    "mlka": MaskedLearnableKeyAttention,
    "lca": LocalCrossAttention,
}


class PreparedBlock(NamedTuple):
    """What a block of the paper computes from its parameters and the reference, for any images.

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

    def tensors(self) -> list[Tensor]:
        """Return every tensor of it, in a fixed order."""
        keys, value, bound, *_ = self.reference
        tensors = [self.weight_in, self.bias_in, self.weight_out, self.bias_out, keys, value]
        tensors += [] if bound is None else [bound]
        return tensors + [tensor for pair in self.more for tensor in pair]

    def lowered(self, dtype: torch.dtype | None) -> PreparedBlock:
        """Return it with the weights in autocast's dtype, to which every call would cast them."""

        def cast(tensor: Tensor) -> Tensor:
            return tensor if dtype is None or tensor.dtype == torch.float64 else tensor.to(dtype)

        return self._replace(
            weight_in=cast(self.weight_in),
            bias_in=cast(self.bias_in),
            weight_out=cast(self.weight_out),
            bias_out=cast(self.bias_out),
        )


class RLRBlock(nn.Module):
    """One block of eq. 4-5: ``Z = LN(MLKA(Y, R_h) + α·LCA(Y, R_h))``, ``Y' = LN(FFN(Z) + Z)``.

    The branches are configurable for the paper's Table 3: α weighs those whose values come from the
    reference (``lca``, ``cross``), and ``residual`` adds ``Y`` inside the first LayerNorm. The
    paper's pair of branches runs as one: one matrix product in, one out (unless a module of theirs,
    or its ``forward``, was replaced, or has hooks).

    The supplement's variants: learned fusion (eq. 17) has ``θ₁·MLKA + θ₂·LCA`` instead, with a pair
    of parameters ``theta`` per block; θ₁ weighs the branches that α does not. The paper gives no
    initial values; here they are 1 and α, as in the fixed model. With K references LCA becomes
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
        BackendError: The backend has no operator for the width of a head.
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
    """Return whether parameters say all: no hook, and nothing foreign such as an adapter."""
    branches: list[Any] = list(attention.values())
    if any(type(module) not in _BRANCHES.values() for module in branches):
        return False
    linear = [module.out_proj for module in branches]
    return all(type(module) is nn.Linear and module.bias is not None for module in linear) and all(
        "forward" not in vars(module) and not any(hooks(module)) for module in (*branches, *linear)
    )
