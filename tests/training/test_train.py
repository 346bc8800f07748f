"""Training: what the loss is, what a seed decides, what settings change and what they do not."""

from __future__ import annotations

import dataclasses
import json
import math
import threading

import numpy as np
import pytest
import torch
from conftest import BRIEF, SMALL
from PIL import Image
from sklearn.decomposition import PCA
from training_cases import run, same, weights

from rlr_fast import RLRModel
from rlr_fast.data import load_image
from rlr_fast.training import run_dir
from rlr_fast.training import train as training
from rlr_fast.training.distributed import Processes
from rlr_fast.training.feature_cache import cached_features
from rlr_fast.training.run_dir import TrainingError
from rlr_fast.training.steps import Steps, number_seed
from rlr_fast.training.trainer import Trainer
from rlr_fast.visualization import loss_curve


def test_loss_falls_and_the_run_folder_is_complete(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "loss_curve", loss_curve)
    recipe = dataclasses.replace(BRIEF, epochs=15)
    result = run(dataset, tmp_path / "run", tmp_path, recipe=recipe)
    assert result.history[-1]["loss"] < 0.8 * result.history[0]["loss"]
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "training_state.safetensors",
        "run.json",
        "history.jsonl",
        "loss.png",
        "calibration.json",
    } <= names
    with Image.open(tmp_path / "run/loss.png") as curve:
        assert curve.width == 1200
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert not any("partial" in name for name in names)
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["recipe"]["epochs"] == 15 and record["environment"]["packages"]["torch"]


def test_tensorboard_reads_the_log(dataset, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = run(dataset, tmp_path / "run", tmp_path)
    log = EventAccumulator(str(tmp_path / "run")).Reload()
    logged = [event.value for event in log.Scalars("train/loss")]
    assert logged == pytest.approx([row["loss"] for row in result.history])


def test_the_saved_model_is_the_trained_one(dataset, tmp_path):
    run(dataset, tmp_path / "run", tmp_path)
    model = RLRModel.from_pretrained(tmp_path / "run")
    assert same(model.checkpoint_state(), weights(tmp_path / "run"))
    assert not same(model.checkpoint_state(), RLRModel(SMALL).checkpoint_state())


def test_powers_of_the_loss_beside_diversity_are_refused(dataset, tmp_path):
    config = dataclasses.replace(SMALL, references=2, diversity=0.1)
    with pytest.raises(ValueError, match="loss_power must be 1 beside the diversity"):
        run(dataset, tmp_path / "run", tmp_path, config, dataclasses.replace(BRIEF, loss_power=2.0))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_loss_is_the_power_mean_of_the_distances(dataset, tmp_path, micro_batch_size):
    images = sum(map(len, dataset.train.values()))
    still = dict(epochs=1, batch_size=images, lr=1e-30, loss_power=3.0)  # the weights stay
    config = dataclasses.replace(SMALL, perturbation=0.0)
    recipe = dataclasses.replace(BRIEF, **still)
    result = run(
        dataset, tmp_path / "run", tmp_path, config, recipe, micro_batch_size=micro_batch_size
    )
    model = RLRModel.from_pretrained(result.out)
    paths = [sample.path for group in dataset.train.values() for sample in group]
    images = torch.stack([load_image(path, config.image_size) for path in paths])
    expected = sum(
        d.double().pow(3).mean() ** (1 / 3) for d in model.distances(model.tokens(images))
    )
    gradients = torch.autograd.grad(expected, list(model.levels.parameters()))
    norm = torch.stack([gradient.double().norm() for gradient in gradients]).norm()
    assert result.history[0]["loss"] == pytest.approx(expected.item(), rel=1e-4)
    assert result.history[0]["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)


def test_seed_decides_the_result(dataset, tmp_path):
    run(dataset, tmp_path / "a", tmp_path)
    run(dataset, tmp_path / "b", tmp_path)
    run(dataset, tmp_path / "c", tmp_path, recipe=dataclasses.replace(BRIEF, seed=1))
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "c"))


def test_loss_that_is_not_finite_stops_with_step_and_level(dataset, tmp_path, monkeypatch):
    take = Steps.take

    def poison(self, step, tokens):
        if step == 4:
            with torch.no_grad():
                self.model.levels[1].token_out.bias.fill_(torch.nan)
        return take(self, step, tokens)

    monkeypatch.setattr(Steps, "take", poison)
    with pytest.raises(TrainingError, match=r"loss of level 1 is not finite at step 4 \(epoch 2\)"):
        run(dataset, tmp_path / "run", tmp_path)
    assert all(v.isfinite().all() for v in weights(tmp_path / "run").values())


