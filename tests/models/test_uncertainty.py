"""Uncertainty: the factor that the score takes off distances that are to be expected."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from rlr_fast import RLRModel
from rlr_fast.models.uncertainty import Uncertainty


def fitted(channels: int = 6, power: float = 0.5, limit: float = 1.0) -> Uncertainty:
    """Return one with a network that is not zero, as a fit leaves it."""
    uncertainty = Uncertainty(channels, power)
    torch.nn.init.normal_(uncertainty.network[-1].weight)
    uncertainty.limit.fill_(limit)
    return uncertainty


@pytest.mark.parametrize("power", [0.25, 1.0])
def test_the_factor_is_the_expected_ratio_to_the_negative_power_from_1_to_the_limit(power):
    uncertainty = fitted(power=power)
    rebuilt = 5 * torch.randn(3, 50, 6)
    first, _, second, _, last = uncertainty.network
    hidden = (rebuilt @ first.weight.T + first.bias).clamp_min(0)
    hidden = (hidden @ second.weight.T + second.bias).clamp_min(0)
    expected = (hidden @ last.weight[0] + last.bias[0]).exp()
    assert (expected < 1).any() and (expected > torch.e).any()
    factor = uncertainty(rebuilt)
    torch.testing.assert_close(factor, expected.clamp(1, torch.e) ** -power)
    assert factor.shape == (3, 50) and factor.max() == 1


def test_before_the_fit_nothing_changes(small):
    images = torch.rand(2, 3, *small.image_size)
    torch.manual_seed(0)
    plain = RLRModel(small).eval()
    model = RLRModel(dataclasses.replace(small, uncertainty=0.5)).eval()
    model.load_state_dict(plain.state_dict(), strict=False)
    torch.testing.assert_close(model(images), plain(images), rtol=0, atol=0)
    assert not plain.uncertainty and not any("uncertainty" in n for n in plain.checkpoint_state())


@pytest.mark.parametrize("components", [(0,), (4, 0)], ids=str)
def test_the_score_takes_it_and_the_loss_does_not(small, components, tmp_path):
    config = dataclasses.replace(small, uncertainty=0.5, components=components)
    model = RLRModel(config).eval()
    images = torch.rand(2, 3, *small.image_size)
    tokens = model.tokens(images)
    with torch.no_grad():
        before = model(images)
        loss = model.loss(images)
        model.uncertainty[0] = fitted(components[0] or model.backbone.channels[0])
        after = model(images)
        (rebuilt, distances), _ = model.compare(tokens)
    expected = (model.uncertainty[0](rebuilt) * distances).view_as(after.level_maps[0])
    assert (expected < before.level_maps[0]).any()
    assert torch.equal(after.level_maps[0], expected)
    assert torch.equal(after.level_maps[1], before.level_maps[1])
    assert torch.equal(model.loss(images), loss)
    model.save_pretrained(tmp_path)
    again = RLRModel.from_pretrained(tmp_path)
    torch.testing.assert_close(again(images), after, rtol=0, atol=0)


def test_no_gradient_is_asked_of_it(small):
    model = RLRModel(dataclasses.replace(small, uncertainty=0.5))
    for wanted in (model, model.requires_grad_()):
        assert not any(p.requires_grad for p in wanted.uncertainty.parameters())
    model.loss(torch.rand(2, 3, *small.image_size)).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_autocast_leaves_it_in_its_own_precision():
    uncertainty, rebuilt = fitted(), torch.randn(3, 50, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(uncertainty(rebuilt), uncertainty(rebuilt.clone()))
        inside = uncertainty(rebuilt)
    torch.testing.assert_close(inside, uncertainty(rebuilt), rtol=0, atol=0)
