"""Preparation of a reference's keys: the kernel against its equation."""

from __future__ import annotations

import math

import pytest
import torch
from gpu import DEVICE

from rlr_fast.kernels import reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
if DEVICE.type == "cpu":
    DTYPES.insert(0, torch.float64)  # for the interpreter alone


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("heads", "tokens", "width"),
    [
        pytest.param(2, 5, 16, id="less-than-a-tile"),
        pytest.param(3, 700, 64, id="many-tiles-and-a-part"),
        pytest.param(2, 1024, 16, id="whole-tiles"),
    ],
)
@pytest.mark.parametrize("strided", [False, True])
def test_keys_are_centered_and_scaled_and_bounded(heads, tokens, width, strided, dtype):
    scale = 0.3
    rows = 3 + torch.randn(tokens, heads * width, dtype=torch.float64)
    # As a projection leaves them: heads side by side.
    key = rows.to(DEVICE, dtype).unflatten(1, (heads, width)).transpose(0, 1)
    prepared, bound = reference.prepare_key(key if strided else key.contiguous(), scale)
    exact = key.double()
    exact = scale * math.log2(math.e) * (exact - exact.mean(1, keepdim=True))
    assert prepared.is_contiguous() and prepared.dtype == dtype
    eps = torch.finfo(dtype).eps
    # The mean is a long sum of numbers near 3.
    torch.testing.assert_close(prepared.double(), exact, rtol=2 * eps, atol=64 * min(eps, 1e-6))
    largest = prepared.double().norm(dim=-1).amax(1)
    torch.testing.assert_close(bound.double(), largest, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_huge_key_is_not_rounded_into_the_others(dtype):
    key = torch.randn(2, 64, 16, dtype=torch.float64).to(DEVICE, dtype)
    key[0, 5, 3] = 6e4
    prepared, _ = reference.prepare_key(key, 0.3)
    exact = 0.3 * math.log2(math.e) * key.double()
    exact[1] -= exact[1].mean(0)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(prepared.double(), exact, rtol=2 * eps, atol=64 * min(eps, 1e-6))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_stays_with_its_key(value):
    key = torch.randn(2, 20, 16, device=DEVICE)
    key[1, 7, 2] = value
    prepared, _ = reference.prepare_key(key, 0.3)
    assert (~prepared.isfinite()).nonzero().tolist() == [[1, 7, 2]]


def test_the_same_keys_give_the_same_bits():
    key = torch.randn(2, 700, 64, device=DEVICE)
    first, second = (reference.prepare_key(key, 0.3) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def test_gradient_needs_no_mean():
    """Gradients of a softmax's scores sum to 0 over the keys, and the mean then gets none."""
    key = torch.randn(2, 20, 16, device=DEVICE, requires_grad=True)
    grad = torch.randn(2, 20, 16, device=DEVICE)
    grad -= grad.mean(1, keepdim=True)
    prepared, _ = reference.prepare_key(key, 0.3)
    (found,) = torch.autograd.grad(prepared, key, grad)
    exact = 0.3 * math.log2(math.e) * (key - key.mean(1, keepdim=True))
    (expected,) = torch.autograd.grad(exact, key, grad)
    torch.testing.assert_close(found, expected)
