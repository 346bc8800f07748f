"""Which tiles a kernel takes: forced ones, else tuned ones on disk, else the shipped table.

The table was chosen by counting machine code (`python -m benchmarks.codegen`): no spilled
register, then the fewest clocks a score. ``rlr-fast tune`` measures on the GPU at hand and keeps
what it finds in a file, which is read once a process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton

from rlr_fast.kernels._launch import INTERPRETING, Geometry, capability

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
        sum_by_product: Sum the weights of a row by a product with ones, of the forward kernel in
            two bytes an element alone: fewer instructions, half as many products again at d = 16.
        warps: Warps a program.
        stages: Depth of the software pipeline.
        registers: Most registers a thread, where fewer let one more program run; 0 is no limit.
    """

    queries: int
    keys: int
    blocks: int = 1
    separate_dq: bool = False
    fma_exp2_eighths: int = 0
    sum_by_product: bool = False
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

    def halo(self, geometry: Geometry) -> int:
        """Keys around a tile."""
        height = self.rows + 2 * geometry.radius_y
        return height * (self.columns + 2 * geometry.radius_x)


Tiles = RasterTiles | HaloTiles


@dataclass(frozen=True)
class Problem:
    """What a launch is about.

    Attributes:
        kernel: One of `KERNELS`.
        geometry: Grid and window.
        width: Head width d.
        batch: Images.
        dtype: Of query and output.
        device: Of the tensors; any but a CUDA device stands for compute capability 9.0.
    """

    kernel: str
    geometry: Geometry
    width: int
    batch: int
    dtype: torch.dtype
    device: torch.device

    @property
    def architecture(self) -> int:
        """Of the table: 80, 90 or 100."""
        if "architecture" in _FORCED:
            return _FORCED["architecture"]
        if self.device.type != "cuda" or INTERPRETING:
            return 90
        major = capability(self.device)[0]
        # Compute capability 12 has the matrix instructions and the memory of 8.
        return {9: 90, 10: 100}.get(major, 80)

    def key(self) -> str:
        """Name in the file of tuned tiles; batches count as the next power of two."""
        g = self.geometry
        window = f"{2 * g.radius_y + 1}x{2 * g.radius_x + 1}"
        bucket = triton.next_power_of_2(self.batch)
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.kernel} {g.height}x{g.width} {window} d{self.width} b{bucket} {dtype}"


_FORCED: dict[str, Any] = {}


@contextlib.contextmanager
def forced(**tiles: Any) -> Iterator[None]:
    """Use these tiles by kernel name, or this ``architecture``'s, for tests and measurements."""
    before = dict(_FORCED)
    _FORCED.update(tiles)
    try:
        yield
    finally:
        _FORCED.clear()
        _FORCED.update(before)


def choose(problem: Problem) -> Any:
    """Return the tiles for a problem."""
    if problem.kernel in _FORCED:
        return _FORCED[problem.kernel]
    if problem.device.type == "cuda" or INTERPRETING:
        found = _tuned(_machine(problem.device)).get(problem.key())
        if found is not None:
            return found
    return shipped(problem)


# The shipped table.

# Registers are given out otherwise since Triton 3.9.
_BEFORE_3_9 = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)

# By head width d, for two bytes an element.
_RASTER: dict[int, dict[str, dict[int, RasterTiles]]] = {
    90: {
        "raster_forward": {
            16: RasterTiles(64, 128, fma_exp2_eighths=3, sum_by_product=True),
            32: RasterTiles(64, 128, fma_exp2_eighths=2, stages=3),
            64: RasterTiles(64, 64, fma_exp2_eighths=2, stages=3),
            128: RasterTiles(64, 64, fma_exp2_eighths=2),
        },
        "raster_key": {
            16: RasterTiles(64, 64, blocks=2, stages=1),
            32: RasterTiles(64, 64, separate_dq=True, stages=1),
            64: RasterTiles(64, 64, separate_dq=True, stages=1),
            128: RasterTiles(64, 32, separate_dq=True, stages=1),
        },
        "raster_query": {width: RasterTiles(64, 64) for width in (16, 32, 64, 128)},
    }
}
# What other architectures do otherwise.
_RASTER[100] = _RASTER[90] | {
    "raster_forward": _RASTER[90]["raster_forward"]
    | {
        16: RasterTiles(128, 64, fma_exp2_eighths=3, sum_by_product=True),
        64: RasterTiles(64, 64, stages=3),
    },
    "raster_key": _RASTER[90]["raster_key"]
    | {128: RasterTiles(32, 64, separate_dq=True, stages=1)},
}
_RASTER[80] = _RASTER[90] | {
    "raster_forward": _RASTER[90]["raster_forward"]
    | {16: RasterTiles(64, 128, fma_exp2_eighths=2)},
    "raster_key": {
        16: RasterTiles(64, 64, blocks=2, separate_dq=True, stages=1),
        32: RasterTiles(64, 64, separate_dq=True, stages=1),
        64: RasterTiles(32, 128, separate_dq=True, warps=8, stages=1),
        128: RasterTiles(64, 64, separate_dq=True, warps=8, stages=1),
    },
}
# Four or eight bytes an element: small.
_SMALL_KEY, _TINY_KEY = (
    RasterTiles(32, 64, stages=1),
    RasterTiles(32, 32, separate_dq=True, stages=1),
)
_QUERY, _SMALL_QUERY = RasterTiles(64, 32, stages=1), RasterTiles(32, 32, stages=1)
_WIDE: dict[int, dict[str, dict[int, RasterTiles]]] = {
    90: {
        "raster_forward": {width: RasterTiles(64, 32) for width in (16, 32, 64, 128)},
        "raster_key": {16: _SMALL_KEY, 32: _SMALL_KEY, 64: _TINY_KEY, 128: _TINY_KEY},
        "raster_query": {16: _QUERY, 32: _QUERY, 64: _QUERY, 128: _SMALL_QUERY},
    }
}
_WIDE[100] = _WIDE[90] | {"raster_query": _WIDE[90]["raster_query"] | {64: _SMALL_QUERY}}
_WIDE[80] = _WIDE[100] | {
    "raster_key": _WIDE[90]["raster_key"] | {32: RasterTiles(16, 64, separate_dq=True, stages=1)}
}


