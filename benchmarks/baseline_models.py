"""The model with another block: attention by PyTorch's own `nn.MultiheadAttention` function.

Parameters are those of `RLRModel`, so the result is the same: a key's bias, which that function
adds, changes no softmax.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import baselines
from rlr_fast import RLRModel
from rlr_fast.functional import window_pair
from rlr_fast.ops.dense import inside_window

AUTHORS, SDPA = "authors", "sdpa"
LABELS = {
    AUTHORS: "nn.MultiheadAttention with need_weights=True: N×N weights, both masks built in every "
    "call, the reference projected for every image",
    SDPA: "the same with need_weights=False: SDPA, masks built once",
}


def with_baseline_blocks(model: RLRModel, name: str) -> RLRModel:
    """Replace the blocks' forward by a baseline's, in place; return the model."""
    levels: Any = model.levels
    for level in levels:
        masks = None if name == AUTHORS else _masks(level.blocks[0], level.reference.device)
        for block in level.blocks:
            block.prepare = _unprepared
            block.forward = partial(_forward, block, masks)
    return model


def require_room(model: RLRModel, batch: int, step: bool, device: torch.device) -> None:
    """Refuse what would bring a CPU to swap: N×N weights of an attention, or of all for a step.

    Raises:
        torch.OutOfMemoryError: The N×N weights alone need more than is free.
    """
    levels: Any = model.levels
    sizes = [4 * batch * level.heads * len(level.reference) ** 2 for level in levels]
    # Scores, weights and one more of the largest; for a step also the weights of every attention.
    needed = 3 * max(sizes)
    if step:
        needed += sum(2 * len(level.blocks) * n for level, n in zip(levels, sizes, strict=True))
    baselines.require_room(needed, device)


def _unprepared(reference: Tensor) -> Tensor:
    return reference


def _masks(block: Any, device: torch.device) -> dict[str, Tensor]:
    """(N, N) float masks as that function takes them, -inf where a query does not see a key."""
    inside = inside_window(block.grid, window_pair(block.window), device)
    hidden = {"mlka": inside, "lca": ~inside}
    return {k: torch.zeros(m.shape, device=device).masked_fill_(m, -torch.inf)
            for k, m in hidden.items()}  # fmt: skip


def _forward(
    block: Any, masks: dict[str, Tensor] | None, tokens: Tensor, reference: Tensor
) -> Tensor:
    """The block of eq. 4-5: tokens (B, N, C), reference (N, C)."""
    y = tokens.transpose(0, 1)
    r = reference.unsqueeze(1).repeat(1, tokens.shape[0], 1)
    seen = _masks(block, tokens.device) if masks is None else masks
    total: Any = 0
    for name, module in block.attention.items():
        attended, _ = F.multi_head_attention_forward(
            y, r, y if name == "mlka" else r, module.dim, module.heads,
            module.in_proj_weight, module.in_proj_bias, None, None, False, 0.0,
            module.out_proj.weight, module.out_proj.bias, block.training, None,
            masks is None, seen[name],
        )  # fmt: skip
        total = total + block.weights[name] * attended
    z = block.norm1(total.transpose(0, 1))
    result: Tensor = block.norm2(z + block.fc2(F.gelu(block.fc1(z))))
    return result
