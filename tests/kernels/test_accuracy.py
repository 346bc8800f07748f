"""The kernels err as little as eager PyTorch, whatever the dtype and the size of the scores."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from attention_cases import DEVICE, LCA, MLKA, ON_GPU, OPERATORS, make_inputs, results
from kernel_cases import DTYPES, check, small_raster_tiles

from rlr_fast.kernels import reference
from rlr_fast.kernels._choice import forced
from rlr_fast.kernels._softmax import exp2


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(
    ("width", "mode"),
    [(16, "atomic"), (32, "deterministic"), (64, "atomic"), (128, "deterministic")],
    indirect=["mode"],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_err_as_little_as_eager(operator, width, dtype, mode):
    """With the tiles of the table: several blocks of tokens, the last of them a part."""
    grid = (3, 5) if operator is LCA else (5, 14)
    check(operator, make_inputs(operator, grid, 2, 1, width, dtype), grid, 5)


@pytest.mark.parametrize("operator", OPERATORS)
def test_common_offset_of_keys_costs_no_accuracy(operator):
    inputs = make_inputs(operator, (4, 5), dtype=torch.float32)
    inputs[1] += 1e4  # an offset of all scores of a row, which no softmax sees
    plain = [x.double() for x in inputs]
    plain[1] -= 1e4
    actual = results(operator, inputs, (4, 5), 3, backend="triton")
    exact = results(operator, plain, (4, 5), 3, backend="dense")
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
def test_softmax_with_and_without_a_maximum(scaled, factor, low, high, dtype):
    inputs = make_inputs(MLKA, (6, 8), 1, dtype=dtype)
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
    inputs = make_inputs(operator, (4, 5), heads=1, dtype=dtype)
    for x in inputs[:2]:
        x *= 3e4
    actual = results(operator, inputs, (4, 5), 3, backend="triton")["output"]
    exact = results(operator, [x.double() for x in inputs], (4, 5), 3, backend="dense")["output"]
    torch.testing.assert_close(actual.double(), exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("operator", OPERATORS)
def test_scores_of_any_size_stay_finite(operator):
    inputs = make_inputs(operator, (4, 5), heads=1, dtype=torch.float32)
    inputs[0] *= 1e6
    found = results(operator, inputs, (4, 5), 3, backend="triton")
    assert all(x.isfinite().all() for x in found.values())
    assert found["output"].abs().max() <= inputs[2].abs().max() * 1.0001


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
