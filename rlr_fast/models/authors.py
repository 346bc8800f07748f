"""Import of checkpoints of the authors' implementation of RLR."""

from __future__ import annotations

import codecs
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rlr_fast.config import Window
from rlr_fast.functional import Backend, require_head_width, unsupported_reason, window_pair
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
        ValueError: The file is not such a checkpoint, a grid is not square, ``heads`` does not
            divide a width, there is no such backend, or the rule has no window for a grid and
            ``windows`` gives none.
        BackendError: The requested backend has no operator for the width of a head.
    """
    unsupported_reason(backend, "cpu")  # refuses a name that is no backend
    if not isinstance(heads, int) or heads < 1:
        raise ValueError(f"heads must be a positive integer, got {heads=}")
    entries = _read(Path(path))
    if windows is not None and not isinstance(windows, Sequence):
        raise ValueError(f"windows must have one value per level, got {windows=}")
    if windows is not None and len(windows) != len(entries):
        raise ValueError(f"windows must have one value per level ({len(entries)}), got {windows=}")
    levels = nn.ModuleList()
    for j, entry in enumerate(entries):
        state = _level_state(entry, f"path: level {j} of {path}")
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
        if hidden % heads:
            raise ValueError(
                f"heads must divide the width {hidden} of level {j} of {path}, got {heads=}"
            )
        require_head_width(backend, hidden // heads)
        blocks = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
        build = partial(
            Reconstructor,
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
            with torch.device("meta"):  # the shapes, before they take memory
                build().load_state_dict(state, assign=True)
            level = build()
            level.load_state_dict(state)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"path: level {j} of {path} does not fit: {error}") from error
        levels.append(level)
    return levels


def _level_state(entry: Any, name: str) -> dict[str, Tensor]:
    """Return a level's tensors under our names; enough of them to build its network.

    Raises:
        ValueError: The level is none, for which it is called ``name``.
    """
    if not isinstance(entry, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) and value.is_floating_point()
        for key, value in entry.items()
    ):
        raise ValueError(f"{name} must be tensors of floating point by their names")
    state: dict[str, Tensor] = {}
    for key, value in entry.items():
        # A view may claim more elements than the file has, and the network would be as large.
        held = value.untyped_storage().nbytes() // value.element_size()
        if not 0 < value.numel() <= held or not value.isfinite().all():
            raise ValueError(f"{name}: {key} must be whole and finite")
        state[_rename(key)] = value
    wanted = ("reference", "token_in.weight", "reference_in.weight")
    for key in (*wanted, "blocks.0.fc1.weight"):
        if key not in state or state[key].dim() not in (2, 3):
            raise ValueError(f"{name} has no reference, embedding or block: {key} is missing")
    state["reference"] = state["reference"].squeeze(0)
    for part in ("token_in", "reference_in"):
        state[f"{part}.weight"] = state[f"{part}.weight"].squeeze(-1)
    if any(state[key].dim() != 2 for key in wanted):
        raise ValueError(f"{name}: reference and embeddings must be (1, N, C) and (C_h, C, 1)")
    return state


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
    if key.startswith("blocks.") and key.count(".") > 1:
        blocks, index, rest = key.split(".", 2)
        key = f"{blocks}.{index}.{_replace_prefix(rest, _BLOCK_NAMES)}"
    return key


def _replace_prefix(key: str, names: Mapping[str, str]) -> str:
    for theirs, ours in names.items():
        if key.startswith(theirs):
            return ours + key[len(theirs) :]
    return key
