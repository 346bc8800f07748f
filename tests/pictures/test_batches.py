"""Scoring batches: order, a device that runs ahead, interruptions, precision, compilation."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from rlr_fast import RLRModel
from rlr_fast.models.block import RLRBlock
from rlr_fast.pictures import batches as batches_module
from rlr_fast.pictures.batches import compile_model, score_batches


@pytest.fixture
def model(small):
    return RLRModel(small).eval()


def batches(*counts):
    for i, count in enumerate(counts):
        generator = torch.Generator().manual_seed(i)
        yield i, torch.randint(0, 256, (count, 3, 48, 64), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_scores_come_in_order_however_far_the_device_runs_ahead(model, monkeypatch, ahead):
    monkeypatch.setattr(batches_module, "_AHEAD", {"cpu": ahead})
    found = list(score_batches(model, batches(2, 0, 1, 3)))
    assert [what for what, _ in found] == [0, 1, 2, 3]
    for (_, images), (_, scores) in zip(batches(2, 0, 1, 3), found, strict=True):
        assert scores.maps.shape == (len(images), 48, 64) and len(scores.scores) == len(images)
        if len(images):
            with torch.no_grad():
                expected = model(images)
            np.testing.assert_array_equal(scores.maps, expected.score_map[:, 0].numpy())
            assert scores.scores == expected.score.tolist()


def test_a_device_that_runs_ahead_starts_a_batch_before_the_last_is_read(model, monkeypatch):
    monkeypatch.setattr(batches_module, "_AHEAD", {"cpu": 1})
    started = []
    model.register_forward_pre_hook(lambda *_: started.append(1))
    for what, _ in score_batches(model, batches(1, 1, 1)):
        assert len(started) == min(what + 2, 3)


def test_an_interruption_hands_over_what_is_computed(model, monkeypatch):
    monkeypatch.setattr(batches_module, "_AHEAD", {"cpu": 1})

    def interrupted():
        yield from batches(1, 1)
        raise KeyboardInterrupt

    seen = []
    with pytest.raises(KeyboardInterrupt):
        for what, _ in score_batches(model, interrupted()):
            seen.append(what)
    assert seen == [0, 1]


def test_an_interruption_hands_over_no_batch_twice(model):
    scored = score_batches(model, batches(1, 1, 1))
    assert next(scored)[0] == 0
    with pytest.raises(KeyboardInterrupt):
        scored.throw(KeyboardInterrupt)


def test_the_reference_is_prepared_once_and_again_after_a_change(model, monkeypatch):
    prepared = []
    prepare = RLRBlock.prepare
    monkeypatch.setattr(RLRBlock, "prepare", lambda self, r: prepared.append(1) or prepare(self, r))
    blocks = len(model.levels)
    found = [scores for _, scores in score_batches(model, batches(1, 2, 1))]
    assert len(prepared) == blocks and model.is_prepared()
    scoring = score_batches(model, batches(1, 2, 1))
    next(scoring)
    assert len(prepared) == blocks  # it still holds
    with torch.no_grad():
        model.levels[0].reference.mul_(-1)
    changed = next(scoring)[1]
    assert len(prepared) == 2 * blocks
    assert not np.array_equal(changed.maps, found[1].maps)
    for _ in score_batches(model, batches(1), "bf16"):
        assert len(prepared) == 3 * blocks


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_score_maps_are_float32_and_near_those_of_fp32(model, precision):
    (_, full), (_, found) = (next(score_batches(model, batches(2), p)) for p in ("fp32", precision))
    assert found.maps.dtype == np.float32
    np.testing.assert_allclose(found.maps, full.maps, rtol=0.1)


def test_nothing_that_is_scored_asks_for_gradients_and_the_caller_is_left_as_it_was(model):
    for _ in score_batches(model, batches(1)):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


@pytest.mark.parametrize(
    ("precision", "message"),
    [("fp16", "fp16 needs a CUDA device, got device='cpu'"), ("half", "no choice 'half'")],
)
def test_a_precision_that_cannot_run_is_refused_at_the_call(model, precision, message):
    with pytest.raises(ValueError, match=message):
        score_batches(model, batches(1), precision)


def test_compiled_scores_are_the_same_to_rounding_and_one_compilation_serves_all(
    small, monkeypatch
):
    config = dataclasses.replace(small, out_indices=(3,), hidden=(16,), heads=(2,), windows=(3,))
    model = RLRModel(config).eval()
    images = [torch.randint(256, (n, 3, 48, 64), dtype=torch.uint8) for n in (4, 1, 0, 3)]
    expected = [found for _, found in score_batches(model, enumerate(images))]
    compiler = torch.compile

    def quick(function, **options):  # the same graphs, without a C++ compiler's minute
        assert options == {"mode": "default", "dynamic": False}
        return compiler(function, backend="aot_eager", fullgraph=True, dynamic=False)

    monkeypatch.setattr(torch, "compile", quick)
    torch.compiler.reset()
    compile_model(model, 4)
    actual = [found for _, found in score_batches(model, enumerate(images[:1]))]
    with torch.compiler.set_stance("fail_on_recompile"):
        actual += [found for _, found in score_batches(model, enumerate(images[1:]))]
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a.maps, e.maps, rtol=1e-4, atol=1e-5)
        assert a.scores == pytest.approx(e.scores, rel=1e-4)


def test_a_compiled_batch_must_hold_an_image(small):
    with pytest.raises(ValueError, match="batch_size must be positive, got batch_size=0"):
        compile_model(RLRModel(small), 0)