def test_a_corrupt_image_is_left_out_and_told(dataset, tmp_path):
    broken = dataset.train["bolt"][1].path
    broken.write_bytes(broken.read_bytes()[:40])
    result = run(dataset, tmp_path / "run", tmp_path)
    assert [failure.error.path for failure in result.failures] == [broken]


def test_a_class_whose_images_are_all_corrupt_stops_before_training(dataset, tmp_path):
    for sample in dataset.train["cloth"]:
        sample.path.write_bytes(b"no image")
    with pytest.raises(TrainingError, match="no training image of cloth"):
        run(dataset, tmp_path / "run", tmp_path)


def test_standardization_is_that_of_the_training_set(dataset, tmp_path):
    config = dataclasses.replace(SMALL, standardize=True)
    run(dataset, tmp_path / "run", tmp_path, config)
    model = RLRModel.from_pretrained(tmp_path / "run")
    samples = [s for group in dataset.train.values() for s in group]
    cache = cached_features(model, samples, tmp_path / "cache")
    for level, module in zip(cache.levels, model.standardize, strict=True):
        flat = level.double().flatten(0, 1)
        torch.testing.assert_close(module.mean.double(), flat.mean(0), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(
            module.std.double(), flat.std(0, correction=0), atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize("standardize", [False, True])
def test_components_are_those_of_the_training_set_in_their_proportions(
    dataset, tmp_path, standardize
):
    config = dataclasses.replace(SMALL, standardize=standardize, components=(0, 5))
    run(dataset, tmp_path / "run", tmp_path, config)
    model = RLRModel.from_pretrained(tmp_path / "run")
    samples = [s for group in dataset.train.values() for s in group]
    tokens = cached_features(model, samples, tmp_path / "cache").levels[1].flatten(0, 1)
    values = model.standardize[1](tokens)
    theirs = PCA(5, svd_solver="full").fit_transform(values.double().numpy())
    expected = torch.from_numpy(theirs / np.sqrt(theirs.var(0).mean()))
    ours = model.compared(1, tokens).double()
    signs = (ours * expected).sum(0).sign()
    torch.testing.assert_close(ours, expected * signs, atol=1e-3, rtol=1e-3)
    assert torch.equal(model.compared(0, tokens[:, :40]), model.standardize[0](tokens[:, :40]))


def test_scaled_levels_have_normal_distances_from_0_to_their_share_of_the_finest_side(
    dataset, tmp_path
):
    recipe = dataclasses.replace(BRIEF, score_fit="scaled")
    scaled, fixed = tmp_path / "scaled", tmp_path / "fixed"
    run(dataset, scaled, tmp_path, recipe=recipe)
    run(dataset, fixed, tmp_path)
    assert (scaled / "model.safetensors").read_bytes() == (fixed / "model.safetensors").read_bytes()
    model = RLRModel.from_pretrained(scaled)
    images = torch.stack(
        [load_image(s.path, (48, 64)) for group in dataset.train.values() for s in group]
    )
    with torch.no_grad():
        maps = model(images).level_maps
    config = model.config
    sides = [math.sqrt(height * width) for height, width in model.backbone.grids]
    assert sides[0] > sides[1]
    for level, offset, weight, side in zip(
        maps, config.level_offsets, config.level_weights, sides, strict=True
    ):
        low, high = ((level - offset) * weight).quantile(torch.tensor([0.5, 0.99])).tolist()
        assert low == pytest.approx(0, abs=0.02)
        assert high == pytest.approx(side / sides[0], rel=0.05)
    again = run(dataset, scaled, tmp_path, recipe=recipe, resume=True)
    assert RLRModel.from_pretrained(again.out).config == config


@pytest.mark.parametrize("window", [3, 7])
def test_a_window_that_leaves_mlka_no_key_is_told(dataset, tmp_path, caplog, window):
    config = dataclasses.replace(SMALL, windows=(window, window))
    run(dataset, tmp_path / "run", tmp_path, config, dataclasses.replace(BRIEF, epochs=1))
    grids = RLRModel(SMALL).backbone.grids
    covered = [
        i for i, g in zip(SMALL.out_indices, grids, strict=True) if window // 2 >= max(g) - 1
    ]
    told = [r.getMessage() for r in caplog.records if "MLKA has no key and gives" in r.getMessage()]
    assert [line.partition(":")[0] for line in told] == [f"level {i}" for i in covered]
    assert window == 3 or covered


def test_a_training_of_few_steps_is_told_and_how_many_epochs_help(dataset, tmp_path, caplog):
    recipe = dataclasses.replace(BRIEF, epochs=2, batch_size=4)
    run(dataset, tmp_path / "run", tmp_path, recipe=recipe)
    assert "6 steps of 4 images are few" in caplog.text
    assert "--epochs 200 or more help" in caplog.text


def test_bf16_trains(dataset, tmp_path):
    recipe = dataclasses.replace(BRIEF, precision="bf16", epochs=8)
    result = run(dataset, tmp_path / "run", tmp_path, recipe=recipe)
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    assert all(v.dtype == torch.float32 for v in weights(tmp_path / "run").values())


def test_fp16_on_a_cpu_is_refused(dataset, tmp_path):
    recipe = dataclasses.replace(BRIEF, precision="fp16")
    with pytest.raises(ValueError, match="fp16 needs a CUDA device"):
        run(dataset, tmp_path / "run", tmp_path, recipe=recipe)


def test_seed_decides_order_and_noise(dataset, tmp_path):
    """Not only the initial weights: a CPU's generator takes few of a seed's bits."""
    drawn = set()
    for seed in range(8):
        for index in (-2, -1, 0, 1):
            generator = torch.Generator().manual_seed(number_seed(seed, 0, index))
            drawn.add(float(torch.randn(1, generator=generator, dtype=torch.float64)))
    assert len(drawn) == 32


@pytest.mark.parametrize("scales", [{}, {"standardize": True}, {"components": (9, 0)}], ids=str)
def test_features_made_each_time_train_as_kept_ones_do(dataset, tmp_path, scales):
    dataset.train["bolt"][1].path.write_bytes(b"no image")
    config = dataclasses.replace(SMALL, **scales)
    kept = run(dataset, tmp_path / "kept", tmp_path, config)
    fresh = run(dataset, tmp_path / "fresh", tmp_path / "no", config, cache="none")
    assert [f.error.path for f in fresh.failures] == [f.error.path for f in kept.failures]
    assert not (tmp_path / "no").exists()
    losses = [[row["loss"] for row in r.history] for r in (kept, fresh)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)  # a batch's make-up changes rounding


def test_micro_batches_add_up_to_the_step(dataset, tmp_path):
    whole = run(dataset, tmp_path / "whole", tmp_path)
    parts = run(dataset, tmp_path / "parts", tmp_path, micro_batch_size=3)
    for name in ("loss", "grad_norm"):
        expected = [row[name] for row in whole.history]
        assert [row[name] for row in parts.history] == pytest.approx(expected, rel=1e-4)
    with pytest.raises(
        ValueError, match="micro_batch_size must be positive, got micro_batch_size=0"
    ):
        run(dataset, tmp_path / "none", tmp_path, micro_batch_size=0)


def test_diversity_counts_once_per_step_over_micro_batches_and_processes():
    config = dataclasses.replace(SMALL, perturbation=0.0, references=3, diversity=0.5)
    model = RLRModel(config)
    tokens = model.tokens(torch.rand(5, 3, *SMALL.image_size))
    names = [name for name, _ in model.levels.named_parameters()]

    def gradients(rank, part, size):
        recipe = dataclasses.replace(BRIEF, batch_size=5)
        steps = Steps(model, recipe, [4, 1], Processes(rank), micro_batch_size=size)
        losses = steps._gradients(0, part)
        return losses, {n: p.grad.clone() for n, p in model.levels.named_parameters()}

    # Micro-batches of 3 and 1 in the one process, of 1 in the other.
    first, grads = gradients(0, [t[:4] for t in tokens], 3)
    second, more = gradients(1, [t[4:] for t in tokens], None)
    levels = torch.stack([d.mean() for d in model.distances(tokens)])
    expected = torch.cat((levels, model.diversity_loss()[None]))
    torch.testing.assert_close(first + second, expected.detach())
    whole = torch.autograd.grad(expected.sum(), list(model.levels.parameters()))
    for name, grad in zip(names, whole, strict=True):
        torch.testing.assert_close(grads[name] + more[name], grad, msg=name)


def test_diversity_is_a_term_of_its_own_in_the_log(dataset, tmp_path):
    config = dataclasses.replace(SMALL, fusion="learned", references=2, diversity=0.25)
    recipe = dataclasses.replace(BRIEF, epochs=15)
    result = run(dataset, tmp_path / "run", tmp_path, config, recipe)
    for row in result.history:
        terms = row["level_0"] + row["level_1"] + row["diversity"]
        assert row["loss"] == pytest.approx(terms, rel=1e-5)
        assert min(row["level_0"], row["level_1"]) > 0
    assert result.history[-1]["diversity"] < result.history[0]["diversity"] - 0.01
    start, end = RLRModel(config), RLRModel.from_pretrained(tmp_path / "run")
    assert not torch.equal(end.levels[0].blocks[0].theta, start.levels[0].blocks[0].theta)


def test_too_little_memory_halves_the_micro_batch_and_says_so(
    dataset, tmp_path, monkeypatch, caplog
):
    whole = run(dataset, tmp_path / "whole", tmp_path)
    distances = RLRModel.distances

    def small_device(self, tokens, noise=None):
        if len(tokens[0]) > 1 and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("no room")
        return distances(self, tokens, noise)

    monkeypatch.setattr(RLRModel, "distances", small_device)
    result = run(dataset, tmp_path / "run", tmp_path)
    expected = [row["loss"] for row in whole.history]
    assert [row["loss"] for row in result.history] == pytest.approx(expected, rel=1e-4)
    told = [r.getMessage() for r in caplog.records if "out of memory" in r.getMessage()]
    assert [t.split(";")[0] for t in told] == [
        "out of memory with 4 images at once",
        "out of memory with 2 images at once",
    ]
    monkeypatch.setattr(RLRModel, "distances", lambda *_: (_ for _ in ()).throw(
        torch.OutOfMemoryError("no room")
    ))  # fmt: skip
    with pytest.raises(torch.OutOfMemoryError):
        run(dataset, tmp_path / "none", tmp_path)


def test_grad_checkpointing_changes_no_bit(dataset, tmp_path):
    run(dataset, tmp_path / "whole", tmp_path)
    run(dataset, tmp_path / "run", tmp_path, grad_checkpointing=True)
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))


