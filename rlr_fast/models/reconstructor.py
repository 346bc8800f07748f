"""One level's network: tokens → reconstructed tokens, by blocks around a learnable reference."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlr_fast.config import Window, check_branches
from rlr_fast.functional import Backend, autocast_dtype
from rlr_fast.models.block import PreparedBlock, RLRBlock
from rlr_fast.models.preparation import Snapshot


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

    With ``patch`` p > 1, p × p neighboring tokens are joined into one of p²·C channels before
    ``W_in``, and parted again after ``W_out``: between them N is H·W / p², and C stands for p²·C.

    Args:
        channels: Feature channels C of the level.
        hidden: Width C_h.
        heads: Attention heads; divides ``hidden``.
        grid: Token grid (H, W), N = H·W.
        window: Odd side, or (height, width), of the attention window, in joined tokens.
        blocks: Number of blocks K.
        attention: Branches of a block, see `RLRBlock`.
        alpha: α of eq. 4.
        fusion: See `RLRBlock`.
        references: Number of learnable references.
        ffn_ratio: Hidden width of the FFN over ``hidden``.
        residual: See `RLRBlock`.
        patch: Side p of the square of tokens that are joined into one; divides H and W.
        backend: Backend of the windowed operators.

    Each call prepares the reference for itself, unless `prepare_for_inference` has done so before.

    Raises:
        ValueError: ``attention``, ``fusion`` and ``references`` do not fit together, ``hidden`` is
            not a multiple of 4, or ``patch`` does not divide ``grid``.
        BackendError: The backend has no operator for the width of a head.

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
        patch: int = 1,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        check_branches(attention, fusion, references)
        if hidden % 4:
            raise ValueError(f"hidden must be a multiple of 4, got {hidden=}")
        if patch < 1 or grid[0] % patch or grid[1] % patch:
            raise ValueError(
                f"patches must divide the height and width of their level's grid, got a patch of "
                f"{patch} for a grid of {grid[0]}x{grid[1]}: take patches of 1, or an image size "
                "whose grid they divide"
            )
        self.channels, self.hidden, self.heads = channels, hidden, heads
        self.grid, self.window, self.patch = grid, window, patch
        grid = (grid[0] // patch, grid[1] // patch)
        channels = channels * patch**2
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
        self._checked = False  # whether `RLRModel` has looked for changes, for compiled code
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
        y = tokens if self.patch == 1 else self._joined(tokens)
        y = self.token_in(y) + self.positions
        for block, prepared in zip(self.blocks, self._prepared_blocks(), strict=True):
            if self.grad_checkpointing and torch.is_grad_enabled():
                # There is no dropout, so no state of random numbers to keep.
                y = checkpoint(block, y, prepared, use_reentrant=False, preserve_rng_state=False)
            else:
                y = block(y, prepared)
        y = self.token_out(self.norm(y))
        return y if self.patch == 1 else self._parted(y)

    def _joined(self, tokens: Tensor) -> Tensor:
        """Return (B, N / p², p²·C) of tokens (B, N, C)."""
        height, p = self.grid[0] // self.patch, self.patch
        return rearrange(tokens, "b (h p w q) c -> b (h w) (p q c)", h=height, p=p, q=p)

    def _parted(self, joined: Tensor) -> Tensor:
        """Return (B, N, C) of joined tokens (B, N / p², p²·C)."""
        height, p = self.grid[0] // self.patch, self.patch
        return rearrange(joined, "b (h w) (p q c) -> b (h p w q) c", h=height, p=p, q=p)

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

        A call without gradients, under autocast as it is now, takes this up. Any other call
        prepares for itself, as without it: slower by a few small operations per block, and equal.

        A change ends the preparation: `train` and `eval`, a call with gradients (an optimizer may
        follow), a move to another device or dtype, weights loaded, replaced or changed in place,
        replaced modules, new hooks. Then calls prepare for themselves until this is called again.
        It writes into the same memory, so that a CUDA graph that reads it sees the new values.
        What leaves no trace, only this (or `eval`) makes seen: ``parameter.data.copy_(…)``, a
        write through ``numpy()``, a fused optimizer's step that no call came before, and another
        ``forward`` or plain attribute of a module, such as ``block.weights``.

        Compiled code cannot look for changes. It takes the preparation up where `RLRModel`
        looks before it calls (``model.compile()``) and where it holds the weights themselves
        (`torch.export`); what ``torch.compile(model)`` makes prepares in each call. So does a
        network whose tensors were made in inference mode, where changes are not counted.

        Raises:
            RuntimeError: A CUDA graph is being captured, or code is being compiled.
        """
        device = self.reference.device
        if torch.compiler.is_compiling():
            raise RuntimeError("prepare_for_inference must be called outside compiled code")
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("prepare_for_inference must be called before a CUDA graph's capture")
        if any(tensor.is_inference() for tensor in (*self.parameters(), *self.buffers())):
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
            and prepared.snapshot.holds()
        )

    @contextlib.contextmanager
    def checked_preparation(self) -> Iterator[None]:
        """Look for changes now; compiled code called inside may take the preparation up."""
        self._end_stale_preparation()
        self._checked = True
        try:
            yield
        finally:
            self._checked = False

    def _end_stale_preparation(self) -> None:
        prepared = self._prepared
        if prepared is None or not prepared.valid:
            return
        if torch.is_grad_enabled() or not prepared.snapshot.holds():
            self.end_preparation()

    def end_preparation(self) -> None:
        """Let calls prepare for themselves, until `prepare_for_inference` is called again."""
        if self._prepared is not None:
            self._prepared = self._prepared._replace(valid=False)

    def train(self, mode: bool = True) -> Reconstructor:
        """Set the mode as `torch.nn.Module.train` does; end the preparation."""
        self.end_preparation()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Reconstructor:
        self._prepared = None  # of another device or dtype
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the preparation and compiled code: a copy needs its own."""
        state: dict[str, Any] = super().__getstate__()
        return state | {"_prepared": None}

    def _replicate_for_data_parallel(self) -> Reconstructor:
        replica = super()._replicate_for_data_parallel()
        replica._prepared = None  # of another device
        return replica

    def _prepared_blocks(self) -> list[Tensor | PreparedBlock]:
        """Return the prepared blocks where they hold for this call, else prepare for it alone."""
        checked = True
        if torch.compiler.is_compiling():
            # What is_exporting() returns; PyTorch 2.11 traces the call itself as true everywhere.
            checked = self._checked or torch.compiler._is_exporting_flag
        else:
            self._end_stale_preparation()
        prepared = self._prepared
        if (
            prepared is not None
            and prepared.valid
            and checked
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
        own = [self, *blocks]
        # What computes their own parameters, where there is any: `torch.nn.utils.parametrize`.
        made_by = [
            module
            for owner in own
            if "parametrizations" in owner._modules
            for module in cast(nn.Module, owner.parametrizations).modules()
        ]
        return [*own, *self.reference_in.modules(), self.blocks, *attention, *made_by]


def _tensors(blocks: list[Tensor | PreparedBlock]) -> list[Tensor]:
    return [
        tensor
        for block in blocks
        for tensor in (block.tensors() if isinstance(block, PreparedBlock) else (block,))
    ]


def _are_alike(kept: list[Tensor | PreparedBlock], new: list[Tensor | PreparedBlock]) -> bool:
    """Return whether the new blocks can be written into the memory of those kept."""

    def layout(blocks: list[Tensor | PreparedBlock]) -> list[Any]:
        kinds: list[Any] = [
            (b.reference.path, b.reference.backend) if isinstance(b, PreparedBlock) else None
            for b in blocks
        ]
        return kinds + [(t.shape, t.dtype, t.device) for t in _tensors(blocks)]

    return layout(kept) == layout(new)
