"""The decoder that paints features: learning, its file, and the features it refuses."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from rlr_fast import RLRModel
from rlr_fast.data import iterate_images
from rlr_fast.files import write_tensors
from rlr_fast.models.checkpoint import CheckpointError, read_weights
from rlr_fast.training.decoder import train_decoder
from rlr_fast.training.run_dir import TrainingError
from rlr_fast.visualization.decoder import (
    Decoder,
    DecoderResult,
    check_decoder_file,
    load_decoder,
    save_decoder,
)


@pytest.fixture
def model(small):
    return RLRModel(small).eval()


def trained(model, dataset, epochs=2, seed=0, **options):
    settings = {"batch_size": 4, "lr": 2e-3, "workers": 1} | options
    return train_decoder(model, dataset, epochs=epochs, seed=seed, **settings)


@pytest.mark.parametrize(
    ("grids", "size"),
    [
        pytest.param([(6, 8), (3, 4)], (48, 64), id="halves"),
        pytest.param([(3, 4), (6, 8)], (48, 64), id="coarsest-first"),
        pytest.param([(5, 7)], (37, 50), id="odd"),
        pytest.param([(4, 4), (4, 4)], (16, 16), id="equal-grids"),
        pytest.param([(8, 8)], (8, 8), id="tokens-are-pixels"),
    ],
)
def test_pictures_have_the_images_size_and_see_every_level(grids, size):
    channels = [5 + j for j in range(len(grids))]
    decoder = Decoder(channels, grids, size).eval()
    tokens = [torch.randn(2, h * w, c) for (h, w), c in zip(grids, channels, strict=True)]
    picture = decoder(tokens)
    assert picture.shape == (2, 3, *size)
    for j in range(len(grids)):
        changed = [t + (i == j) for i, t in enumerate(tokens)]
        assert not torch.equal(decoder(changed), picture)


def test_decoder_learns_to_tell_images_apart(model, dataset):
    result = trained(model, dataset, epochs=12)
    losses = [row["loss"] for row in result.history]
    assert [row["epoch"] for row in result.history] == list(range(1, 13))
    assert losses[-1] < 0.7 * losses[0] and not result.failures
    samples = [sample for group in dataset.train.values() for sample in group]
    images = next(iterate_images(samples, model.config.image_size, len(samples))).images
    with torch.no_grad():
        painted = result.decoder(model.tokens(images))
    far = (painted[:, None] - images / 255).abs().mean((2, 3, 4))  # (picture, image)
    assert (far.argmin(1) == torch.arange(len(images))).float().mean() > 0.5


def test_same_seed_same_decoder_and_training_leaves_the_callers_numbers(model, dataset):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = trained(model, dataset, epochs=1).decoder.state_dict()
    assert torch.equal(torch.rand(3), expected)
    again = trained(model, dataset, epochs=1).decoder.state_dict()
    other = trained(model, dataset, epochs=1, seed=1).decoder.state_dict()
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["paint.weight"], other["paint.weight"])


def test_an_unreadable_image_is_told_before_training_and_named_once(model, dataset, caplog):
    broken = dataset.train["cloth"][1].path
    broken.write_bytes(b"no image")
    told: list[str] = []
    result = trained(model, dataset, progress=lambda *_: told.append(caplog.text))
    assert [failure.error.path for failure in result.failures] == [broken]
    assert str(broken) in told[0] and caplog.text.count(str(broken)) == 1


def test_an_image_lost_for_an_epoch_is_named(model, dataset):
    lost = dataset.train["cloth"][1].path
    content = lost.read_bytes()
    steps: list[int] = []

    def progress(*_):
        steps.append(len(steps))
        if len(steps) == 3:  # 10 images, 4 a step
            lost.unlink()
        if len(steps) == 6:
            lost.write_bytes(content)

    result = trained(model, dataset, epochs=3, progress=progress)
    assert [failure.error.path for failure in result.failures] == [lost]


def test_a_class_that_cannot_be_read_is_refused_before_training(model, dataset):
    for sample in dataset.train["cloth"]:
        sample.path.write_bytes(b"no image")
    with pytest.raises(TrainingError, match="no training image of cloth can be read"):
        trained(model, dataset, progress=lambda *_: pytest.fail("trained"))


@pytest.mark.parametrize("seed", [-1, 2**29, 2**64])
def test_a_seed_that_is_not_told_from_others_is_refused(seed, model, dataset):
    with pytest.raises(ValueError, match="seed must be from 0"):
        trained(model, dataset, seed=seed)


@pytest.mark.parametrize("lr", [math.inf, math.nan])
def test_a_learning_rate_is_finite(lr, model, dataset):
    with pytest.raises(ValueError, match="lr must be positive and finite"):
        trained(model, dataset, lr=lr)


def test_the_file_says_how_the_decoder_was_made(model, dataset, tmp_path):
    file = tmp_path / "new/d.safetensors"
    save_decoder(trained(model, dataset, epochs=1, seed=3), model, file)
    about = json.loads(read_weights(file)[1]["decoder"])["training"]
    assert (about["epochs"], about["batch_size"], about["lr"], about["seed"]) == (1, 4, 2e-3, 3)
    assert about["data"]["images"] == 10 and about["left_out"] == 0
    assert json.loads(file.with_suffix(".jsonl").read_text())["epoch"] == 1


def test_places_for_a_decoder(model, dataset, tmp_path):
    file = tmp_path / "new/d.safetensors"
    check_decoder_file(file)
    assert not file.parent.exists()
    save_decoder(trained(model, dataset, epochs=1), model, file)
    check_decoder_file(file)
    file.with_suffix(".jsonl").unlink()
    file.with_suffix(".jsonl").mkdir()
    with pytest.raises(ValueError, match=r"written to .*d\.jsonl', which is a folder"):
        check_decoder_file(file)
    model.save_pretrained(tmp_path / "run")
    with pytest.raises(ValueError, match="something else than a decoder"):
        check_decoder_file(tmp_path / "run/model.safetensors")
    (tmp_path / "run/history.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"written over .*history\.jsonl"):
        check_decoder_file(tmp_path / "run/history.safetensors")
    with pytest.raises(OSError, match=r"config\.json"):
        check_decoder_file(tmp_path / "run/config.json/d.safetensors")


@pytest.mark.parametrize("about", ["{", "[]", "{}", '{"features": 3}'])
def test_a_decoder_that_does_not_say_its_features_is_refused(about, model, tmp_path):
    decoder = Decoder(model.backbone.channels, model.backbone.grids, model.config.image_size)
    write_tensors(tmp_path / "d.safetensors", decoder.state_dict(), {"decoder": about})
    with pytest.raises(CheckpointError, match="does not say which features"):
        load_decoder(tmp_path / "d.safetensors", model)


@pytest.mark.parametrize("name", ["epochs", "batch_size", "lr"])
def test_arguments_are_positive(name, model, dataset):
    with pytest.raises(ValueError, match=f"{name} must be positive and finite, got {name}=0"):
        trained(model, dataset, **{name: 0})


def test_file_gives_the_same_pictures_and_serves_another_run(small, model, dataset, tmp_path):
    result = trained(model, dataset, epochs=1)
    decoder = result.decoder
    save_decoder(result, model, tmp_path / "d.safetensors")
    other = RLRModel(dataclasses.replace(small, attention=("self",), residual=True))
    again = load_decoder(tmp_path / "d.safetensors", other)
    tokens = model.tokens(torch.rand(2, 3, *small.image_size))
    assert not again.training
    with torch.no_grad():
        assert torch.equal(again(tokens), decoder(tokens))


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        pytest.param({"out_indices": (1, 2)}, r"out_indices \[2, 3\], here \[1, 2\]", id="levels"),
        pytest.param({"image_size": (64, 64)}, "image_size", id="size"),
        pytest.param({"neighborhood": 1}, "neighborhood 3, here 1", id="neighborhood"),
        pytest.param({}, "fingerprint", id="weights"),
    ],
)
def test_other_features_are_refused_by_name(changed, named, small, model, tmp_path):
    decoder = Decoder(model.backbone.channels, model.backbone.grids, small.image_size)
    save_decoder(DecoderResult(decoder, [], [], {}), model, tmp_path / "d.safetensors")
    other = RLRModel(dataclasses.replace(small, **changed))
    if not changed:
        state = other.backbone.state_dict()
        other.backbone.load_state_dict({name: value * 2 for name, value in state.items()})
    with pytest.raises(CheckpointError, match=f"trained on other features: .*{named}"):
        load_decoder(tmp_path / "d.safetensors", other)


def test_files_that_are_no_decoder_are_refused(model, tmp_path):
    with pytest.raises(CheckpointError, match="there is no decoder file"):
        load_decoder(tmp_path / "none.safetensors", model)
    model.save_pretrained(tmp_path / "run")
    with pytest.raises(CheckpointError, match="is no decoder"):
        load_decoder(tmp_path / "run/model.safetensors", model)
    file = tmp_path / "cut.safetensors"
    decoder = Decoder(model.backbone.channels, model.backbone.grids, model.config.image_size)
    save_decoder(DecoderResult(decoder, [], [], {}), model, file)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="damaged or incomplete"):
        load_decoder(file, model)
