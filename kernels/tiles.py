"""Which tiles a kernel takes: the table's, and smaller ones where a GPU refuses them.

For compute capability 9.0 and two bytes an element, head widths 16 to 64, the table was measured
on an H100 (`python -m benchmarks.tiles`, benchmarks/results/gpu-tiles.json): programs that leave
room for others, and deep pipelines, some at the price of a few spilled registers. All else was
chosen by counting machine code (`python -m benchmarks.codegen`): no spilled register, then the
fewest clocks a score. What it gives is compiled for every supported GPU by `python -m
benchmarks.survey`.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton

from rlr_fast.kernels._launch import Geometry, Target, next_power_of_2

RASTER_KERNELS = ("raster_forward", "raster_key", "raster_query")
HALO_KERNELS = ("halo_forward", "halo_backward")
KERNELS = RASTER_KERNELS + HALO_KERNELS


@dataclass(frozen=True)
class RasterTiles:
    """Tiles of a kernel in raster order.

    Attributes:
        queries: Queries a tile.
        keys: Keys a tile.
        blocks: Key tiles a program of the key gradient holds, 1 or 2.
        separate_dq: Leave the query gradient to a kernel of its own, instead of adding it
            atomically: twice the powers of two, and no traffic of partial sums.
        fma_exp2_eighths: Share of the powers of two that the FMA units compute, of 8; of the
            forward kernel in bfloat16 alone.
        warps: Warps a program.
        stages: Depth of the software pipeline.
        registers: Most registers a thread, where fewer let one more program run; 0 is no limit.
    """

    queries: int
    keys: int
    blocks: int = 1
    separate_dq: bool = False
    fma_exp2_eighths: int = 0
    warps: int = 4
    stages: int = 2
    registers: int = 0

    def options(self) -> dict[str, int]:
        """As options of `rlr_fast.kernels._launch.launch`."""
        return {"warps": self.warps, "stages": self.stages, "registers": self.registers}


@dataclass(frozen=True)
class HaloTiles:
    """Tiles of a kernel that holds the keys around a few positions and walks over the batch.

    Attributes:
        rows: Rows of positions a tile.
        columns: Columns of positions a tile.
        images: Images a tile; ``images · rows · columns`` queries.
        warps: Warps a program.
        stages: Depth of the software pipeline.
        part: Most keys of the halo that one product takes, where two parts can hold it.
    """

    rows: int
    columns: int
    images: int
    warps: int = 4
    stages: int = 2
    part: int = 256

    @property
    def queries(self) -> int:
        """Rows of a tile of scores."""
        return self.rows * self.columns * self.images

    def halo(self, geometry: Geometry) -> int:
        """Keys around a tile."""
        height = self.rows + 2 * geometry.radius_y
        return height * (self.columns + 2 * geometry.radius_x)

    def parts(self, geometry: Geometry) -> tuple[int, int]:
        """Two powers of two, of which the second may be 0, that hold a tile's halo."""
        keys = self.halo(geometry)
        whole = max(16, next_power_of_2(keys))
        half = whole // 2
        if half >= 64 and (keys - half <= half // 2 or whole > self.part):
            return half, max(16, next_power_of_2(keys - half))
        return whole, 0


Tiles = RasterTiles | HaloTiles


# Images of a batch that is too small to fill a tile of few positions.
FEW_IMAGES = 8


class Problem(NamedTuple):
    """What tiles are chosen for.

    Attributes:
        kernel: One of `KERNELS`.
        geometry: Grid and window.
        width: Head width d.
        few_images: Whether the batch has at most 8.
        dtype: Of query and output.
        target: The GPU.
    """

    kernel: str
    geometry: Geometry
    width: int
    few_images: bool
    dtype: torch.dtype
    target: Target

    @property
    def table(self) -> int:
        """The architecture of the table that serves the GPU: 80, 90 or 100."""
        # Compute capability 12 has the matrix instructions of 8.
        return {9: 90, 10: 100}.get(self.target.architecture // 10, 80)

    def __str__(self) -> str:
        g = self.geometry
        window = f"{2 * g.radius_y + 1}x{2 * g.radius_x + 1}"
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"{self.kernel} of a {g.height}x{g.width} grid, window {window}, head width "
            f"{self.width}, {dtype}, on compute capability {self.target.architecture / 10}"
        )


# What fits a GPU.

# Columns of tensor memory, of compute capability 10.
_TENSOR_MEMORY = 512
# Keys of a halo that is worth to be kept, and bytes of its keys alone.
_LARGEST_HALO = 256
_LARGEST_BYTES = 32768


def candidates(problem: Problem) -> tuple[Tiles, ...]:
    """Return the tiles for a problem, the table's own first, then smaller ones.

    Those that are known not to fit the GPU are left out.
    """
    own = table_tiles(problem)
    smaller: list[Tiles] = [dataclasses.replace(own, stages=1)]
    if isinstance(own, HaloTiles):
        smaller += [tiles for tiles in _SMALLER_HALO if tiles.queries <= own.queries]
    else:
        smaller += _SMALLER_RASTER
    return tuple(t for t in dict.fromkeys((own, *smaller)) if fits(problem, t))


@functools.cache
def fits_in_shared_memory(
    geometry: Geometry, width: int, dtype: torch.dtype, target: Target
) -> bool:
    """Whether a program of LCA can keep the keys around its positions.

    It depends on nothing that happens at a launch, as what the forward pass saves depends on it.
    """
    halo = sum(HaloTiles(4, 4, 4).parts(geometry))
    if halo > _LARGEST_HALO or halo * width * dtype.itemsize > _LARGEST_BYTES:
        return False
    problems = (Problem(name, geometry, width, True, dtype, target) for name in HALO_KERNELS)
    return all(map(candidates, problems))


def fits(problem: Problem, tiles: Tiles) -> bool:
    """Whether a GPU has the memory and the registers that tiles take.

    What the kernels in raster order take depends on no grid and no window: the table's fit.
    """
    if isinstance(tiles, RasterTiles):
        return True
    if shared_memory(problem, tiles) > problem.target.shared:
        return False
    wide = problem.dtype.itemsize > 2 and problem.kernel == "halo_backward"
    keys = sum(tiles.parts(problem.geometry))
    if wide and problem.table == 80 and keys * (problem.width + 32) > 6144:
        return False  # registers spill by kilobytes
    on_blackwell = problem.target.architecture // 10 == 10
    return not on_blackwell or tensor_memory(problem, tiles) <= _TENSOR_MEMORY


def shared_memory(problem: Problem, tiles: HaloTiles) -> int:
    """Return a bound of the bytes of shared memory that a program of LCA takes.

    Counted are the operands of its matrix products, and beside them, which is not there at once,
    the rows that are loaded ahead or a share for what goes between warps. The share is more where
    these have few rows.
    """
    width, queries = problem.width, tiles.queries
    parts = tiles.parts(problem.geometry)
    numbers = 2 * sum(parts) * width + queries * width
    ahead = (tiles.stages - 1) * queries * width
    if problem.kernel == "halo_backward":
        ahead *= 2
        numbers += queries * width + queries * max(parts)
        if width == queries == 16:
            numbers += sum(parts) * width  # the keys once more, see the kernel
    # A product of float32 holds both halves of its operands.
    halves = 1 if problem.dtype.itemsize == 2 else 2
    numbers = halves * numbers + 16 * (queries + sum(parts))  # positions and bias
    share = 1.3 if queries < 32 else 1.15
    return round(max(share * numbers, numbers + halves * ahead) * problem.dtype.itemsize)


def tensor_memory(problem: Problem, tiles: HaloTiles) -> int:
    """Return a bound of the columns of tensor memory that a program of LCA takes.

    Scores of fewer than 64 rows stay in registers. Backward holds two tiles of them, and gradients.
    """
    if tiles.queries < 64:
        return 0
    columns = sum(tiles.parts(problem.geometry))
    return 2 * (columns + problem.width) if problem.kernel == "halo_backward" else columns


_SMALLER_HALO = (
    HaloTiles(1, 1, 64, stages=1),
    HaloTiles(1, 1, 32, stages=1),
    HaloTiles(1, 1, 16, stages=1),
    HaloTiles(1, 1, 16, stages=1, part=64),
)
_SMALLER_RASTER = (
    RasterTiles(32, 32, separate_dq=True, stages=1),
    RasterTiles(16, 32, separate_dq=True, stages=1),
    RasterTiles(16, 16, separate_dq=True, stages=1),
)


# The table.

# Registers are given out otherwise since Triton 3.9.
_BEFORE_3_9 = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)

