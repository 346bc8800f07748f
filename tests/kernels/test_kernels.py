"""The Triton kernels against the definition: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from attention_cases import (
    DEVICE,
    EXACT,
    LCA,
    MLKA,
    ON_GPU,
    OPERATORS,
    make_inputs,
    results,
)
from tolerances import assert_within_budget, rounded_terms
from torch import Tensor
from torch.autograd import forward_ad

from rlr_fast import RLRModel
from rlr_fast.functional import (
    block_attention,
    prepare_reference,
    unsupported_reason,
)
from rlr_fast.kernels import _launch, block, lca, mlka, reference
from rlr_fast.kernels._choice import forced
from rlr_fast.kernels._launch import Geometry, Target
from rlr_fast.kernels._softmax import exp2
from rlr_fast.kernels.tiles import KERNELS, HaloTiles, Problem, RasterTiles, candidates

# A GPU multiplies no float64 here, and the interpreter no bfloat16.
DTYPES = [
    torch.float32,
    torch.float16,
    pytest.param(
        torch.float64, marks=pytest.mark.skipif(ON_GPU, reason="float64 is for the interpreter")
    ),
    pytest.param(
        torch.bfloat16, marks=pytest.mark.skipif(not ON_GPU, reason="bfloat16 needs a GPU")
    ),
]


@pytest.fixture(params=["atomic", "deterministic"])
def mode(request, monkeypatch) -> Iterator[str]:
    """Both kinds of backward, each with uninitialized memory full of NaN."""
    if request.param == "atomic":
        torch.use_deterministic_algorithms(False)
        for name in ("empty", "empty_like"):
            plain = getattr(torch, name)

            def poisoned(*args: Any, _plain: Any = plain, **kwargs: Any) -> Tensor:
                tensor = _plain(*args, **kwargs)
                return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor

            monkeypatch.setattr(torch, name, poisoned)
    yield request.param
    torch.use_deterministic_algorithms(True, warn_only=True)


def small_raster_tiles(blocks: int = 1) -> dict[str, RasterTiles]:
    """Tiles of 16, so that a small grid has many of them and ragged ends."""
    tiles = RasterTiles(16, 16, blocks, stages=1)
    return {name: tiles for name in ("raster_forward", "raster_key", "raster_query")}


def check(operator: Callable[..., Tensor], inputs: list[Tensor], *args: Any) -> dict[str, Tensor]:
    """Compare the kernels with the definition, forward and backward."""
    actual = results(operator, inputs, *args, backend="triton")
    exact = results(operator, [x.double() for x in inputs], *args, backend="dense")
    if inputs[0].dtype == torch.float64:
        for name in actual:
            torch.testing.assert_close(
                actual[name], exact[name], rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
            )
        return actual
    eager = results(operator, inputs, *args, backend="dense")
    terms = rounded_terms(inputs)
    for name in actual:
        assert_within_budget(name, actual[name], eager[name], exact[name], terms[name])
    return actual


# Equal to the definition.


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(
    ("grid", "window", "batch"),
    [
        pytest.param((8, 8), 5, 3, id="even-grid"),
        pytest.param((7, 9), 5, 1, id="odd-grid"),
        pytest.param((5, 13), (3, 7), 2, id="window-not-square"),
        pytest.param((1, 1), 3, 3, id="one-token"),
        pytest.param((1, 37), 5, 2, id="one-row-of-tokens"),
        pytest.param((37, 1), 5, 2, id="one-column-of-tokens"),
        pytest.param((6, 6), 1, 2, id="window-of-one"),
        pytest.param((5, 5), 5, 2, id="window-covers-grid-from-center"),
        pytest.param((5, 5), 11, 2, id="window-covers-grid"),
        pytest.param((4, 20), (9, 3), 2, id="window-higher-than-grid"),
        pytest.param((3, 6), 3, 17, id="batch-beyond-a-tile"),
    ],
)
def test_kernels_equal_definition(operator, grid, window, batch, mode):
    with forced(**small_raster_tiles()):
        check(operator, make_inputs(operator, grid, batch, heads=1), grid, window)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("width", [16, 32, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_err_as_little_as_eager(operator, width, dtype, mode):
    check(operator, make_inputs(operator, (7, 10), 2, 2, width, dtype), (7, 10), 5)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("window", [3, 7, 11, 13, 15, 17, 31, (1, 31), (31, 3)], ids=str)
def test_kernels_equal_definition_for_every_size_of_window(operator, window):
    check(operator, make_inputs(operator, (16, 16), 2, 1), (16, 16), window)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_strided_inputs(operator, dtype, mode):
    inputs = make_inputs(operator, (6, 7), dtype=dtype, strided=True)
    assert not inputs[0].is_contiguous()
    inputs[3] = inputs[3].contiguous()  # other strides than the query's
    with forced(**small_raster_tiles()):
        check(operator, inputs, (6, 7), 3)


@pytest.mark.parametrize("operator", OPERATORS)
def test_columns_need_not_be_adjacent(operator):
    inputs = [x.mT.contiguous().mT for x in make_inputs(operator, (6, 7))]
    assert inputs[0].stride(-1) != 1
    check(operator, inputs, (6, 7), 3)


@pytest.mark.parametrize("operator", OPERATORS)
def test_gradient_of_a_sum_is_an_expanded_scalar(operator):
    inputs = make_inputs(operator, (6, 7))
    inputs[3] = torch.ones((), dtype=EXACT, device=DEVICE).expand_as(inputs[0])
    check(operator, inputs, (6, 7), 3)


def test_value_shared_over_the_batch(mode):
    with forced(**small_raster_tiles()):
        check(MLKA, make_inputs(MLKA, (5, 7), 3, 1, shared_value=True), (5, 7), 3)


@pytest.mark.parametrize("programs", [1, 10_000], ids=["one-chunk", "image-a-chunk"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_key_gradient_sums_over_the_batch_in_any_chunks(operator, programs, monkeypatch, mode):
    monkeypatch.setattr(_launch, "PROGRAMS", programs)
    tiles = HaloTiles(2, 2, 4)
    with forced(**small_raster_tiles(), halo_forward=tiles, halo_backward=tiles):
        check(operator, make_inputs(operator, (4, 6), 9, 1), (4, 6), 3)


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
        check(operator, make_inputs(operator, grid, 2, 2), grid, 31 if operator is LCA else 3)


@pytest.mark.parametrize("grid", [(8, 8), (11, 12)], ids=str)
def test_shipped_tiles_of_a_grid_of_one_block(grid, mode):
    check(MLKA, make_inputs(MLKA, grid, 2, 2, dtype=torch.float16), grid, 3)


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
        check(LCA, make_inputs(LCA, (5, 9), 5, 1), (5, 9), (3, 5))


@pytest.mark.parametrize("operator", OPERATORS)
def test_common_offset_of_keys_costs_no_accuracy(operator):
    inputs = make_inputs(operator, (6, 6), dtype=torch.float32)
    inputs[1] += 1e4  # an offset of all scores of a row, which no softmax sees
    plain = [x.double() for x in inputs]
    plain[1] -= 1e4
    actual = results(operator, inputs, (6, 6), 3, backend="triton")
    exact = results(operator, plain, (6, 6), 3, backend="dense")
    for name in actual:
        torch.testing.assert_close(actual[name].double(), exact[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("scaled", "factor", "low", "high"),
    [
        pytest.param(0, 1, 0, 16, id="certified"),
        pytest.param(0, 3, 16, 50, id="beyond-what-float16-holds"),
        pytest.param(0, 12, 50, 130, id="online"),
        pytest.param(1, 60, 300, 2000, id="online-by-the-keys-of-a-head"),
    ],
)
def test_softmax_with_and_without_a_maximum(scaled, factor, low, high, dtype, mode):
    inputs = make_inputs(MLKA, (6, 8), dtype=dtype)
    inputs[0].clamp_(-1, 1)
    # One head of two; a weight of 2**score without its maximum overflows where there must be one.
    inputs[scaled][..., 1, :, :] *= factor
    _, bound = reference.prepare_key(inputs[1], 16**-0.5)
    largest = inputs[0].float().norm(dim=-1).amax((0, 2)) * bound
    assert low < largest[1] < high
    assert largest[0] < 16
    with forced(**small_raster_tiles()):
        check(MLKA, inputs, (6, 8), 3)


@pytest.mark.skipif(ON_GPU, reason="float64 is for the interpreter")
@pytest.mark.parametrize(
    ("sign", "window"),
    [
        pytest.param(1, 3, id="powers-overflow"),
        pytest.param(-1, 1, id="powers-vanish"),
    ],
)
def test_local_softmax_takes_the_maximum_where_sums_are_out_of_range(sign, window):
    """Scores of ±2000 in one head of one image; the powers of float64 end at 2**±1074."""
    inputs = make_inputs(LCA, (4, 5), 3, dtype=torch.float64)
    key = inputs[1][1] - inputs[1][1].mean(0)
    # Of a token and its own key.
    inputs[0][1, 1] = sign * 2000 * key / key.square().sum(-1, keepdim=True) * 16**0.5
    check(LCA, inputs, (4, 5), window)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("dtype", DTYPES[:1], ids=str)
def test_hidden_keys_stay_hidden_whatever_their_score(operator, dtype):
    inputs = make_inputs(operator, (6, 6), dtype=dtype)
    for x in inputs[:2]:
        x *= 3e4
    actual = results(operator, inputs, (6, 6), 3, backend="triton")["output"]
    exact = results(operator, [x.double() for x in inputs], (6, 6), 3, backend="dense")["output"]
    torch.testing.assert_close(actual.double(), exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("operator", OPERATORS)
def test_scores_of_any_size_stay_finite(operator):
    inputs = make_inputs(operator, (6, 6), dtype=torch.float32)
    inputs[0] *= 1e6
    found = results(operator, inputs, (6, 6), 3, backend="triton")
    assert all(x.isfinite().all() for x in found.values())
    assert found["output"].abs().max() <= inputs[2].abs().max() * 1.0001


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


@pytest.mark.parametrize("operator", OPERATORS)
def test_deterministic_mode_is_bitwise_equal_over_runs(operator):
    torch.use_deterministic_algorithms(True)
    inputs = make_inputs(operator, (8, 8), 5, dtype=torch.float32)
    with forced(**small_raster_tiles()):
        first, second = (results(operator, inputs, (8, 8), 3, backend="triton") for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name])


@pytest.mark.parametrize("operator", OPERATORS)
def test_deterministic_mode_adds_nothing_atomically(operator):
    inputs = make_inputs(operator, (8, 8), 2)
    for strict in (False, True):
        torch.use_deterministic_algorithms(strict)
        with forced(**small_raster_tiles()), _launch.recorded() as launches:
            results(operator, inputs, (8, 8), 3, backend="triton")
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
        monkeypatch.setattr(lca, "_LARGEST_PARTS", 5 * 2 * 32 * 16 * inputs[0].element_size())
        with _launch.recorded() as launches:
            results(LCA, inputs, (7, 6), (3, 5), backend="triton")
        parts = [x.arguments[0] for x in launches if x.kernel is lca.gather_kernel]
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
    gathers = [x.arguments for x in launches if x.kernel is lca.gather_kernel]
    sizes = [sum(x.numel() * x.element_size() for x in found[:2]) for found in gathers]
    assert len(sizes) > 1
    assert max(sizes) <= 256 * 2**20
    # Every key is summed, and a sum begins where the one before has ended.
    ranges = [(found[7], found[8], found[9]) for found in gathers]
    assert ranges[0][0] == ranges[0][2] == 0
    assert ranges[-1][1] == 256 * 256
    for (_, end, _), (first, _, summed) in pairwise(ranges):
        assert first <= end == summed


# Powers of two.


@triton.jit
def _powers(x, y, FMA_EXP2_EIGHTHS: tl.constexpr):
    offs = tl.arange(0, 16)[:, None] * 64 + tl.arange(0, 64)[None, :]
    tl.store(y + offs, exp2(tl.load(x + offs), FMA_EXP2_EIGHTHS))


@pytest.mark.parametrize("fma_exp2_eighths", [0, 1, 2, 3, 8])
def test_powers_of_two_on_fma_units(fma_exp2_eighths):
    x = torch.empty(16, 64, device=DEVICE).uniform_(-126, 126)
    x[0, ::2] = torch.arange(-16, 16).float() / 2  # whole and half: ends of the cubic
    y = torch.empty_like(x)
    _powers[(1,)](x, y, FMA_EXP2_EIGHTHS=fma_exp2_eighths)
    error = (y.double() / x.double().exp2() - 1).abs()
    assert error.max() < (8e-5 if fma_exp2_eighths else 1e-6)
    cubic = error.amax(0) > 1e-6  # which columns the cubic computed
    assert cubic.sum() == 8 * fma_exp2_eighths


# Registration.


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("operator", OPERATORS)
def test_operators_pass_opcheck(operator):
    module = lca if operator is LCA else mlka.op
    query, key, value, _ = (
        x.requires_grad_() for x in make_inputs(operator, (3, 4), batch=2, dtype=torch.float32)
    )
    torch.library.opcheck(reference._prepare, (key, 0.25))
    prepared, bound = reference.prepare_key(key.detach(), 0.25)
    arguments = (query, prepared.requires_grad_(), bound, value, [3, 4], [3, 3])
    torch.library.opcheck(module._forward, arguments)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("window", [3, 31], ids=["halo", "raster"])
def test_block_operator_passes_opcheck(window):
    projected = torch.randn(2, 12, 96, device=DEVICE, requires_grad=True)
    keys = torch.randn(4, 12, 16, device=DEVICE, requires_grad=True)
    value = torch.randn(2, 12, 16, device=DEVICE, requires_grad=True)
    bound = torch.ones(4, device=DEVICE)
    torch.library.opcheck(block._forward, (projected, keys, bound, value, [3, 4], [window, window]))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("operator", OPERATORS)
def test_compiles_without_a_graph_break(operator):
    torch.compiler.reset()
    inputs = make_inputs(operator, (6, 6), dtype=torch.float32)
    compiled = torch.compile(operator, backend="aot_eager", fullgraph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        actual = results(compiled, inputs, (6, 6), 3, backend="triton")
    expected = results(operator, inputs, (6, 6), 3, backend="triton")
    for name in actual:
        torch.testing.assert_close(actual[name], expected[name])


@pytest.mark.parametrize("operator", OPERATORS)
def test_second_derivative_is_refused(operator):
    inputs = make_inputs(operator, (4, 4))
    query, key, value = (x.requires_grad_() for x in inputs[:3])
    output = operator(query, key, value, (4, 4), 3, backend="triton")
    (grad,) = torch.autograd.grad(output, query, inputs[3].requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiated twice.*dense"):
        grad.sum().backward()


@pytest.mark.parametrize("operator", OPERATORS)
def test_forward_mode_is_refused(operator):
    query, key, value, tangent = make_inputs(operator, (4, 4))

    def attend(x: Tensor) -> Tensor:
        return operator(x, key, value, (4, 4), 3, backend="triton")

    with pytest.raises(RuntimeError, match=r"no forward-mode derivative.*dense"):
        torch.func.jvp(attend, (query,), (tangent,))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
        attend(forward_ad.make_dual(query, tangent))


def test_forward_mode_through_a_block_is_refused():
    projected = torch.randn(42, 96, device=DEVICE)
    tokens = torch.randn(2, 42, 96, device=DEVICE)
    prepared = prepare_reference(projected, 2, "triton")
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(tokens, tokens)
        with pytest.raises(RuntimeError, match="forward-mode"):
            block_attention(dual, prepared, (6, 7), 3)
        with pytest.raises(RuntimeError, match="forward-mode"):
            prepare_reference(forward_ad.make_dual(projected, projected), 2, "triton")


@pytest.mark.parametrize("operator", OPERATORS)
def test_checkpointed_gradients_are_the_same(operator):
    inputs = make_inputs(operator, (5, 6))

    def checkpointed(*args: Any, **options: Any) -> Tensor:
        return torch.utils.checkpoint.checkpoint(operator, *args, use_reentrant=False, **options)

    actual = results(checkpointed, inputs, (5, 6), 3, backend="triton")
    expected = results(operator, inputs, (5, 6), 3, backend="triton")
    for name in actual:
        assert torch.equal(actual[name], expected[name])


# Refusals.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"key": torch.zeros(2, 2, 12, 16)}, "batch shares", id="key-a-image"),
        pytest.param({"width": 8}, "head width d of 16, 32, 64, 128, got 8", id="width"),
        pytest.param(
            {"dtype": torch.float64 if ON_GPU else torch.bfloat16},
            "float64" if ON_GPU else "bit patterns of bfloat16",
            id="dtype",
        ),
    ],
)
@pytest.mark.parametrize("operator", OPERATORS)
def test_refusal_gives_the_reason(operator, change, message):
    width, dtype = change.get("width", 16), change.get("dtype", torch.float32)
    inputs = make_inputs(operator, (3, 4), width=width, dtype=dtype)
    key = change["key"].to(DEVICE) if "key" in change else inputs[1]
    with pytest.raises(RuntimeError, match=message):
        operator(inputs[0], key, inputs[2], (3, 4), 3, backend="triton")
    expected = operator(inputs[0], key, inputs[2], (3, 4), 3, backend="tiled")
    found = operator(inputs[0], key, inputs[2], (3, 4), 3, backend="auto")
    assert torch.equal(found, expected)


def test_local_attention_needs_a_value_that_the_batch_shares():
    inputs = make_inputs(LCA, (3, 4), dtype=torch.float32, shared_value=False)
    with pytest.raises(RuntimeError, match="key and value that the batch shares"):
        LCA(*inputs[:3], (3, 4), 3, backend="triton")


@pytest.mark.skipif(ON_GPU, reason="a GPU runs the kernels")
def test_a_cpu_without_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setattr(_launch, "INTERPRETING", False)
    reason = unsupported_reason("triton", "cpu")
    assert reason is not None
    assert "NVIDIA GPU" in reason


def test_import_without_triton():
    program = """
        import sys
        sys.modules["triton"] = None
        import torch
        from rlr_fast import RLRModel
        from rlr_fast.functional import local_cross_attention, unsupported_reason
        print(unsupported_reason("triton", "cpu"))
        query, key = torch.randn(1, 1, 4, 16), torch.randn(1, 4, 16)
        print(local_cross_attention(query, key, key, (2, 2), 1).shape)
        try:
            local_cross_attention(query, key, key, (2, 2), 1, backend="triton")
        except RuntimeError as error:
            print(error)
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True
    )
    assert "triton is not installed" in run.stdout
    assert "torch.Size([1, 1, 4, 16])" in run.stdout
    assert "backend 'triton' cannot run here" in run.stdout


