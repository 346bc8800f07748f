"""Muon against its formula by the singular value decomposition, and whose matrices are its own."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import BRIEF, SMALL

from rlr_fast import RLRModel
from rlr_fast.training.distributed import Processes
from rlr_fast.training.muon import Muon, orthogonalized
from rlr_fast.training.steps import Steps


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 48, 12), (1, 8, 40)])
def test_singular_values_are_made_equal_and_vectors_are_kept(shape):
    matrices = torch.randn(shape, dtype=torch.float64)
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    inner = left.mT @ orthogonalized(matrices) @ right.mT
    values = inner.diagonal(dim1=1, dim2=2)
    assert (inner - torch.diag_embed(values)).abs().max() < 1e-12
    assert values.min() > 0.6 and values.max() < 1.3


@pytest.mark.parametrize("shape", [(2, 8, 40), (2, 48, 12)])
def test_long_matrices_in_float32_lose_little_by_their_gram_matrix(shape):
    """Against the iteration itself in float64, with singular values down to a ten-thousandth."""
    short = min(shape[1:])
    left, values, right = torch.linalg.svd(torch.randn(shape).double(), full_matrices=False)
    values = torch.logspace(0, -4, short, dtype=torch.float64)
    matrices = left * values @ right
    scaled = values / values.norm()
    for _ in range(5):
        scaled = 3.4445 * scaled - 4.7750 * scaled**3 + 2.0315 * scaled**5
    result = orthogonalized(matrices.float()).double()
    torch.testing.assert_close(result, left * scaled @ right, atol=1e-3, rtol=0)


def test_small_directions_and_zero_stay_finite():
    matrix = torch.outer(torch.randn(6), torch.randn(9))[None]
    assert orthogonalized(matrix).norm() == pytest.approx(1, abs=0.5)
    assert torch.equal(orthogonalized(torch.zeros(1, 4, 4)), torch.zeros(1, 4, 4))


def test_steps_are_those_of_the_formula():
    """Matrices of several shapes, one of them three projections in one."""
    weights = [torch.nn.Parameter(torch.randn(shape)) for shape in ((8, 8), (24, 8), (8, 32))]
    expected = [w.detach().clone() for w in weights]
    momentum = [torch.zeros_like(w) for w in weights]
    optimizer = Muon(weights, lr=0.01)
    for _ in range(3):
        for i, weight in enumerate(weights):
            weight.grad = torch.randn_like(weight)
            momentum[i] = 0.95 * momentum[i] + 0.05 * weight.grad
            update = 0.05 * weight.grad + 0.95 * momentum[i]
            parts = update.view(3, 8, 8) if update.shape == (24, 8) else update[None]
            scale = 0.01 * 0.2 * max(parts.shape[1:]) ** 0.5
            expected[i] -= scale * orthogonalized(parts).reshape(update.shape)
        optimizer.step()
    for weight, value in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.detach(), value)


def test_muon_takes_the_matrices_of_the_blocks_and_adam_all_else():
    model = RLRModel(SMALL)
    recipe = dataclasses.replace(BRIEF, optimizer="muon")
    adam, muon = Steps(model, recipe, [4], Processes()).optimizers
    names = {id(p): name for name, p in model.levels.named_parameters()}

    def of(optimizer):
        return {names[id(p)] for group in optimizer.param_groups for p in group["params"]}

    assert of(adam) | of(muon) == set(names.values())
    kinds = ("in_proj_weight", "out_proj.weight", "fc1.weight", "fc2.weight")
    assert of(muon) == {n for n in names.values() if "blocks" in n and n.endswith(kinds)}
    assert "0.reference" in of(adam)
