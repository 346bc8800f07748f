"""The machine's arithmetic against Python's integers and PyTorch's bfloat16."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.ptx import alu

COUNT = 2000


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def words(rng, bits):
    return rng.integers(0, 2**bits, COUNT, dtype=np.uint64).astype(alu.U[bits])


def field(a: int, position: int, length: int, bits: int, signed: bool) -> int:
    found = (a >> position) & ((1 << length) - 1) if position < bits else 0
    if signed and length and (a >> min(position + length - 1, bits - 1)) & 1:
        found |= ~((1 << length) - 1)
    return found % 2**bits


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [32, 64])
def test_extract_bits(rng, bits, signed):
    a = words(rng, bits)
    position = rng.integers(0, bits + 3, COUNT).astype(np.uint32)
    length = rng.integers(0, bits + 1, COUNT).astype(np.uint32)
    kind = (alu.S if signed else alu.U)[bits]
    found = alu.extract_bits(a.view(kind), position, length).view(alu.U[bits])
    expected = [
        field(int(x), int(p), int(n), bits, signed)
        for x, p, n in zip(a, position, length, strict=True)
    ]
    assert found.tolist() == expected


@pytest.mark.parametrize("bits", [32, 64])
def test_shifts_by_more_than_a_register_holds(rng, bits):
    a = words(rng, bits)
    n = rng.integers(0, 2 * bits, COUNT).astype(np.uint32)
    pairs = [(int(x), int(s)) for x, s in zip(a, n, strict=True)]
    assert alu.shift_left(a, n).tolist() == [(x << s) % 2**bits for x, s in pairs]
    assert alu.shift_right(a, n).tolist() == [x >> s for x, s in pairs]
    signed = a.view(alu.S[bits])
    expected = [int(x) >> int(s) for x, s in zip(signed, n, strict=True)]
    assert alu.shift_right(signed, n).tolist() == expected


def test_high_product(rng):
    a, b = words(rng, 64), words(rng, 64)
    expected = [int(x) * int(y) >> 64 for x, y in zip(a, b, strict=True)]
    assert alu.high_product(a, b).tolist() == expected


def test_division_goes_toward_zero(rng):
    a, b = words(rng, 32).view(np.int32), rng.integers(1, 2000, COUNT).astype(np.int32)
    b[::2] *= -1
    quotients = [int(int(x) / int(y)) for x, y in zip(a, b, strict=True)]
    assert alu.div(a, b).tolist() == quotients
    rests = [int(x) - q * int(y) for x, y, q in zip(a, b, quotients, strict=True)]
    assert alu.remainder(a, b).tolist() == rests


def test_bfloat16_is_rounded_as_by_pytorch(rng):
    x = np.concatenate([rng.standard_normal(COUNT).astype(np.float32), words(rng, 32).view("f4")])
    expected = torch.from_numpy(x).bfloat16().view(torch.int16).numpy().view(np.uint16)
    number = ~np.isnan(x)
    np.testing.assert_array_equal(alu.f32_to_bf16(x)[number], expected[number])
    assert np.isnan(alu.bf16_to_f32(alu.f32_to_bf16(x[~number]))).all()


def permuted(a: int, b: int, selector: int) -> int:
    pool, found = (a | b << 32).to_bytes(8, "little"), 0
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = pool[nibble & 7]
        if nibble & 8:
            byte = 255 if byte & 128 else 0
        found |= byte << 8 * i
    return found


def test_permute_bytes(rng):
    a, b = words(rng, 32), words(rng, 32)
    selector = rng.integers(0, 2**16, COUNT).astype(np.uint32)
    expected = [permuted(int(x), int(y), int(s)) for x, y, s in zip(a, b, selector, strict=True)]
    assert alu.permute_bytes(a, b, selector).tolist() == expected


def test_approximations_err_to_both_sides_by_no_more_than_documented():
    exact = np.linspace(1, 2, COUNT)
    error = (alu.approximate(exact, 2.0**-20).astype(np.float64) - exact) / exact
    assert (error > 0).any() and (error < 0).any()
    assert np.abs(error).max() <= 2.0**-20 + 2.0**-24