# By head width d, for two bytes an element.
_QUERIES = {width: RasterTiles(64, 64) for width in (16, 32, 64, 128)}
_RASTER: dict[int, dict[str, dict[int, RasterTiles]]] = {
    90: {
        "raster_forward": {
            16: RasterTiles(64, 64, fma_exp2_eighths=2, stages=4),
            32: RasterTiles(64, 64, fma_exp2_eighths=2, stages=3),
            64: RasterTiles(64, 64, fma_exp2_eighths=2, stages=3, registers=128),
            128: RasterTiles(64, 64, fma_exp2_eighths=2),
        },
        "raster_key": {
            16: RasterTiles(64, 64, blocks=2, stages=3),
            32: RasterTiles(64, 128, separate_dq=True, warps=8, stages=1, registers=128),
            64: RasterTiles(64, 64, separate_dq=True, stages=1),
            128: RasterTiles(64, 32, separate_dq=True, stages=1),
        },
        "raster_query": {
            16: RasterTiles(64, 64, stages=3),
            32: RasterTiles(64, 64, stages=3),
            64: RasterTiles(64, 64, registers=168),
            128: RasterTiles(64, 64),
        },
    },
    100: {
        "raster_forward": {
            16: RasterTiles(128, 64, fma_exp2_eighths=3),
            32: RasterTiles(64, 128, fma_exp2_eighths=2, stages=3),
            64: RasterTiles(64, 64, stages=3),
            128: RasterTiles(64, 64, fma_exp2_eighths=2),
        },
        "raster_key": {
            16: RasterTiles(64, 64, blocks=2, stages=1),
            32: RasterTiles(64, 64, separate_dq=True, stages=1),
            64: RasterTiles(64, 64, separate_dq=True, stages=1),
            128: RasterTiles(32, 64, separate_dq=True, stages=1),
        },
        "raster_query": _QUERIES,
    },
    80: {
        "raster_forward": {
            16: RasterTiles(64, 128, fma_exp2_eighths=2),
            32: RasterTiles(64, 128, fma_exp2_eighths=2, stages=3),
            64: RasterTiles(64, 64, fma_exp2_eighths=2, stages=3),
            128: RasterTiles(64, 64, fma_exp2_eighths=2),
        },
        "raster_key": {
            16: RasterTiles(64, 64, blocks=2, separate_dq=True, stages=1),
            32: RasterTiles(64, 64, separate_dq=True, stages=1),
            64: RasterTiles(32, 128, separate_dq=True, warps=8, stages=1),
            128: RasterTiles(64, 64, separate_dq=True, warps=8, stages=1),
        },
        "raster_query": _QUERIES,
    },
}
# A program that holds all keys of a small grid: dQ needs no sum. Of two bytes an element, by
# architecture and by the heads that leave registers for it.
_TALL, _LOW = RasterTiles(64, 256, warps=8, stages=1), RasterTiles(32, 256, warps=8, stages=1)
_ALL_KEYS = {
    80: {16: _LOW, 32: _LOW},
    90: {16: _TALL, 32: _LOW, 64: _LOW},
    100: {16: _TALL, 32: _LOW, 64: _LOW},
}
# Four or eight bytes an element: small.
_SMALL_KEY, _TINY_KEY = (
    RasterTiles(32, 64, stages=1),
    RasterTiles(32, 32, separate_dq=True, stages=1),
)
# One stage spills here on sm_90; a third costs 4 % of the issue slots.
_DEEP_KEY = RasterTiles(32, 32, separate_dq=True, stages=3)
_QUERY, _SMALL_QUERY = RasterTiles(64, 32, stages=1), RasterTiles(32, 32, stages=1)
_WIDE: dict[int, dict[str, dict[int, RasterTiles]]] = {
    90: {
        "raster_forward": {width: RasterTiles(64, 32) for width in (16, 32, 64, 128)},
        "raster_key": {16: _SMALL_KEY, 32: _SMALL_KEY, 64: _DEEP_KEY, 128: _TINY_KEY},
        "raster_query": {16: _QUERY, 32: _QUERY, 64: _QUERY, 128: _SMALL_QUERY},
    }
}
_WIDE[100] = _WIDE[90] | {
    "raster_key": _WIDE[90]["raster_key"] | {64: _TINY_KEY},
    "raster_query": _WIDE[90]["raster_query"] | {64: _SMALL_QUERY},
}
_WIDE[80] = _WIDE[100] | {
    "raster_forward": _WIDE[90]["raster_forward"] | {128: RasterTiles(32, 32, stages=1)},
    "raster_key": _WIDE[100]["raster_key"] | {32: RasterTiles(16, 64, separate_dq=True, stages=1)},
}


