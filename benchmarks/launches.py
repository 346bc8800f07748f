"""What `benchmarks.codegen` compiles: the launches of a level of the model, recorded.

The launches are the launchers' own, on tensors without memory that lie as a block lays them out:
projected (B, N, 3C), output (B, N, 2C), prepared keys (h, N, d).
"""

from __future__ import annotations

from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor

from rlr_fast.kernels import _choice, _launch, mlka, reference
from rlr_fast.kernels._launch import Geometry, Launch
from rlr_fast.kernels._trial import launch_passes
from rlr_fast.kernels.lca import backward as lca_backward

HEADS = 8

# As `launches` names them: a deterministic backward pass launches other kernels, or others' tiles.
_BACKWARD = ("delta", "backward-key", "backward-query")
OPERATORS = {
    "mlka": ("forward", *_BACKWARD),
    "lca": ("forward", "backward", "gather"),
    "lca-raster": ("forward", *_BACKWARD),
}
MODES = ("", "-deterministic")


def _kernel_names() -> tuple[str, ...]:
    names = ["prepare-key"]
    for operator, stems in OPERATORS.items():
        for stem in stems:
            modes = {"forward": MODES[:1], "delta": MODES[:1], "gather": MODES[1:]}.get(stem, MODES)
            names += [f"{operator}-{stem}{mode}" for mode in modes]
    return tuple(names)


KERNELS = _kernel_names()


@dataclass(frozen=True)
class Shape:
    """A level of the model.

    Attributes:
        grid: (H, W) in tokens.
        width: d of a head.
        window: Height and width in tokens.
        batch: B.
        operators: Those compiled for it.
        paper: Whether it is one of the paper's, which are compiled in every dtype.
    """

    grid: tuple[int, int]
    width: int
    window: tuple[int, int]
    batch: int = 64
    operators: tuple[str, ...] = ("mlka", "lca")
    paper: bool = False

    @property
    def name(self) -> str:
        """As ``64x64-d16-w11``, with ``-b4`` for a batch of 4."""
        height, width = self.grid
        rows, columns = self.window
        window = f"{rows}" if rows == columns else f"{rows}x{columns}"
        batch = "" if self.batch == 64 else f"-b{self.batch}"
        return f"{height}x{width}-d{self.width}-w{window}{batch}"

    @property
    def geometry(self) -> Geometry:
        """Grid and reach of the windows."""
        return Geometry.of(self.grid, self.window)


def _shapes() -> dict[str, Shape]:
    paper = [
        Shape((64, 64), 16, (11, 11), paper=True),
        Shape((32, 32), 32, (7, 7), paper=True),
        Shape((16, 16), 64, (5, 5), paper=True),
    ]
    more = [
        Shape((64, 64), 16, (5, 5)),
        Shape((16, 16), 64, (11, 11)),
        Shape((16, 16), 128, (5, 5)),
        Shape((31, 37), 32, (7, 7)),
    ]
    # The tiles of the halo kernels depend on the batch, no others do.
    small = [Shape(s.grid, s.width, s.window, 4, ("lca",)) for s in paper + more]
    large = [Shape((128, 128), 16, (11, 11), 4), Shape((256, 256), 16, (11, 11), 4)]
    raster = [Shape((64, 64), 16, (31, 31), operators=("lca",))]
    return {shape.name: shape for shape in paper + more + small + large + raster}


SHAPES = _shapes()


def views(shape: Shape, dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors without memory, laid out as a block lays them out."""
    height, width = shape.grid
    tokens, channels = height * width, HEADS * shape.width

    def split(parts: int) -> tuple[Tensor, ...]:
        rows = torch.empty(
            (shape.batch, tokens, parts * channels), dtype=dtype, device="meta"
        ).unflatten(2, (parts, HEADS, shape.width))
        return rows.permute(2, 0, 3, 1, 4).unbind(0)

    keys = torch.empty((2 * HEADS, tokens, shape.width), dtype=dtype, device="meta")
    named = dict(zip(("mlka_k", "lca_k"), keys.chunk(2), strict=True))
    named |= zip(("mlka_q", "mlka_v", "lca_q"), split(3), strict=True)
    named |= zip(("mlka_dq", "mlka_dv", "lca_dq"), split(3), strict=True)
    named |= zip(("mlka_o", "lca_o"), split(2), strict=True)
    named |= zip(("mlka_do", "lca_do"), split(2), strict=True)
    named["lca_v"] = torch.empty((HEADS, tokens, shape.width), dtype=dtype, device="meta")
    named["bound"] = torch.empty((HEADS,), device="meta")
    return named


def launches(shape: Shape, dtype: torch.dtype, arch: str = "90") -> dict[str, Launch]:
    """Every launch of a shape, by the names of ``KERNELS``, with the tiles of an architecture."""
    # The table knows NVIDIA's only; AMD's local memory is the size of the smallest.
    with _choice.forced(architecture=int(arch) if arch.isdigit() else 80):
        return _launches(shape, dtype)


def _launches(shape: Shape, dtype: torch.dtype) -> dict[str, Launch]:
    made: dict[str, Launch] = {}
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        for mode in MODES:
            torch.use_deterministic_algorithms(bool(mode))
            for operator in shape.operators:
                for record in _operator_launches(operator, shape, dtype):
                    raster = record.kernel.__module__.startswith(f"{mlka.__name__}.")
                    prefix = "lca-raster" if raster and operator == "lca" else operator
                    stem = record.kernel.__name__.removesuffix("_kernel").replace("_", "-")
                    if stem != "forward":
                        stem += mode
                    made.setdefault(f"{prefix}-{stem}", record)
    finally:
        torch.use_deterministic_algorithms(deterministic)
    # An operator of PyTorch, so tensors without memory would only meet its description.
    key = torch.empty((2 * HEADS, shape.geometry.tokens, shape.width), dtype=dtype)
    with _launch.recorded() as records:
        reference.prepare_key(key, shape.width**-0.5)
    return {"prepare-key": records[0]} | made


def _operator_launches(operator: str, shape: Shape, dtype: torch.dtype) -> list[Launch]:
    """Forward and backward of an operator."""
    geometry, named = shape.geometry, views(shape, dtype)
    q, k, v, o, do, dq = (named[f"{operator}_{name}"] for name in ("q", "k", "v", "o", "do", "dq"))
    bound, dv = named["bound"], named["mlka_dv"]
    # All partial halos of a large grid at once: the same kernels would be launched for each few.
    at_once = mock.patch.object(lca_backward, "_LARGEST_PARTS", 2**60)
    with at_once, _launch.recorded() as records:
        launch_passes(operator, q, k, bound, v, o, do, dq, dv, geometry, backward=True)
    return records
