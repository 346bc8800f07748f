"""Import of checkpoints of the authors' implementation of RLR."""

from __future__ import annotations

import codecs
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rlr_fast.config import Window
from rlr_fast.functional import Backend, window_pair
from rlr_fast.models.reconstructor import Reconstructor

_WINDOW_OF_GRID = {64: 11, 32: 7, 16: 5}

_LEVEL_NAMES = {
    "embedding.project_embedding.project.": "token_in.",
    "ref_mca_embedding.project_embedding.project.": "reference_in.",
    "ref_mca": "reference",
    "encoder.encode_layers.": "blocks.",
    "encoder.norm.": "norm.",
    "projection.": "token_out.",
}
_BLOCK_NAMES = {"mca.": "attention.lca.", "nsa.": "attention.mlka.", "ffn.": ""}


def load_reconstructors(
    path: str | Path,
    *,
    heads: int = 8,
    windows: Sequence[int | Window] | None = None,
    backend: Backend = "auto",
) -> nn.ModuleList:
    """Return the `Reconstructor` of each level of an authors' checkpoint; no backbone is needed.

    Channels, widths, grids and the number of blocks are those of the tensors.

    Args:
        path: File written by ``torch.save``: a dict whose ``state_dict`` is a list, one entry a
            level.
        heads: Attention heads; the tensors do not tell them, the authors use 8.
        windows: Odd side, or (height, width), of each level's window; by default the authors' rule:
            64×64 → 11, 32×32 → 7, 16×16 → 5.
        backend: Backend of the attention operators.

    Raises:
        ValueError: The file is not such a checkpoint, a grid is not square, or the rule has no
            window for a grid and ``windows`` gives none.
    """
    entries = _read(Path(path))
    if windows is not None and len(windows) != len(entries):
        raise ValueError(f"windows must have one value per level ({len(entries)}), got {windows=}")
    levels = nn.ModuleList()
    for j, entry in enumerate(entries):
        state = {_rename(key): value for key, value in entry.items()}
        if "reference" not in state or "token_in.weight" not in state:
            raise ValueError(f"path: level {j} of {path} has no reference or embedding")
        state["reference"] = state["reference"].squeeze(0)
        for name in ("token_in", "reference_in"):
            state[f"{name}.weight"] = state[f"{name}.weight"].squeeze(-1)
        tokens, channels = state["reference"].shape
        hidden = state["token_in.weight"].shape[0]
        side = math.isqrt(tokens)
        if side * side != tokens:
            raise ValueError(f"path: level {j} of {path} has {tokens} tokens, not a square grid")
        if windows is not None:
            window = window_pair(windows[j])
        elif side in _WINDOW_OF_GRID:
            window = window_pair(_WINDOW_OF_GRID[side])
        else:
            raise ValueError(
                f"windows must be given: the authors have no rule for a grid of {side}"
            )
        blocks = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
        level = Reconstructor(
            channels,
            hidden,
            heads,
            (side, side),
            window,
            blocks=blocks,
            alpha=2.0,
            ffn_ratio=state["blocks.0.fc1.weight"].shape[0] // hidden,
            backend=backend,
        )
        try:
            level.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"path: level {j} of {path} does not fit: {error}") from error
        levels.append(level)
    return levels


def _read(path: Path) -> list[Mapping[str, Tensor]]:
    if not path.is_file():
        raise ValueError(f"path: no file {str(path)!r}")
    # Beside the weights lie NumPy scalars (best_*); nothing else of pickle is let in.
    scalar = np.float64(0).__reduce__()[0]
    allowed: list[Any] = [np.dtype, codecs.encode]
    allowed += [(scalar, f"{core}.multiarray.scalar") for core in ("numpy.core", "numpy._core")]
    allowed += [type(np.dtype(kind)) for kind in ("f8", "f4", "i8", "i4", "?")]
    try:
        with torch.serialization.safe_globals(allowed):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the zip and pickle readers raise whatever they meet
        raise ValueError(f"path: {str(path)!r} cannot be read: {error}") from error
    entries = checkpoint.get("state_dict") if isinstance(checkpoint, Mapping) else None
    if not isinstance(entries, (list, tuple)) or not entries:
        raise ValueError(f"path: {str(path)!r} has no list 'state_dict' with one entry per level")
    return list(entries)


def _rename(key: str) -> str:
    """Translate a parameter's name of theirs into ours."""
    key = _replace_prefix(key, _LEVEL_NAMES)
    if key.startswith("blocks."):
        blocks, index, rest = key.split(".", 2)
        key = f"{blocks}.{index}.{_replace_prefix(rest, _BLOCK_NAMES)}"
    return key


def _replace_prefix(key: str, names: Mapping[str, str]) -> str:
    for theirs, ours in names.items():
        if key.startswith(theirs):
            return ours + key[len(theirs) :]
    return key
