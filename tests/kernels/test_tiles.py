"""Tiles of every form, and chunks of a batch, give what the definition gives."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import triton
from attention_cases import DEVICE, LCA, MLKA, OPERATORS, make_inputs
from kernel_cases import check, small_raster_tiles

from rlr_fast.kernels import _launch, mlka
from rlr_fast.kernels._choice import forced
from rlr_fast.kernels._launch import Geometry, Target
from rlr_fast.kernels.tiles import KERNELS, HaloTiles, Problem, RasterTiles, candidates


@pytest.mark.parametrize(
    "tiles",
    [RasterTiles(16, 32), RasterTiles(32, 16), RasterTiles(16, 16, 2), RasterTiles(64, 64, 2)],
    ids=["wide", "high", "two-blocks", "whole-grid"],
)
def test_tiles_of_every_form(tiles, mode):
    everywhere = {name: tiles for name in ("raster_forward", "raster_key", "raster_query")}
    with forced(**everywhere):
        check(MLKA, make_inputs(MLKA, (7, 11), 2, 1), (7, 11), 5)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("grid", [(4, 4), (6, 8)], ids=["one-block", "three-blocks"])
def test_two_blocks_a_program_where_the_last_lies_beyond_the_grid(operator, grid, mode):
    """N is a multiple of a block and no multiple of two: nothing may be touched behind N."""
    with forced(**small_raster_tiles(blocks=2)):
        check(operator, make_inputs(operator, grid, 2, 1), grid, 31 if operator is LCA else 3)


@pytest.mark.parametrize("grid", [(8, 8), (11, 12)], ids=str)
def test_shipped_tiles_of_a_grid_of_one_block(grid, mode):
    check(MLKA, make_inputs(MLKA, grid, 2, 1, dtype=torch.float16), grid, 3)


@pytest.mark.parametrize(
    ("grid", "kernels"),
    [
        pytest.param((16, 16), {"atomic": "key", "deterministic": "key"}, id="one-block"),
        pytest.param(
            (16, 17), {"atomic": "delta key", "deterministic": "query key"}, id="more-blocks"
        ),
    ],
)
def test_backward_launches_no_more_than_it_needs(grid, kernels, mode):
    """A program that holds all keys needs no sum of dQ; delta comes with dQ where it can."""
    torch.use_deterministic_algorithms(mode == "deterministic")
    key = torch.empty((1, math.prod(grid), 16), dtype=torch.float16, device=DEVICE)
    rows = key[None]
    with _launch.recorded() as launches:
        lse, geometry = rows[..., 0].float(), Geometry.of(grid, (3, 3))
        mlka.launch_backward(rows, rows, key, rows, rows, lse, rows, rows, geometry, inside=False)
    names = [launch.kernel.__name__ for launch in launches]
    expected = {"delta": "delta_kernel", "key": "backward_key_kernel"}
    expected["query"] = "backward_query_kernel"
    assert names == [expected[name] for name in kernels[mode].split()]


@pytest.mark.parametrize(
    "tiles",
    [HaloTiles(1, 1, 16), HaloTiles(4, 2, 4), HaloTiles(8, 8, 1), HaloTiles(1, 4, 8)],
    ids=str,
)
def test_halos_of_every_form(tiles, mode):
    with forced(halo_forward=tiles, halo_backward=tiles):
        check(LCA, make_inputs(LCA, (5, 6), 5, 1), (5, 6), (3, 5))


@pytest.mark.parametrize("programs", [1, 10_000], ids=["one-chunk", "image-a-chunk"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_key_gradient_sums_over_the_batch_in_any_chunks(operator, programs, monkeypatch, mode):
    monkeypatch.setattr(_launch, "PROGRAMS", programs)
    tiles = HaloTiles(2, 2, 4)
    with forced(**small_raster_tiles(), halo_forward=tiles, halo_backward=tiles):
        check(operator, make_inputs(operator, (4, 6), 9, 1), (4, 6), 3)


@pytest.mark.parametrize("architecture", sorted(_launch.SHARED))
def test_every_tile_of_the_table_fits_its_kernel(architecture):
    geometry, target = Geometry.of((16, 16), (5, 5)), Target.of(architecture)
    for kernel, width, few in itertools.product(KERNELS, (16, 32, 64, 128), (True, False)):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            offered = candidates(Problem(kernel, geometry, width, few, dtype, target))
            assert offered or kernel.startswith("halo")
            for tiles in offered:
                if isinstance(tiles, HaloTiles):
                    assert tiles.queries >= 16
                    assert tiles.queries == triton.next_power_of_2(tiles.queries)
                else:
                    # Eight warps on fewer than 128 rows of a warp group compute scores twice.
                    rows = tiles.keys if kernel == "raster_key" else tiles.queries
                    assert tiles.warps == 4 or rows >= 128 or architecture not in (90, 100)
