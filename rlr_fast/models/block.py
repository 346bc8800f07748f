"""One level's network of RLR blocks around its learnable reference: tokens → rebuilt tokens."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

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
from rlr_fast.models.preparation import Snapshot, autocast_dtype, hooks

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
        keys, value, bound, _ = self.reference
        found = [self.weight_in, self.bias_in, self.weight_out, self.bias_out, keys, value]
        found += [] if bound is None else [bound]
        return found + [tensor for pair in self.more for tensor in pair]

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
    """Return whether parameters say all: no hook and no foreign module, such as an adapter."""
    branches: list[Any] = list(attention.values())
    linear = [module.out_proj for module in branches]
    return all(type(module) is nn.Linear for module in linear) and not any(
        table for module in (*branches, *linear) for table in hooks(module)
    )


class _Prepared(NamedTuple):
    """The blocks of a network, prepared for inference.

    Attributes:
        blocks: What `RLRBlock.prepare` returned for each.
        snapshot: The state that they were made from.
        dtype: Autocast's dtype then, None where it was off.
        valid: Whether nothing has ended the preparation; its memory is kept for the next one.
    """

    blocks: list[Tensor | PreparedBlock]
    snapshot: Snapshot
    dtype: torch.dtype | None
    valid: bool


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

    Each call prepares the reference for itself, unless `prepare_for_inference` has done so before.

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
        self._prepared: _Prepared | None = None
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

    def prepare_for_inference(self) -> Reconstructor:
        """Compute now, for later calls, what depends on no image; return the network.

        Calls without gradients, under autocast as it is now, take it up; so does code that is
        compiled from here on. All others prepare for themselves, as without it: slower, and equal.

        A change ends it, never makes it stale: `train` and `eval`, a call with gradients (an
        optimizer may follow), a move to another device or dtype, loaded, replaced or changed
        weights, replaced modules and new hooks. Call this again then; it writes into the same
        memory, so that a CUDA graph that reads it goes on with the new values. Two changes leave
        no trace and need that call: ``parameter.data.copy_(…)`` and, without a call of the network
        before it, the step of a fused optimizer. Compiled code looks for changes only where
        `RLRModel` is called.

        Parameters made in inference mode count no changes: then each call still prepares.

        Raises:
            RuntimeError: A CUDA graph is being captured, or code is being compiled.
        """
        device = self.reference.device
        if torch.compiler.is_compiling():
            raise RuntimeError("prepare_for_inference must be called outside compiled code")
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("prepare_for_inference must be called before a CUDA graph's capture")
        if any(parameter.is_inference() for parameter in self.parameters()):
            return self
        dtype = autocast_dtype(device)
        with torch.inference_mode(False), torch.no_grad():
            snapshot = Snapshot(self._modules_prepared_from())
            blocks = [
                block.lowered(dtype) if isinstance(block, PreparedBlock) else block
                for block in self._prepare_blocks()
            ]
            if self._prepared is not None and _are_alike(self._prepared.blocks, blocks):
                for kept, new in zip(
                    _tensors(self._prepared.blocks), _tensors(blocks), strict=True
                ):
                    kept.copy_(new)
                blocks = self._prepared.blocks
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # other streams may read it from now on
        self._prepared = _Prepared(blocks, snapshot, dtype, valid=True)
        return self

    def is_prepared(self) -> bool:
        """Return whether a call without gradients would take up what was prepared."""
        prepared = self._prepared
        return (
            prepared is not None
            and prepared.valid
            and prepared.dtype == autocast_dtype(self.reference.device)
            and (torch.compiler.is_compiling() or prepared.snapshot.holds())
        )

    def end_stale_preparation(self) -> None:
        """End a preparation that this call, or a change before it, makes unsafe to take up."""
        prepared = self._prepared
        if prepared is None or not prepared.valid:
            return
        if torch.is_grad_enabled() or not prepared.snapshot.holds():
            self._prepared = prepared._replace(valid=False)

    def train(self, mode: bool = True) -> Reconstructor:
        """Set the mode as `torch.nn.Module.train` does; end the preparation."""
        if self._prepared is not None:
            self._prepared = self._prepared._replace(valid=False)
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Reconstructor:
        self._prepared = None  # of another device or dtype
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the preparation: a copy needs its own."""
        return self.__dict__ | {"_prepared": None}

    def _replicate_for_data_parallel(self) -> Reconstructor:
        replica = super()._replicate_for_data_parallel()
        replica._prepared = None  # of another device
        return replica

    def _prepared_blocks(self) -> list[Tensor | PreparedBlock]:
        """Return the prepared blocks where they hold for this call, else prepare for it alone."""
        if not torch.compiler.is_compiling():
            self.end_stale_preparation()
        prepared = self._prepared
        if (
            prepared is not None
            and prepared.valid
            and not torch.is_grad_enabled()
            and prepared.dtype == autocast_dtype(self.reference.device)
        ):
            return prepared.blocks
        return self._prepare_blocks()

    def _prepare_blocks(self) -> list[Tensor | PreparedBlock]:
        reference = self.reference_in(self.reference) + self.positions
        return [block.prepare(reference) for block in self.blocks]  # type: ignore[operator]

    def _modules_prepared_from(self) -> list[nn.Module]:
        """Return every module that `_prepare_blocks` reads."""
        blocks = cast("list[RLRBlock]", list(self.blocks))
        attention = [module for block in blocks for module in block.attention.modules()]
        return [self, *self.reference_in.modules(), self.blocks, *blocks, *attention]


def _tensors(blocks: list[Tensor | PreparedBlock]) -> list[Tensor]:
    return [
        tensor
        for block in blocks
        for tensor in (block.tensors() if isinstance(block, PreparedBlock) else (block,))
    ]


def _are_alike(kept: list[Tensor | PreparedBlock], new: list[Tensor | PreparedBlock]) -> bool:
    """Return whether the new blocks can be written into the memory of those kept."""

    def layout(blocks: list[Tensor | PreparedBlock]) -> list[Any]:
        kinds = [b.reference.path if isinstance(b, PreparedBlock) else None for b in blocks]
        return kinds + [(t.shape, t.dtype, t.device) for t in _tensors(blocks)]

    return layout(kept) == layout(new)
