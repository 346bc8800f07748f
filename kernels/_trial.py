"""Whether a GPU takes an operator's kernels, found out before the first launch.

The kernels of a problem are compiled and loaded, forward and, where it will be needed, backward,
with the tiles and smaller ones that a launch would take. So an operator that cannot run is known
before anything of it has run, and before `torch.compile` writes it into a graph. What is compiled
here a launch finds compiled.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from rlr_fast.kernels import _choice, _launch, lca, mlka
from rlr_fast.kernels._launch import Geometry, LaunchRefused
from rlr_fast.kernels.tiles import FEW_IMAGES


def refusal(
    name: str, query: Tensor, value: Tensor, grid: Sequence[int], window: Sequence[int],
    backward: bool,
) -> str | None:  # fmt: skip
    """Say why the GPU refuses an operator's kernels; ``None`` if it takes them.

    Args:
        name: "lca" or "mlka".
        query: (B, h, N, d).
        value: (h, N, d), or for MLKA (B, h, N, d).
        grid: Token grid (H, W).
        window: Odd (height, width) in tokens.
        backward: Whether the backward pass must run as well.
    """
    # A plain integer is what a traced function asks with.
    geometry = Geometry.of(*([operator.index(x) for x in pair] for pair in (grid, window)))
    heads, width = operator.index(query.shape[1]), operator.index(query.shape[3])
    few = True if query.shape[0] <= FEW_IMAGES else False  # noqa: SIM210
    shared_value = value.dim() == 3
    return _tried(name, tuple(geometry), heads, width, few, shared_value, query.dtype,
                  query.device, backward)  # fmt: skip


@_launch.constant_when_traced
def _tried(
    name: str, geometry: tuple[int, ...], heads: int, width: int, few_images: bool,
    shared_value: bool, dtype: torch.dtype, device: torch.device, backward: bool,
) -> str | None:  # fmt: skip
    deterministic = torch.are_deterministic_algorithms_enabled()
    modes = (deterministic, _launch.precision(dtype), _choice.forced_now())
    return _try(name, geometry, heads, width, few_images, shared_value, dtype, device, backward,
                modes)  # fmt: skip


@functools.cache
def _try(
    name: str, geometry: tuple[int, ...], heads: int, width: int, few_images: bool,
    shared_value: bool, dtype: torch.dtype, device: torch.device, backward: bool,
    modes: tuple,
) -> str | None:  # fmt: skip
    """The modes are only what else the kernels depend on."""
    around = Geometry(*geometry)
    shape = (heads, around.tokens, width)
    with FakeTensorMode(), _launch.compile_only():
        q = torch.empty((2 if few_images else 64, *shape), dtype=dtype, device=device)
        k = torch.empty(shape, dtype=dtype, device=device)
        v = torch.empty(shape if shared_value else q.shape, dtype=dtype, device=device)
        bound = torch.empty((heads,), dtype=_launch.accumulator(dtype), device=device)
        o, do, dq, dv = (torch.empty_like(q) for _ in range(4))
        try:
            launch_passes(name, q, k, bound, v, o, do, dq, dv, around, backward)
        except LaunchRefused as error:
            return str(error)
    return None


def launch_passes(
    name: str, q: Tensor, k: Tensor, bound: Tensor, v: Tensor, o: Tensor, do: Tensor, dq: Tensor,
    dv: Tensor, geometry: Geometry, backward: bool,
) -> None:  # fmt: skip
    """Launch the passes of an operator, see the launchers of `lca` and `mlka`."""
    if name == "mlka":
        saved = mlka.launch_forward(q, k, bound, v, o, geometry, inside=False)
        if backward:
            into = None if v.dim() == 3 else dv
            mlka.launch_backward(do, q, k, v, o, saved, dq, into, geometry, inside=False)
    else:
        saved = lca.launch_forward(q, k, bound, v, o, geometry)
        if backward:
            lca.launch_backward(do, q, k, v, o, saved, dq, geometry)
