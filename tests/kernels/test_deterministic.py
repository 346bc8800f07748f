"""PyTorch's deterministic algorithms: equal bits, nothing added atomically, bounded memory."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import triton
from attention_cases import LCA, OPERATORS, make_inputs, results
from kernel_cases import check, small_raster_tiles

from rlr_fast.kernels import _launch, lca
from rlr_fast.kernels._choice import forced
from rlr_fast.kernels._launch import Geometry
from rlr_fast.kernels.lca import backward
from rlr_fast.kernels.tiles import HaloTiles


@pytest.mark.parametrize("operator", OPERATORS)
def test_deterministic_mode_is_bitwise_equal_over_runs(operator):
    torch.use_deterministic_algorithms(True)
    inputs = make_inputs(operator, (4, 5), 5, 1, dtype=torch.float32)
    with forced(**small_raster_tiles()):
        first, second = (results(operator, inputs, (4, 5), 3, backend="triton") for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name])


@pytest.mark.parametrize("operator", OPERATORS)
def test_deterministic_mode_adds_nothing_atomically(operator):
    inputs = make_inputs(operator, (4, 5), 2, 1)
    for strict in (False, True):
        torch.use_deterministic_algorithms(strict)
        with forced(**small_raster_tiles()), _launch.recorded() as launches:
            results(operator, inputs, (4, 5), 3, backend="triton")
        constants = [launch.constants for launch in launches]
        adds = [c for c in constants if c.get("ATOMIC") or c.get("DQ") == "add"]
        assert bool(adds) != strict


@pytest.mark.parametrize("programs", [1, 10_000], ids=["one-chunk", "image-a-chunk"])
def test_partial_halos_are_summed_a_few_at_a_time(programs, monkeypatch):
    torch.use_deterministic_algorithms(True)
    monkeypatch.setattr(_launch, "PROGRAMS", programs)
    inputs = make_inputs(LCA, (7, 6), 9, 1)
    with forced(halo_backward=HaloTiles(2, 2, 4)):
        whole = check(LCA, inputs, (7, 6), (3, 5))
        # Of 12 tiles of 4 x 6 keys, held as 32: five at a time, which begin within a row of tiles.
        monkeypatch.setattr(backward, "_LARGEST_PARTS", 5 * 2 * 32 * 16 * inputs[0].element_size())
        with _launch.recorded() as launches:
            results(LCA, inputs, (7, 6), (3, 5), backend="triton")
        parts = [x.arguments[0] for x in launches if x.kernel is backward.gather_kernel]
        few = check(LCA, inputs, (7, 6), (3, 5))
        again = results(LCA, inputs, (7, 6), (3, 5), backend="triton")
    assert len(parts) == triton.cdiv(12 if programs == 1 else 3 * 12, 5)
    assert all(part.shape[0] <= 5 for part in parts)
    assert all(torch.equal(few[name], again[name]) for name in few)
    torch.testing.assert_close(few, whole)


def test_partial_halos_of_a_large_grid_take_bounded_memory():
    """At 256 x 256 tokens all of them would take 2.4 GB."""
    torch.use_deterministic_algorithms(True)
    grid, heads, width = (256, 256), 8, 16
    rows = torch.empty(4, heads, 256 * 256, width, device="meta", dtype=torch.bfloat16)
    shared = rows[0]
    with _launch.recorded() as launches:
        lca.launch_backward(
            rows, rows, shared, shared, rows, rows, rows, Geometry.of(grid, (11, 11))
        )
    gathers = [x.arguments for x in launches if x.kernel is backward.gather_kernel]
    sizes = [sum(x.numel() * x.element_size() for x in found[:2]) for found in gathers]
    assert len(sizes) > 1
    assert max(sizes) <= 256 * 2**20
    # Every key is summed, and a sum begins where the one before has ended.
    ranges = [(found[7], found[8], found[9]) for found in gathers]
    assert ranges[0][0] == ranges[0][2] == 0
    assert ranges[-1][1] == 256 * 256
    for (_, end, _), (first, _, summed) in pairwise(ranges):
        assert first <= end == summed