# The block and the model.


@pytest.mark.parametrize("window", [3, 31], ids=["halo", "raster"])
def test_block_attention_equals_definition(window, mode):
    heads, width, grid = 2, 16, (6, 7)
    projected = torch.randn(3, 42, 3 * heads * width, dtype=EXACT, device=DEVICE)
    keys = torch.randn(42, 3 * heads * width, dtype=EXACT, device=DEVICE)
    grad = torch.randn(3, 42, 2 * heads * width, dtype=EXACT, device=DEVICE)
    found = {}
    for backend in ("triton", "dense"):
        leaves = (projected.clone().requires_grad_(), keys.clone().requires_grad_())
        with forced(**small_raster_tiles()):
            prepared = prepare_reference(leaves[1], heads, backend)
            output = block_attention(leaves[0], prepared, grid, window)
            found[backend] = (output, *torch.autograd.grad(output, leaves, grad))
    tolerance = 1e-4 if ON_GPU else 1e-12
    for actual, exact in zip(found["triton"], found["dense"], strict=True):
        torch.testing.assert_close(actual, exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", ["dense", "triton"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[:, 1:], r"projected must be \(B, 42, 96\)"),
        (lambda x: x[..., :64], r"projected must be \(B, 42, 96\)"),
        (lambda x: x[0], r"projected must be \(B, 42, 96\)"),
        (lambda x: x.half(), "projected must be torch.float32 on .* got torch.float16"),
    ],
    ids=["tokens", "channels", "no-batch", "dtype"],
)
def test_block_attention_refuses_what_does_not_fit_the_reference(change, message, backend):
    reference = prepare_reference(torch.randn(42, 96, device=DEVICE), 2, backend)
    projected = torch.randn(3, 42, 96, device=DEVICE)
    with pytest.raises(ValueError, match=message):
        block_attention(change(projected), reference, (6, 7), 3)
    with pytest.raises(ValueError, match="grid must have H·W = N = 42"):
        block_attention(projected, reference, (6, 6), 3)
    with pytest.raises(ValueError, match="window must be odd"):
        block_attention(projected, reference, (6, 7), 4)


