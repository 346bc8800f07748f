"""The fit of the uncertainty, by itself and as a part of a training."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import BRIEF, SMALL
from training_cases import run

from rlr_fast import RLRModel
from rlr_fast.data import load_image
from rlr_fast.models.uncertainty import Uncertainty
from rlr_fast.training import uncertainty as fits

CONFIG = dataclasses.replace(SMALL, uncertainty=0.5, standardize=True)


def test_it_learns_what_to_expect_in_the_tokens_own_scale():
    size, center = torch.tensor([0.1, 1.0, 30.0]), torch.tensor([5.0, 0.0, -70.0])
    rebuilt = torch.randn(2**16, 3) * size + center
    expected = 0.4 * rebuilt[:, 1] + (rebuilt[:, 2] > -70)
    distances = 7 * torch.exp(expected + 0.3 * torch.randn(2**16))
    level = Uncertainty(3, 0.5)
    fits._fit(level, rebuilt, distances, torch.Generator().manual_seed(0))
    found = level.expected(rebuilt)
    assert (found - (expected - expected.mean())).square().mean() < 0.1 * expected.var()
    assert found.mean().abs() < 0.05
    assert level.limit == pytest.approx(found.quantile(0.999).item(), rel=1e-3)
    assert not any(p.requires_grad for p in level.parameters())


def test_few_tokens_are_not_learned_by_heart():
    rebuilt, distances = torch.randn(2, 500, 8), torch.randn(2, 500).exp()
    level = Uncertainty(8, 0.5)
    fits._fit(level, rebuilt[0], distances[0], torch.Generator().manual_seed(0))
    left = (distances[1].log() - level.expected(rebuilt[1])).var() / distances[1].log().var()
    assert left < 1.1  # nothing can be expected, and little is


def test_a_channel_that_hardly_varies_is_not_amplified():
    rebuilt = torch.randn(5000, 3) * torch.tensor([1.0, 1e-4, 1.0]) + 0.5
    distances = (rebuilt[:, 0] + 0.1 * torch.randn(5000)).exp()
    level = Uncertainty(3, 1.0)
    fits._fit(level, rebuilt, distances, torch.Generator().manual_seed(0))
    rounded = level(rebuilt.bfloat16().float())
    torch.testing.assert_close(rounded, level(rebuilt), rtol=0.05, atol=0)


def test_distances_that_are_all_alike_or_0_change_nothing():
    for distances in (torch.ones(100), torch.zeros(100)):
        level = Uncertainty(3, 0.5)
        fits._fit(level, torch.zeros(100, 3), distances, torch.Generator().manual_seed(0))
        torch.testing.assert_close(level(torch.randn(9, 3)), torch.ones(9))


def test_a_training_fits_it_and_the_levels_are_scaled_after_it(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(fits, "_PASSES", 1000)
    recipe = dataclasses.replace(BRIEF, score_fit="scaled")
    run(dataset, tmp_path / "run", tmp_path, CONFIG, recipe)
    model = RLRModel.from_pretrained(tmp_path / "run")
    samples = [s for group in dataset.train.values() for s in group]
    images = torch.stack([load_image(s.path, (48, 64)) for s in samples])
    with torch.no_grad():
        pairs = model.compare(model.tokens(images))
        maps = model(images).level_maps
    for j, (rebuilt, distances) in enumerate(pairs):
        expected = model.uncertainty[j].expected(rebuilt)
        wanted = distances.log() - distances.log().mean()
        assert (wanted - expected).var() < 0.5 * wanted.var()
        low = float(maps[j].quantile(0.5))
        assert model.config.level_offsets[j] == pytest.approx(low, rel=0.05)
    # The rest is what a training without it leaves.
    run(dataset, tmp_path / "plain", tmp_path, dataclasses.replace(CONFIG, uncertainty=0.0), recipe)
    plain = RLRModel.from_pretrained(tmp_path / "plain").checkpoint_state()
    ours = model.checkpoint_state()
    assert all(torch.equal(ours[name], tensor) for name, tensor in plain.items())
    assert {name.split(".")[0] for name in ours.keys() - plain.keys()} == {"uncertainty"}


@pytest.mark.parametrize("at", ["fit_uncertainty", "level_scales", "score_quantiles"])
def test_a_run_that_was_stopped_while_it_fitted_its_score_ends_as_one_that_was_not(
    dataset, tmp_path, monkeypatch, at
):
    monkeypatch.setattr(fits, "_STEPS", 50)
    recipe = dataclasses.replace(BRIEF, epochs=1, score_fit="scaled")
    run(dataset, tmp_path / "whole", tmp_path, CONFIG, recipe)
    module = "train" if at == "score_quantiles" else "score_fit"

    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(f"rlr_fast.training.{module}.{at}", stop)
        run(dataset, tmp_path / "run", tmp_path, CONFIG, recipe)
    run(dataset, tmp_path / "run", tmp_path, CONFIG, recipe, resume=True)
    for name in ("model.safetensors", "training_state.safetensors", "config.json"):
        whole, stopped = (tmp_path / folder / name for folder in ("whole", "run"))
        assert whole.read_bytes() == stopped.read_bytes(), name
