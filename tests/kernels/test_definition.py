"""The Triton kernels against the definition: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from attention_cases import DEVICE, EXACT, LCA, MLKA, ON_GPU, OPERATORS, make_inputs, results
from kernel_cases import check, small_raster_tiles

from rlr_fast.config import window_pair
from rlr_fast.kernels._choice import forced
from rlr_fast.kernels._launch import Geometry


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(
    ("grid", "window", "batch"),
    [
        pytest.param((4, 8), 5, 3, id="even-grid"),
        pytest.param((5, 7), 5, 1, id="odd-grid"),
        pytest.param((3, 11), (3, 7), 2, id="window-not-square"),
        pytest.param((1, 1), 3, 3, id="one-token"),
        pytest.param((1, 19), 5, 2, id="one-row-of-tokens"),
        pytest.param((19, 1), 5, 2, id="one-column-of-tokens"),
        pytest.param((6, 6), 1, 2, id="window-of-one"),
        pytest.param((5, 5), 5, 2, id="window-covers-grid-from-center"),
        pytest.param((5, 5), 11, 2, id="window-covers-grid"),
        pytest.param((4, 9), (9, 3), 2, id="window-higher-than-grid"),
        pytest.param((2, 3), 3, 17, id="batch-beyond-a-tile"),
    ],
)
def test_kernels_equal_definition(operator, grid, window, batch, mode):
    with forced(**small_raster_tiles()):
        check(operator, make_inputs(operator, grid, batch, heads=1), grid, window)


@pytest.mark.parametrize("window", [3, 7, 11, 13, 15, 17, (1, 17), (17, 3)], ids=str)
def test_lca_equals_definition_for_every_size_of_window(window):
    """None is clipped to a smaller one: its halo has its own parts, or is too large to keep."""
    height, width = (max(5, side // 2 + 1) for side in window_pair(window))
    check(LCA, make_inputs(LCA, (height, width), 2, 1), (height, width), window)


@pytest.mark.parametrize("window", [11, (1, 17), (17, 3)], ids=str)
def test_mlka_equals_definition_for_large_windows(window):
    check(MLKA, make_inputs(MLKA, (9, 9), 2, 1), (9, 9), window)


@pytest.mark.parametrize("operator", OPERATORS)
def test_strided_inputs(operator, mode):
    inputs = make_inputs(operator, (4, 5), strided=True)
    assert not inputs[0].is_contiguous()
    inputs[3] = inputs[3].contiguous()  # other strides than the query's
    with forced(**small_raster_tiles()):
        check(operator, inputs, (4, 5), 3)


@pytest.mark.parametrize("operator", OPERATORS)
def test_columns_need_not_be_adjacent(operator):
    inputs = [x.mT.contiguous().mT for x in make_inputs(operator, (4, 5))]
    assert inputs[0].stride(-1) != 1
    check(operator, inputs, (4, 5), 3)


@pytest.mark.parametrize("operator", OPERATORS)
def test_gradient_of_a_sum_is_an_expanded_scalar(operator):
    inputs = make_inputs(operator, (4, 5), heads=1)
    inputs[3] = torch.ones((), dtype=EXACT, device=DEVICE).expand_as(inputs[0])
    check(operator, inputs, (4, 5), 3)


def test_value_shared_over_the_batch(mode):
    with forced(**small_raster_tiles()):
        check(MLKA, make_inputs(MLKA, (5, 7), 3, 1, shared_value=True), (5, 7), 3)


def test_row_without_keys_is_zero_and_gives_no_gradient(mode):
    inputs = make_inputs(MLKA, (3, 5), dtype=torch.float32)
    found = results(MLKA, inputs, (3, 5), (3, 5), backend="triton")
    for name in ("output", "dquery"):
        assert (found[name][:, :, 7] == 0).all()  # the center: its window holds all of 3x5
        assert (found[name][:, :, :7].abs().amax(-1) > 0).all()
    inputs[3].zero_()
    inputs[3][:, :, 7] = 1
    found = results(MLKA, inputs, (3, 5), (3, 5), backend="triton")
    assert all((found[name] == 0).all() for name in ("dquery", "dkey", "dvalue"))


@pytest.mark.parametrize("operator", OPERATORS)
def test_empty_batch(operator):
    inputs = make_inputs(operator, (4, 4), batch=0)
    found = results(operator, inputs, (4, 4), 3, backend="triton")
    assert found["output"].shape == (0, 2, 16, 16)
    assert (found["dkey"] == 0).all()


@pytest.mark.skipif(ON_GPU, reason="float64 is for the interpreter")
@pytest.mark.parametrize("operator", OPERATORS)
def test_gradients_of_the_kernels_are_derivatives(operator):
    inputs = make_inputs(operator, (3, 4), batch=1, heads=1)
    leaves = tuple(x.requires_grad_() for x in inputs[:3])
    assert torch.autograd.gradcheck(
        lambda q, k, v: operator(q, k, v, (3, 4), 3, backend="triton"), leaves, fast_mode=True
    )


def test_geometry_clips_windows_to_the_grid():
    assert Geometry.of((3, 5), (31, 3)) == Geometry(3, 5, 2, 1)