# Depth of the pipeline of LCA's backward, by architecture and head width.
_BACKWARD_STAGES = {(80, 64): 2, (80, 128): 2, (90, 32): 3, (90, 64): 3, (100, 16): 3}
# Before Triton 3.9 a single stage spills there, since then three would.
if _BEFORE_3_9:
    _BACKWARD_STAGES[90, 16] = 3


def table_tiles(problem: Problem) -> Tiles:
    """Return the tiles of the table."""
    if problem.kernel in HALO_KERNELS:
        return _halo_tiles(problem)
    if problem.dtype.itemsize > 2:
        return _WIDE[problem.table][problem.kernel][problem.width]
    if problem.kernel == "raster_key" and 128 < problem.geometry.tokens <= 256:
        all_keys = _ALL_KEYS[problem.table].get(problem.width)
        if all_keys:
            return all_keys
    tiles = _RASTER[problem.table][problem.kernel][problem.width]
    if problem.kernel == "raster_forward" and _windows_meet_all(problem.geometry, tiles):
        # Pipelined, the loop that nobody enters ends ptxas 12.9 for sm_90 with a segmentation
        # fault; few blocks of keys gain nothing by it.
        return dataclasses.replace(tiles, stages=1)
    return tiles


def _windows_meet_all(geometry: Geometry, tiles: RasterTiles) -> bool:
    """Whether the windows of every block of queries meet every block of keys."""
    height, width, radius, _ = geometry
    for first in range(0, geometry.tokens, tiles.queries):
        last = min(first + tiles.queries, geometry.tokens) - 1
        # As `window_range` of the kernels.
        lo = max(first // width - radius, 0) * width
        hi = min(last // width + radius + 1, height) * width
        if lo >= tiles.keys or -(-hi // tiles.keys) < -(-geometry.tokens // tiles.keys):
            return False
    return True


def _halo_tiles(problem: Problem) -> HaloTiles:
    """Few positions, whose halo is small; more where the batch is too small to fill a tile.

    Backward holds the gradients of the halo's keys and values beside two tiles of scores: where
    these outgrow the registers, it takes fewer rows, and at last more warps.
    """
    if problem.dtype.itemsize > 2:
        return _on_grid(_wide_halo_tiles(problem), problem.geometry)
    forward = problem.kernel == "halo_forward"
    large, small = HaloTiles(2, 2, 16), HaloTiles(4, 4, 4)
    if problem.few_images and (forward or small.halo(problem.geometry) <= 128 >= 4 * problem.width):
        tiles = small
    else:
        tiles = large
    tiles = _on_grid(tiles, problem.geometry)
    if forward:
        return dataclasses.replace(tiles, stages=3) if problem.table == 90 else tiles
    numbers = next_power_of_2(tiles.halo(problem.geometry)) * problem.width
    if (problem.table, problem.width, numbers) == (80, 64, 4096):
        return dataclasses.replace(tiles, rows=1, columns=1, images=64, stages=1)
    if numbers >= 8192:
        # With three stages Triton 3.8 overwrites, for sm_90, rows that a product still reads.
        stages = 2 if problem.table == 80 and problem.width >= 64 else 1
        warps = 8 if numbers > 8192 else 4
        return dataclasses.replace(tiles, images=4, warps=warps, stages=stages)
    # One stage keeps registers free, but for these.
    stages = _BACKWARD_STAGES.get((problem.table, problem.width), 1)
    return dataclasses.replace(tiles, stages=stages)


def _wide_halo_tiles(problem: Problem) -> HaloTiles:
    """Four or eight bytes an element: few rows or few keys.

    A product of float32 holds both halves of its operands. Sixteen rows of a backward tile leave
    the keys to be shared by the warps.
    """
    pair = HaloTiles(2, 2, 4, stages=1)
    halo = pair.halo(problem.geometry)
    if problem.kernel == "halo_backward":
        few = halo <= 64 and problem.width < 64
        tiles = pair if few else HaloTiles(1, 1, 16, stages=1)
        if problem.table == 80 and problem.width < 64:
            # Sixteen rows are not shared out there, and more cost fewer clocks. Registers spill
            # where the halo is large, with more rows by kilobytes.
            large = sum(tiles.parts(problem.geometry)) * problem.width > 2048
            tiles = dataclasses.replace(tiles, images=16 if few or large else 32)
        return tiles
    if problem.few_images:
        return pair
    few = halo <= 128 and problem.width < 64
    return HaloTiles(2, 2, 16, stages=1) if few else HaloTiles(1, 1, 64, stages=1, part=64)


def _on_grid(tiles: HaloTiles, geometry: Geometry) -> HaloTiles:
    """No more positions than the grid has, and more images instead."""
    rows = min(tiles.rows, next_power_of_2(geometry.height))
    columns = min(tiles.columns, next_power_of_2(geometry.width))
    images = tiles.images * tiles.rows * tiles.columns // (rows * columns)
    return dataclasses.replace(tiles, rows=rows, columns=columns, images=images)