# Depth of the pipeline of LCA's backward, by architecture and head width.
_BACKWARD_STAGES = {(80, 64): 2, (80, 128): 2, (100, 16): 3}
# Before Triton 3.9 a single stage spills there, since then three would.
if _BEFORE_3_9:
    _BACKWARD_STAGES[90, 16] = 3


def shipped(problem: Problem) -> Tiles:
    """Return the tiles of the shipped table."""
    if problem.kernel in HALO_KERNELS:
        return _halo_tiles(problem)
    if problem.dtype.itemsize > 2:
        return _WIDE[problem.architecture][problem.kernel][problem.width]
    return _RASTER[problem.architecture][problem.kernel][problem.width]


def _halo_tiles(problem: Problem) -> HaloTiles:
    """Few positions, whose halo is small; more where the batch is too small to fill a tile.

    Backward holds the gradients of the halo's keys and values beside two tiles of scores: where
    these outgrow the registers, it takes fewer rows, and at last more warps.
    """
    if problem.dtype.itemsize > 2:
        return _on_grid(_wide_halo_tiles(problem), problem.geometry)
    forward = problem.kernel == "halo_forward"
    large, small = HaloTiles(2, 2, 16), HaloTiles(4, 4, 4)
    if problem.batch <= 8 and (forward or small.halo(problem.geometry) <= 128 >= 4 * problem.width):
        tiles = small
    else:
        tiles = large
    tiles = _on_grid(tiles, problem.geometry)
    if forward:
        return tiles
    numbers = triton.next_power_of_2(tiles.halo(problem.geometry)) * problem.width
    if (problem.architecture, problem.width, numbers) == (80, 64, 4096):
        return dataclasses.replace(tiles, rows=1, columns=1, images=64, stages=1)
    if numbers >= 8192:
        tiles = dataclasses.replace(tiles, images=4, warps=8 if numbers > 8192 else 4)
    # One stage keeps registers free, but for these.
    stages = _BACKWARD_STAGES.get((problem.architecture, problem.width), 1)
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
        if problem.architecture == 80 and problem.width < 64:
            # Sixteen rows are not shared out there, and 64 cost a third of the clocks: the one
            # place where registers spill.
            tiles = dataclasses.replace(tiles, images=4 * tiles.images)
        return tiles
    if problem.batch <= 8:
        return pair
    few = halo <= 128 and problem.width < 64
    return HaloTiles(2, 2, 16, stages=1) if few else HaloTiles(1, 1, 64, stages=1, part=64)


def _on_grid(tiles: HaloTiles, geometry: Geometry) -> HaloTiles:
    """No more positions than the grid has, and more images instead."""
    rows = min(tiles.rows, triton.next_power_of_2(geometry.height))
    columns = min(tiles.columns, triton.next_power_of_2(geometry.width))
    images = tiles.images * tiles.rows * tiles.columns // (rows * columns)
    return dataclasses.replace(tiles, rows=rows, columns=columns, images=images)


# Tuned tiles.


def tuned_file() -> Path:
    """Return the file of tuned tiles: RLR_FAST_TILES, else in the user's cache folder."""
    named = os.environ.get("RLR_FAST_TILES")
    if named:
        return Path(named)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "rlr_fast" / "tiles.json"


def with_tuned(problem: Problem, tiles: Tiles) -> str:
    """Return the new text of `tuned_file`: what it holds, and the tiles of one more problem.

    Raises:
        ValueError: The file is damaged.
    """
    content = read_tuned()
    machine = content.setdefault(_machine(problem.device), {})
    machine[problem.key()] = dataclasses.asdict(tiles)
    return json.dumps(content, indent=2)


def forget_tuned() -> None:
    """Read the file of tuned tiles again at the next launch."""
    _tuned.cache_clear()


@torch.compiler.assume_constant_result
def _machine(device: torch.device) -> str:
    """A measurement holds for one kind of GPU and one compiler."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    return f"{name}, Triton {triton.__version__}"


def read_tuned() -> dict[str, dict[str, dict[str, Any]]]:
    """Return what `tuned_file` holds: the fields of the tiles, by machine and problem.

    Raises:
        ValueError: The file is damaged.
    """
    path = tuned_file()
    try:
        text = path.read_text()
    except FileNotFoundError:
        return {}
    try:
        content = json.loads(text)
        if not isinstance(content, dict):
            raise ValueError("not a table")
        return content
    except ValueError as error:
        raise ValueError(
            f"the file of tuned tiles, {path}, is damaged ({error}); delete it, or tune again"
        ) from error


@functools.cache
def _tuned(machine: str) -> dict[str, Tiles]:
    entries = read_tuned().get(machine, {})
    try:
        return {
            key: (HaloTiles if key.split()[0] in HALO_KERNELS else RasterTiles)(**fields)
            for key, fields in entries.items()
        }
    except TypeError as error:
        raise ValueError(
            f"the file of tuned tiles, {tuned_file()}, has unknown fields ({error}); delete it, or "
            "tune again"
        ) from error
