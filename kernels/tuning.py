"""Search for the fastest tiles on the GPU at hand."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from rlr_fast.kernels._launch import Geometry
from rlr_fast.kernels.lca import local_cross_attention, resident
from rlr_fast.kernels.mlka import masked_learnable_key_attention
from rlr_fast.kernels.tiles import (
    HALO_KERNELS,
    HaloTiles,
    Problem,
    RasterTiles,
    Tiles,
    forced,
    shipped,
)

# The query gradient before the key gradient, which may leave it to a kernel of its own.
ORDER = ("raster_forward", "raster_query", "raster_key", "halo_forward", "halo_backward")


@dataclass(frozen=True)
class Shape:
    """One level's attention: token grid (H, W), odd window (h, w), heads h, head width d."""

    grid: tuple[int, int]
    window: tuple[int, int]
    heads: int
    width: int


@dataclass(frozen=True)
class Finding:
    """The fastest tiles of one kernel for one shape.

    Attributes:
        problem: What they are for.
        tiles: The fastest.
        milliseconds: Median time of the operator's pass with them.
        shipped_milliseconds: The same with the shipped tiles.
        tried: Candidates that ran.
        refused: Candidates that did not compile or did not fit.
    """

    problem: Problem
    tiles: Tiles
    milliseconds: float
    shipped_milliseconds: float
    tried: int
    refused: int


def candidates(kernel: str) -> list[Tiles]:
    """Return the tiles worth trying for a kernel."""
    if kernel in HALO_KERNELS:
        forms = ((1, 1), (2, 2), (2, 4), (4, 4), (8, 8))
        return [
            HaloTiles(rows, columns, queries // (rows * columns), warps, stages)
            for (rows, columns), (queries, warps), stages in itertools.product(
                forms, ((16, 4), (32, 4), (64, 4), (128, 4), (128, 8)), (1, 2, 3)
            )
            if queries >= rows * columns
        ]
    sides = itertools.product((32, 64, 128), (64, 128), (4, 8), (1, 2, 3))
    options: list[Tiles] = []
    for queries, keys, warps, stages in sides:
        # Eight warps on fewer than 128 rows compute every score twice.
        if warps == 8 and (keys if kernel == "raster_key" else queries) < 128:
            continue
        if kernel == "raster_forward":
            shares = (0, 2, 3)
            options += [
                RasterTiles(queries, keys, fma_exp2_eighths=n, warps=warps, stages=stages)
                for n in shares
            ]
        elif kernel == "raster_query":
            options.append(RasterTiles(queries, keys, warps=warps, stages=stages))
        else:
            ways: list[tuple[int, bool]] = [(1, False), (1, True), (2, False), (2, True)]
            options += [
                RasterTiles(queries, keys, blocks, separate_dq, warps=warps, stages=stages)
                for blocks, separate_dq in ways
            ]
    return options


def search(
    shapes: Sequence[Shape],
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    kernels: Sequence[str] = ORDER,
    choices: Callable[[str], Sequence[Tiles]] = candidates,
    measure: Callable[[Callable[[], object]], float] | None = None,
    progress: Callable[[int], object] = lambda _: None,
) -> Iterator[Finding]:
    """Measure every candidate of every kernel, shape after shape.

    Args:
        shapes: What to tune for.
        batch: Images.
        dtype: Of query, key and value.
        device: A GPU.
        kernels: Names of kernels, see `rlr_fast.kernels.tiles`.
        choices: Candidates of a kernel.
        measure: Median milliseconds of a call; by default Triton's measurement.
        progress: Called with 1 after each candidate.

    Yields:
        What was found, a kernel and shape at a time.

    Raises:
        RuntimeError: A candidate gives other results than the shipped tiles.
    """
    for shape in shapes:
        geometry = Geometry.of(shape.grid, shape.window)
        for kernel in kernels:
            problem = Problem(kernel, geometry, shape.width, batch, dtype, device)
            if kernel in HALO_KERNELS and not resident(geometry, shape.width, dtype.itemsize):
                continue
            first = shipped(problem)
            options = [first, *(tiles for tiles in choices(kernel) if tiles != first)]
            with _strict(kernel == "raster_query"):
                yield _fastest(problem, shape, options, measure or _median, progress)


@contextlib.contextmanager
def _strict(always: bool) -> Iterator[None]:
    """Deterministic mode, where backward always runs the kernel of the query gradient."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(always)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


def _median(run: Callable[[], object]) -> float:
    return float(triton.testing.do_bench(run, return_mode="median"))


def _fastest(
    problem: Problem,
    shape: Shape,
    options: Sequence[Tiles],
    measure: Callable[[Callable[[], object]], float],
    progress: Callable[[int], object],
) -> Finding:
    run = _pass(problem, shape)
    times: dict[Tiles, float] = {}
    expected: tuple[Tensor, ...] | None = None
    refused = 0
    for tiles in options:
        with forced(**{problem.kernel: tiles}):
            try:
                found = run()
            except (triton.OutOfResources, triton.CompilationError):
                refused += 1
            else:
                expected = expected or found
                if not all(map(_close, found, expected)):
                    raise RuntimeError(f"{problem.key()} gives other results with {tiles}")
                times[tiles] = measure(run)
        progress(1)
    best = min(times, key=lambda tiles: times[tiles])
    ours = times.get(options[0], float("nan"))
    return Finding(problem, best, times[best], ours, len(times), refused)


def _close(found: Tensor, expected: Tensor) -> bool:
    # Rounding aside, which differs with the order of sums; a wrong tile is wrong by far more.
    size = float(expected.float().abs().max())
    return bool((found.float() - expected.float()).abs().max() <= 0.05 * size)


def _pass(problem: Problem, shape: Shape) -> Callable[[], tuple[Tensor, ...]]:
    """Return the pass of the operator that runs a kernel, on random inputs."""
    tokens = shape.grid[0] * shape.grid[1]
    local = problem.kernel in HALO_KERNELS

    def draw(*lead: int) -> Tensor:
        size = (*lead, shape.heads, tokens, shape.width)
        return torch.randn(size, dtype=problem.dtype, device=problem.device, requires_grad=True)

    operator = local_cross_attention if local else masked_learnable_key_attention
    inputs = (draw(problem.batch), draw(), draw() if local else draw(problem.batch))

    def forward() -> Tensor:
        return operator(*inputs, shape.grid, shape.window, shape.width**-0.5)

    if problem.kernel.endswith("forward"):
        return torch.no_grad()(lambda: (forward(),))
    output = forward()
    grad = torch.randn_like(output)
    return lambda: torch.autograd.grad(output, inputs, grad, retain_graph=True)
