"""The choice of tiles: forced ones, the table's, or smaller ones where a GPU refuses those.

A GPU or its compiler may refuse a kernel that the table believes to fit. Its tiles are then struck
from the problem's list, for as long as the process lives, and the next smaller are taken.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from rlr_fast.kernels import _launch
from rlr_fast.kernels._launch import Geometry, LaunchRefused, Target
from rlr_fast.kernels.tiles import FEW_IMAGES, Problem, Tiles, candidates

_FORCED: dict[str, Any] = {}
# Why a GPU refused tiles, by problem; kept while the process lives.
_REFUSED: dict[Problem, dict[Tiles, str]] = {}


@contextlib.contextmanager
def forced(**tiles: Any) -> Iterator[None]:
    """Use these tiles by kernel name, or this ``architecture``'s, for tests and measurements."""
    before = dict(_FORCED)
    _FORCED.update(tiles)
    choose.cache_clear()
    try:
        yield
    finally:
        _FORCED.clear()
        _FORCED.update(before)
        choose.cache_clear()


def forced_now() -> tuple[tuple[str, Any], ...]:
    """Return what is forced, by name."""
    return tuple(_FORCED.items())


def target_of(device: torch.device) -> Target:
    """Return the GPU that tiles are chosen for."""
    architecture = _FORCED.get("architecture")
    return _launch.target(device) if architecture is None else Target.of(architecture)


def problem_of(kernel: str, query: Tensor, geometry: Geometry) -> Problem:
    """Return the problem of a kernel for query (B, h, N, d)."""
    few, width = query.shape[0] <= FEW_IMAGES, query.shape[3]
    return Problem(kernel, geometry, width, few, query.dtype, target_of(query.device))


@functools.cache
def choose(problem: Problem) -> Any:
    """Return the tiles for a problem; ``None`` where the GPU refuses all of them."""
    if problem.kernel in _FORCED:
        return _FORCED[problem.kernel]
    refused = _REFUSED.get(problem, {})
    return next((tiles for tiles in candidates(problem) if tiles not in refused), None)


def refuse(problem: Problem, tiles: Tiles, reason: str) -> None:
    """Take smaller tiles for a problem from now on."""
    struck = _REFUSED.setdefault(problem, {})
    known = tiles in struck
    struck[tiles] = reason
    choose.cache_clear()
    if known:  # of another thread
        return
    warnings.warn(f"{problem}: {tiles} are refused ({reason})", RuntimeWarning, stacklevel=2)


R = TypeVar("R")


def with_smaller_tiles(launcher: Callable[..., R]) -> Callable[..., R]:
    """Make a launcher start again with smaller tiles where the GPU refuses its own.

    Nothing of a refused launch has run, and a launcher writes whole results: what it launched
    before is only done again.
    """

    @functools.wraps(launcher)
    def launch(*args: Any, **kwargs: Any) -> R:
        while True:
            try:
                return launcher(*args, **kwargs)
            except LaunchRefused as error:
                if error.problem is None or error.problem.kernel in _FORCED:
                    raise
                refuse(error.problem, error.tiles, str(error))

    return launch


def require(problem: Problem) -> Any:
    """Return the tiles for a problem.

    Raises:
        LaunchRefused: The GPU refuses all of them.
    """
    tiles = choose(problem)
    if tiles is None:
        last = [*_REFUSED[problem].values()][-1]
        raise LaunchRefused(f"{problem}: no tiles are left, the last were refused ({last})")
    return tiles
