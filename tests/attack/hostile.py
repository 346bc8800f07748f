"""Checkpoints of the authors' kind that would run a program, or fill the memory."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


class Program:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def authors_level(channels: int = 8, hidden: int = 8, side: int = 4) -> dict[str, Any]:
    """Return one level's tensors under the names of the authors' checkpoints, with one block."""
    shapes: dict[str, tuple[int, ...]] = {"ref_mca": (1, side * side, channels)}
    for part in ("embedding", "ref_mca_embedding"):
        shapes[f"{part}.project_embedding.project.weight"] = (hidden, channels, 1)
        shapes[f"{part}.project_embedding.project.bias"] = (hidden,)
    layer = "encoder.encode_layers.0"
    for attention in ("mca", "nsa"):
        shapes[f"{layer}.{attention}.in_proj_weight"] = (3 * hidden, hidden)
        shapes[f"{layer}.{attention}.in_proj_bias"] = (3 * hidden,)
        shapes[f"{layer}.{attention}.out_proj.weight"] = (hidden, hidden)
        shapes[f"{layer}.{attention}.out_proj.bias"] = (hidden,)
    shapes |= {
        f"{layer}.{norm}.{kind}": (hidden,)
        for norm in ("norm1", "norm2")
        for kind in ("weight", "bias")
    }
    shapes |= {
        f"{layer}.ffn.fc1.weight": (4 * hidden, hidden),
        f"{layer}.ffn.fc1.bias": (4 * hidden,),
    }
    shapes |= {f"{layer}.ffn.fc2.weight": (hidden, 4 * hidden), f"{layer}.ffn.fc2.bias": (hidden,)}
    shapes |= {"encoder.norm.weight": (hidden,), "encoder.norm.bias": (hidden,)}
    shapes |= {"projection.weight": (channels, hidden), "projection.bias": (channels,)}
    return {name: torch.ones(shape) for name, shape in shapes.items()}


def hostile_pickles(ran: Path) -> list[Callable[[], bytes]]:
    """Return makers of files; those that run write ``ran``."""

    def saved(value: Any) -> bytes:
        buffer = io.BytesIO()
        torch.save(value, buffer)
        return buffer.getvalue()

    def level(**changes: Any) -> bytes:
        state = {k: v for k, v in (authors_level() | changes).items() if v is not None}
        return saved({"state_dict": [state]})

    far = "encoder.encode_layers.999999999.norm1.weight"
    huge = torch.ones(1).expand(1, 2**20, 2**30)
    names = list(authors_level())
    return [
        lambda: level(),
        lambda: saved({"state_dict": [authors_level() | {"x": Program(ran)}]}),
        lambda: saved(Program(ran)),
        lambda: pickle.dumps(Program(ran)),
        lambda: pickle.dumps({"state_dict": [Program(ran)]}, protocol=2),
        lambda: level(**{far: torch.ones(8)}),
        lambda: level(**{"encoder.encode_layers.x.norm1.weight": torch.ones(8)}),
        lambda: level(**{"encoder.encode_layers": torch.ones(8)}),
        lambda: level(ref_mca=huge),
        lambda: level(ref_mca=torch.ones(3)),
        lambda: level(ref_mca=torch.ones(2, 16, 8)),
        lambda: level(ref_mca="x"),
        lambda: level(**{"encoder.encode_layers.0.ffn.fc1.weight": torch.ones(1)}),
        lambda: level(**{"encoder.encode_layers.0.ffn.fc1.weight": torch.ones(1).expand(2**40, 8)}),
        lambda: level(
            **{"embedding.project_embedding.project.weight": torch.ones(1).expand(2**40, 8, 1)}
        ),
        lambda: level(**{"embedding.project_embedding.project.weight": torch.ones(())}),
        *(lambda name=name: level(**{name: None}) for name in names),
        *(lambda name=name: level(**{name: 3}) for name in names[:6]),
        *(lambda name=name: level(**{name: torch.full((2, 2), float("nan"))}) for name in names),
        lambda: saved({"state_dict": [3]}),
        lambda: saved({"state_dict": [{3: torch.ones(2)}]}),
        lambda: saved({"state_dict": [{}]}),
        lambda: saved({"state_dict": {}}),
        lambda: saved([]),
    ]
