"""The kernel of the token distance against its definition: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from gpu import DEVICE
from torch.autograd import forward_ad

from rlr_fast.kernels import distance as kernel
from rlr_fast.models.scoring import distance

SHAPES = [
    pytest.param((2, 33, 40), id="level-1"),
    pytest.param((3, 5, 200), id="channels-beside-a-power-of-two"),
    pytest.param((1, 1, 1), id="one-number"),
    pytest.param((2, 3, 2049), id="a-row-larger-than-a-tile"),
]


def results(reconstructed, original, grad, backend):
    r, o = (x.detach().requires_grad_() for x in (reconstructed, original))
    found = distance(r, o, backend)
    return (found.detach(), *torch.autograd.grad(found, (r, o), grad))


def tokens(shape, dtype=torch.float64):
    return torch.randn(shape, device=DEVICE, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_distance_and_both_gradients_are_those_of_the_definition(shape):
    inputs = tokens(shape), tokens(shape), tokens(shape[:2])
    for actual, exact in zip(results(*inputs, "triton"), results(*inputs, "dense"), strict=True):
        torch.testing.assert_close(actual, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float16),
        (torch.float32, torch.float64),
    ],
    ids=["fp32", "autocast", "fp16", "fp64-original"],
)
def test_each_dtype_is_taken_in_the_wider_of_both_and_float32(first, second):
    r, o = tokens((2, 9, 72), first), tokens((2, 9, 72), second)
    grad = tokens((2, 9), torch.promote_types(torch.promote_types(first, second), torch.float32))
    actual, eager = results(r, o, grad, "triton"), results(r, o, grad, "dense")
    for a, e in zip(actual, eager, strict=True):
        assert a.dtype == e.dtype
        torch.testing.assert_close(a, e)


def test_tokens_without_a_norm():
    r, o, grad = tokens((1, 5, 8)), tokens((1, 5, 8)), tokens((1, 5))
    r[0, 0] = 0
    o[0, 1] = 0
    r[0, 2] = o[0, 2] = 0
    r[0, 3] *= 1e-10  # below the least norm
    for actual, exact in zip(
        results(r, o, grad, "triton"), results(r, o, grad, "dense"), strict=True
    ):
        assert actual.isfinite().all()
        torch.testing.assert_close(actual, exact, rtol=1e-9, atol=1e-12)


def test_equal_tokens_have_no_distance_and_no_gradient():
    r = tokens((1, 4, 16), torch.float32)
    for found in results(r, r.clone(), torch.ones(1, 4, device=DEVICE), "triton"):
        torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-6)


def test_strided_tokens_and_an_expanded_gradient():
    r = tokens((2, 12, 24))[..., ::2].mT  # neither axis is whole
    o = tokens((12, 2, 12)).transpose(0, 1)
    grad = torch.tensor(0.5, device=DEVICE, dtype=torch.float64).expand(2, 12)
    for actual, exact in zip(
        results(r, o, grad, "triton"), results(r, o, grad, "dense"), strict=True
    ):
        torch.testing.assert_close(actual, exact, rtol=1e-12, atol=1e-12)


def test_no_image_has_no_distance():
    r = tokens((0, 6, 8)).requires_grad_()
    found = distance(r, tokens((0, 6, 8)), "triton")
    found.sum().backward()
    assert found.shape == (0, 6) and r.grad.shape == (0, 6, 8)


def test_gradient_agrees_with_differences():
    r, o = (tokens((1, 3, 5)).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(lambda r, o: distance(r, o, "triton"), (r, o))


@pytest.mark.filterwarnings("ignore")
def test_operators_pass_opcheck():
    r, o = (tokens((2, 3, 8), torch.float32).requires_grad_() for _ in range(2))
    torch.library.opcheck(kernel._forward, (r, o))
    grad = tokens((2, 3), torch.float32)
    torch.library.opcheck(kernel._backward, (grad, r.detach(), o.detach()))


def test_compiles_without_a_graph_break():
    torch.compiler.reset()
    compiled = torch.compile(distance, backend="aot_eager", fullgraph=True)
    r, o = (tokens((2, 3, 8), torch.float32).requires_grad_() for _ in range(2))
    torch.testing.assert_close(compiled(r, o, "triton"), distance(r, o))


def test_derivatives_that_the_kernel_lacks_are_refused():
    r, o = (tokens((1, 3, 8)).requires_grad_() for _ in range(2))
    (slope,) = torch.autograd.grad(distance(r, o, "triton").sum(), r, create_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiated twice.*dense"):
        slope.sum().backward()
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
        distance(forward_ad.make_dual(r.detach(), o.detach()), o, "triton")
