"""Training: the loss falls, a resumed run equals an uninterrupted one, nothing written is lost."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import threading

import pytest
import safetensors.torch
import torch
from conftest import BRIEF, SMALL, make_tree

from rlr_fast import RLRModel
from rlr_fast.config import TrainExecution
from rlr_fast.data import load_image, read_dataset
from rlr_fast.models.backbone import BackboneWeightsError
from rlr_fast.training import run_dir
from rlr_fast.training.distributed import Processes
from rlr_fast.training.feature_cache import cached_features
from rlr_fast.training.run_dir import TrainingError, check_folder
from rlr_fast.training.steps import Steps, number_seed
from rlr_fast.training.train import train
from rlr_fast.training.trainer import Trainer


def run(dataset, out, tmp_path, config=SMALL, recipe=BRIEF, **options):
    names = {field.name for field in dataclasses.fields(TrainExecution)}
    given = {name: options.pop(name) for name in names & options.keys()}
    execution = TrainExecution(device="cpu", cache_dir=tmp_path / "cache", **given)
    return train(config, recipe, dataset, out, execution, **{"quiet": True} | options)


def weights(out):
    return safetensors.torch.load_file(out / "model.safetensors")


def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[k], other[k]) for k in one)


def test_loss_falls_and_the_run_folder_is_complete(dataset, tmp_path):
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


@pytest.mark.parametrize(
    ("setting", "attention"),
    [
        ({}, ("mlka", "lca")),
        ({"schedule": "cosine", "clip_grad": 1.0}, ("mlka", "lca")),
        ({"optimizer": "muon"}, ("mlka", "lca")),
        ({"optimizer": "muon"}, ("self",)),  # the reference has no gradient, so no state
    ],
    ids=str,
)
def test_resumed_run_ends_with_the_same_bits(dataset, tmp_path, monkeypatch, setting, attention):
    recipe = dataclasses.replace(BRIEF, epochs=4, **setting)
    config = dataclasses.replace(SMALL, standardize=True, attention=attention)
    run(dataset, tmp_path / "whole", tmp_path, config, recipe)
    save = Trainer._save

    def stop_after_two(self, checkpoints):
        save(self, checkpoints)
        if self.epoch == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_save", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        run(dataset, tmp_path / "halves", tmp_path, config, recipe)
    monkeypatch.setattr(Trainer, "_save", save)
    torch.rand(7)  # the global generator's state does not matter
    result = run(dataset, tmp_path / "halves", tmp_path, config, recipe, resume=True)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "halves"))
    assert [row["step"] for row in result.history] == [3, 6, 9, 12]


def test_kill_between_the_last_two_writes_is_made_good_by_resume(dataset, tmp_path, monkeypatch):
    run(dataset, tmp_path / "whole", tmp_path)
    write = run_dir.write_tensors

    def die(path, *arguments):
        last = run_dir.read_checkpoint(tmp_path / "run")
        if path.name == "model.safetensors" and last.epoch == BRIEF.epochs:
            raise KeyboardInterrupt
        write(path, *arguments)

    monkeypatch.setattr(run_dir, "write_tensors", die)
    with pytest.raises(KeyboardInterrupt):
        run(dataset, tmp_path / "run", tmp_path)
    monkeypatch.setattr(run_dir, "write_tensors", write)
    assert not same(weights(tmp_path / "run"), weights(tmp_path / "whole"))
    run(dataset, tmp_path / "run", tmp_path, resume=True)
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))


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


def test_full_disk_keeps_the_last_checkpoint(dataset, tmp_path, monkeypatch):
    write = run_dir.write_tensors
    calls = []

    def full(path, *arguments):
        calls.append(path)
        if len(calls) > 2:
            path.with_name("." + path.name + ".partial").write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, *arguments)

    monkeypatch.setattr(run_dir, "write_tensors", full)
    with pytest.raises(
        TrainingError, match=r"No space left on device; the checkpoint of epoch \d is intact"
    ):
        run(dataset, tmp_path / "run", tmp_path)
    monkeypatch.setattr(run_dir, "write_tensors", write)
    run(dataset, tmp_path / "run", tmp_path, resume=True)
    run(dataset, tmp_path / "whole", tmp_path)
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))


def test_a_full_disk_under_the_tensorboard_log_is_told(dataset, tmp_path, monkeypatch, capfd):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("tensorboard.summary.writer.record_writer.RecordWriter.write", full)
    with pytest.raises(
        TrainingError, match=r"cannot write the TensorBoard log in .*; no epoch was"
    ):
        run(dataset, tmp_path / "run", tmp_path)
    assert "Traceback" not in capfd.readouterr().err


def test_a_second_run_does_not_overwrite_the_first(dataset, tmp_path):
    run(dataset, tmp_path / "run", tmp_path)
    before = weights(tmp_path / "run")
    with pytest.raises(TrainingError, match="already holds a run"):
        run(dataset, tmp_path / "run", tmp_path)
    assert same(before, weights(tmp_path / "run"))


def test_a_run_is_not_written_where_its_files_would_be_read_as_images(dataset, tmp_path):
    root = dataset.root
    plain = read_dataset(root / "bolt/train/good")
    refused = ((dataset, root / "bolt"), (dataset, root / "bolt/train/good/run"))
    for data, out in (*refused, (plain, plain.root), (plain, plain.root / "run")):
        with pytest.raises(TrainingError, match="among the images"):
            check_folder(out, {}, False, data)
    check_folder(root / "run", {}, False, dataset)  # no class: it has no train and no test
    check_folder(tmp_path / "run", {}, False, plain)


def test_resume_with_other_images_is_refused_and_keeps_the_record(dataset, tmp_path, monkeypatch):
    run(dataset, tmp_path / "run", tmp_path)
    record = (tmp_path / "run/run.json").read_text()
    moved = make_tree(tmp_path / "moved/data")
    run(read_dataset(moved), tmp_path / "run", tmp_path, resume=True)  # the same images elsewhere
    other = make_tree(tmp_path / "other/data", train=6)
    with pytest.raises(TrainingError, match="images was 10, now 12"):
        run(read_dataset(other), tmp_path / "run", tmp_path, resume=True)
    assert (tmp_path / "run/run.json").read_text() == record


def test_a_run_that_finished_no_epoch_leaves_its_folder_free(dataset, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Steps, "take", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(dataset, tmp_path / "run", tmp_path)
    run(dataset, tmp_path / "run", tmp_path, recipe=dataclasses.replace(BRIEF, lr=2e-3))
    assert json.loads((tmp_path / "run/run.json").read_text())["recipe"]["lr"] == 2e-3


def test_nothing_is_written_before_the_backbone_is_there(dataset, tmp_path):
    config = dataclasses.replace(SMALL, backbone_weights="missing.pth")
    with pytest.raises(BackboneWeightsError):
        run(dataset, tmp_path / "run", tmp_path, config)
    assert not (tmp_path / "run").exists()


def test_training_state_without_its_settings_is_told(dataset, tmp_path):
    run(dataset, tmp_path / "run", tmp_path)
    (tmp_path / "run/run.json").unlink()
    with pytest.raises(TrainingError, match=r"run\.json"):
        run(dataset, tmp_path / "run", tmp_path, resume=True)


def test_resume_with_other_settings_names_them(dataset, tmp_path):
    run(dataset, tmp_path / "run", tmp_path)
    other = dataclasses.replace(BRIEF, lr=0.5)
    with pytest.raises(TrainingError, match=r"lr was 0\.001, now 0\.5"):
        run(dataset, tmp_path / "run", tmp_path, recipe=other, resume=True)


def test_cut_training_state_is_named_and_the_weights_still_load(dataset, tmp_path):
    run(dataset, tmp_path / "run", tmp_path)
    state = tmp_path / "run/training_state.safetensors"
    state.write_bytes(state.read_bytes()[:-1])
    with pytest.raises(TrainingError, match=r"cannot resume: .*damaged or incomplete"):
        run(dataset, tmp_path / "run", tmp_path, resume=True)
    RLRModel.from_pretrained(tmp_path / "run")


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


@pytest.mark.parametrize("standardize", [False, True])
def test_features_made_each_time_train_as_kept_ones_do(dataset, tmp_path, standardize):
    dataset.train["bolt"][1].path.write_bytes(b"no image")
    config = dataclasses.replace(SMALL, standardize=standardize)
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


def test_a_folder_that_cannot_be_written_is_told_before_the_features(dataset, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="cannot write the run"):
        run(dataset, tmp_path / "file/run", tmp_path)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ("{}", "it has no 'model'"),
        ('{"model": {}, "recipe": 3, "data": {}}', "recipe must be an object"),
        ("[]", r"it must be an object, got \[\]"),
        ("{", "Expecting property name"),
    ],
)
def test_damaged_settings_are_named(dataset, tmp_path, record, reason):
    run(dataset, tmp_path / "run", tmp_path)
    (tmp_path / "run/run.json").write_text(record)
    with pytest.raises(TrainingError, match=rf"run\.json cannot be read: {reason}"):
        run(dataset, tmp_path / "run", tmp_path, resume=True)


def test_a_lost_or_damaged_history_is_told_and_costs_the_curve_alone(dataset, tmp_path, caplog):
    run(dataset, tmp_path / "run", tmp_path)
    before, history = weights(tmp_path / "run"), tmp_path / "run/history.jsonl"
    history.write_text("no json")
    with pytest.raises(TrainingError, match=r"history\.jsonl cannot be read.*Delete it"):
        run(dataset, tmp_path / "run", tmp_path, resume=True)
    history.unlink()
    result = run(dataset, tmp_path / "run", tmp_path, resume=True)
    assert result.history == [] and "history.jsonl is missing" in caplog.text
    assert same(weights(tmp_path / "run"), before)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("3", "it must be an object"),
        ('{"step": 1}', "a row has no epoch, images_per_s, loss"),
        ('{"step": 1, "epoch": 1, "loss": [], "images_per_s": 1}', "loss must be a number"),
        ('{"step": 1, "epoch": true, "loss": 1, "images_per_s": 1}', "epoch must be a number"),
        ('{"step": 1, "epoch": 1, "loss": 1e300, "images_per_s": 1}', "loss must be a number of"),
        ('{"step": 1%s, "epoch": 1, "loss": 1, "images_per_s": 1}' % ("0" * 400), "step must be a"),
    ],
)
def test_a_damaged_row_of_the_history_is_told(tmp_path, row, reason):
    (tmp_path / "history.jsonl").write_text(row)
    with pytest.raises(TrainingError, match=rf"history\.jsonl cannot be read: {reason}"):
        run_dir._read_history(tmp_path / "history.jsonl", 9)


def test_a_training_state_with_a_flipped_byte_is_refused_and_not_resumed(dataset, tmp_path):
    run(dataset, tmp_path / "run", tmp_path)
    file = tmp_path / "run/training_state.safetensors"
    data = bytearray(file.read_bytes())
    data[-7] ^= 1
    file.write_bytes(data)
    with pytest.raises(TrainingError, match=r"training_state\.safetensors is damaged"):
        run(dataset, tmp_path / "run", tmp_path, resume=True)


@pytest.mark.parametrize("progress", ["{}", "[]", '{"epoch": "1"}', "[" * 100_000])
def test_a_training_state_that_says_nothing_of_its_progress_is_told(tmp_path, progress):
    tensors = {"optimizer.x": torch.zeros(1)}
    run_dir.write_tensors(tmp_path / run_dir.STATE_FILE, tensors, {"progress": progress})
    with pytest.raises(TrainingError, match="holds no training state"):
        run_dir.read_checkpoint(tmp_path)


def test_two_trainings_do_not_work_in_one_folder(dataset, tmp_path):
    with (
        run_dir.lock_run(tmp_path / "run"),
        pytest.raises(TrainingError, match="another process works in"),
    ):
        run(dataset, tmp_path / "run", tmp_path)
    run(dataset, tmp_path / "run", tmp_path)


def test_weights_in_place_of_the_training_state_are_told(dataset, tmp_path):
    run(dataset, tmp_path / "run", tmp_path)
    (tmp_path / "run/training_state.safetensors").write_bytes(
        (tmp_path / "run/model.safetensors").read_bytes()
    )
    with pytest.raises(TrainingError, match="holds no training state"):
        run(dataset, tmp_path / "run", tmp_path, resume=True)


def test_an_unwritten_checkpoint_is_told_after_an_interruption(tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(run_dir, "write_checkpoint", full)
    checkpoint = run_dir.Checkpoint(3, {}, {}, {}, {}, [])
    with (
        pytest.raises(KeyboardInterrupt),
        run_dir.CheckpointWriter(tmp_path, 2) as checkpoints,
    ):
        checkpoints.write(checkpoint)
        raise KeyboardInterrupt
    assert "No space left on device; the checkpoint of epoch 2 is intact" in caplog.text


def test_settings_written_with_other_windows_of_the_same_meaning_are_the_same():
    record = {"model": SMALL.to_dict(), "recipe": {}, "data": {}}
    assert record["model"]["windows"] == [3, (3, 5)]
    for windows in ([3, [3, 5]], [[3, 3], [3, 5]]):
        assert not run_dir.changed_settings(
            {"model": {"windows": windows}, "recipe": {}, "data": {}}, record
        )
    (changed,) = run_dir.changed_settings(
        {"model": {"windows": [3, 5]}, "recipe": {}, "data": {}}, record
    )
    assert changed == "windows was [3, 5], now [3, [3, 5]]"