def test_compiled_training_is_the_same_to_rounding(dataset, tmp_path, monkeypatch):
    config = dataclasses.replace(
        SMALL, out_indices=(3,), hidden=(16,), heads=(2,), windows=(3,), perturbation=0.0
    )
    compiler = torch.compile

    def quick(function, **options):  # the same graphs, without a C++ compiler's minute
        assert options == {"mode": "default", "dynamic": False}
        return compiler(function, backend="aot_eager", fullgraph=True, dynamic=False)

    monkeypatch.setattr(torch, "compile", quick)
    recipe = dataclasses.replace(BRIEF, epochs=2, batch_size=10)
    whole = run(dataset, tmp_path / "whole", tmp_path, config, recipe)
    result = run(dataset, tmp_path / "run", tmp_path, config, recipe, compile=True)
    expected = [row["loss"] for row in whole.history]
    assert [row["loss"] for row in result.history] == pytest.approx(expected, rel=1e-4)


def test_a_slow_disk_does_not_hold_training_up(dataset, tmp_path, monkeypatch):
    write, began = run_dir.write_checkpoint, []
    recipe = dataclasses.replace(BRIEF, epochs=6)
    run(dataset, tmp_path / "whole", tmp_path, recipe=recipe)
    done = threading.Event()

    def slow(out, checkpoint):
        began.append(checkpoint.epoch)
        if checkpoint.epoch == 1:
            assert done.wait(60)
        write(out, checkpoint)

    train_epoch = Trainer._train_epoch

    def watched(self, *arguments):
        if self.epoch == 4:
            done.set()
        train_epoch(self, *arguments)

    monkeypatch.setattr(run_dir, "write_checkpoint", slow)
    monkeypatch.setattr(Trainer, "_train_epoch", watched)
    run(dataset, tmp_path / "run", tmp_path, recipe=recipe)
    assert began[0] == 1 and began[-1] == 6 and not {2, 3, 4} & set(began)
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))