def test_reference_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"projected must be \(N, 3·h·d\) with heads=2 h, got"):
        prepare_reference(torch.randn(42, 94), 2)
    with pytest.raises(ValueError, match="heads must be a positive integer, got heads=0"):
        prepare_reference(torch.randn(42, 96), 0)
    with pytest.raises(ValueError, match=r"projected must be float32.*got dtype torch.int64"):
        prepare_reference(torch.zeros(42, 96, dtype=torch.int64), 2)


@pytest.mark.skipif(not ON_GPU, reason="CUDA graphs need a GPU")
def test_block_attention_replays_in_a_cuda_graph(mode):
    leaves = [torch.randn(s, device=DEVICE, requires_grad=True) for s in ((3, 42, 96), (42, 96))]
    grad = torch.randn(3, 42, 64, device=DEVICE)

    def step() -> tuple[Tensor, ...]:
        output = block_attention(leaves[0], prepare_reference(leaves[1], 2, "triton"), (6, 7), 3)
        return (output, *torch.autograd.grad(output, leaves, grad))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step()
    with torch.no_grad():
        for leaf in leaves:
            leaf.copy_(torch.randn_like(leaf))
    graph.replay()
    for actual, expected in zip(replayed, step(), strict=True):
        torch.testing.assert_close(actual, expected)


def test_model_is_the_same_on_every_path(small, mode, tmp_path):
    config = replace(small, hidden=(32, 64), heads=(2, 2), blocks=2)
    torch.manual_seed(1)
    RLRModel(config, backend="dense").save_pretrained(tmp_path)
    images = torch.randn(3, 3, *config.image_size, device=DEVICE)
    losses, grads = {}, {}
    for backend in ("dense", "tiled", "triton"):
        model = RLRModel.from_pretrained(tmp_path, backend=backend).to(DEVICE).train()
        torch.manual_seed(2)
        losses[backend] = model.loss(images)
        losses[backend].backward()
        grads[backend] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    for backend in ("tiled", "triton"):
        torch.testing.assert_close(losses[backend], losses["dense"], rtol=1e-5, atol=0)
        assert grads[backend].keys() == grads["dense"].keys()
        for name, grad in grads[backend].items():
            expected = grads["dense"][name]
            scale = float(expected.abs().max())
            torch.testing.assert_close(grad, expected, rtol=1e-3, atol=1e-4 * scale + 1e-9)


def test_geometry_clips_windows_to_the_grid():
    assert Geometry.of((3, 5), (31, 3)) == Geometry(3, 5, 2, 1)


# Tiles.


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
