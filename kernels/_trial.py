"""Whether a GPU takes an operator's kernels, found out before the first launch.

The kernels of a problem are compiled and loaded, forward and, where it will be needed, backward,
with the tiles and smaller ones that a launch would take. So an operator that cannot run is known
before anything of it has run, and before `torch.compile` writes it into a graph. What is compiled
here a launch finds compiled.
"""

from __future__ import annotations

import functools
import operator
import threading
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from rlr_fast.kernels import _choice, _launch, lca, mlka
from rlr_fast.kernels._launch import Geometry, LaunchRefused
from rlr_fast.kernels.tiles import FEW_IMAGES

# One at a time, so that no two threads compile the same.
_TRIAL = threading.Lock()


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
    heads, width = query.shape[1], query.shape[3]
    few = True if query.shape[0] <= FEW_IMAGES else False  # noqa: SIM210
    if torch.compiler.is_compiling():
        # A plain integer is what a traced function can ask with.
        heads, width = operator.index(heads), operator.index(width)
        grid, window = ([operator.index(x) for x in pair] for pair in (grid, window))
    problem = (name, tuple(grid), tuple(window), heads, width, few, value.dim() == 3)
    return _tried(problem, query.dtype, query.device, backward)


@_launch.constant_when_traced
def _tried(problem: tuple, dtype: torch.dtype, device: torch.device, backward: bool) -> str | None:
    deterministic = torch.are_deterministic_algorithms_enabled()
    modes = (deterministic, _launch.precision(dtype), _choice.forced_now())
    return _try(problem, dtype, device, backward, modes)


@functools.cache
def _try(
    problem: tuple, dtype: torch.dtype, device: torch.device, backward: bool, modes: tuple
) -> str | None:
    """The modes are only what else the kernels depend on."""
    name, grid, window, heads, width, few_images, shared_value = problem
    geometry = Geometry.of(grid, window)
    shape = (heads, geometry.tokens, width)
    with _TRIAL, FakeTensorMode(), _launch.compile_only():
        q = torch.empty((2 if few_images else 64, *shape), dtype=dtype, device=device)
        k = torch.empty(shape, dtype=dtype, device=device)
        v = torch.empty(shape if shared_value else q.shape, dtype=dtype, device=device)
        bound = torch.empty((heads,), dtype=_launch.accumulator(dtype), device=device)
        o, do, dq, dv = (torch.empty_like(q) for _ in range(4))
        try:
            launch_passes(name, q, k, bound, v, o, do, dq, dv, geometry, backward)
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
