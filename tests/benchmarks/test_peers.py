"""The peers: mistakes, and the coreset and the decoders on a ViT against anomalib's own."""

from __future__ import annotations

import importlib.util
from collections import namedtuple

import numpy as np
import pytest
import torch
from conftest import make_tree
from torch.utils.data import DataLoader

from benchmarks.peers import coreset
from benchmarks.peers.__main__ import main
from benchmarks.peers.catalog import make_peer
from benchmarks.peers.transformers import Training
from rlr_fast.models.backbone import Backbone

SIZE = (48, 48)
VIT = "vit_tiny_patch16_224"
GROUPS = (range(2, 6), range(6, 10))
BATCH = 4
TRAINED = ("dinomaly", "inp-former")

needs_anomalib = pytest.mark.skipif(
    importlib.util.find_spec("anomalib") is None, reason="the extra 'anomalib' is not installed"
)


def grouped(name=VIT, size=SIZE):
    return Backbone(name, "random", GROUPS, size)


def images(count=BATCH, size=SIZE):
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(1))


def make(name, steps, backbone=None):
    torch.manual_seed(0)
    return make_peer(name, backbone or grouped(), Training(steps, BATCH))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--levels", "6-9", "2-5"],
            "out_indices must be levels from 0 on, each above the one before",
        ),
        (["--levels", "2-3"], "out_indices: 'tf_efficientnet_lite0' has levels of unlike"),
        (["--levels", "3-2"], "must be a level, or the first and the last such as 2-5, got '3-2'"),
        (["--peer", "dinomaly"], "Dinomaly: the backbone must be a ViT with a class token, got"),
        (["--backbone", VIT, "--peer", "inp-former"], "InpFormer: needs 8 levels, such as"),
        (["--batch-size", "0"], "batch_size: must be at least 1, got 0"),
        (["--seed", "-1"], "seed must be"),
        (["--run", "a/run", "--run", "b/run"], "--run: folders must have names of their own"),
        (["--record", "a/b"], "argument --record: must be letters, digits, '_', '-' or '.', or a"),
        (
            ["--record", f"{__file__}/a.json"],
            "argument --record: must be a file that can be written",
        ),
    ],
    ids=[
        "falling",
        "unlike-sizes",
        "empty-group",
        "cnn",
        "two-levels",
        "no-batch",
        "seed",
        "runs-of-one-name",
        "record",
        "record-below-a-file",
    ],
)
def test_a_mistake_is_one_line(tmp_path, capsys, flags, message):
    make_tree(tmp_path)
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--weights", "random", "--image-size", "48", *flags])
    last = capsys.readouterr().err.splitlines()[-1]
    assert message in last


@pytest.mark.parametrize("name", TRAINED)
def test_the_image_size_is_a_multiple_of_the_patch(name):
    with pytest.raises(ValueError, match="must be a multiple of the 16 pixels of a patch, got 40"):
        make(name, 101, grouped(size=(40, 40)))


@needs_anomalib
@pytest.mark.parametrize("name", TRAINED)
def test_the_steps_go_beyond_warming_up(name):
    with pytest.raises(ValueError, match="steps must be more than the 100 of warming up, got 100"):
        make(name, 100)


@needs_anomalib
@pytest.mark.parametrize("vit", [VIT, "vit_medium_patch16_reg4_gap_256"])
def test_the_tokens_are_those_that_anomalib_extracts(monkeypatch, vit):
    from anomalib.models.components.feature_extractors import TimmFeatureExtractor
    from timm.models import vision_transformer

    # anomalib replaces this function for good where it makes an extractor.
    resample = vision_transformer.resample_abs_pos_embed
    monkeypatch.setattr(vision_transformer, "resample_abs_pos_embed", resample)
    size = (256, 256) if vit.endswith("256") else (224, 224)
    backbone = grouped(vit, size)
    encoder = make("dinomaly", 101, backbone).encoder
    extractor = TimmFeatureExtractor(
        vit, list(encoder(images(1, size))), pre_trained=False, output_fmt="NLC",
        return_class_token=True, norm=False,
    )  # fmt: skip
    extractor.feature_extractor.load_state_dict(backbone.network.model.state_dict(), strict=False)
    for key in ("patch_size", "num_register_tokens"):
        assert getattr(encoder, key) == getattr(extractor, key)
    normalized = (images(1, size) - backbone.mean) / backbone.std
    torch.testing.assert_close(encoder(images(1, size)), extractor(normalized))


@needs_anomalib
@pytest.mark.parametrize("name", TRAINED)
def test_training_is_that_of_lightning(monkeypatch, name):
    """With an epoch of one batch, because anomalib's schedule moves once an epoch."""
    from lightning.pytorch import Trainer

    steps = 104
    ours, theirs = make(name, steps), make(name, steps)
    for peer in (ours, theirs):
        for part in peer.module.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0  # Lightning's loader draws random numbers of its own
    monkeypatch.setattr(torch, "randperm", torch.arange)
    monkeypatch.setattr(torch.Tensor, "half", torch.Tensor.float)
    untrained = ours.module.model.eval()(images()).anomaly_map.mean()
    ours.learn(images())
    ours.finish()
    batch = namedtuple("Batch", "image")(images())
    trainer = Trainer(
        max_epochs=-1, max_steps=steps, accelerator="cpu", logger=False, barebones=True,
        **theirs.module.trainer_arguments,
    )  # fmt: skip
    trainer.fit(theirs.module, DataLoader([batch], batch_size=None))
    theirs.module.eval()
    found, expected = ours.score(images()), theirs.score(images())
    torch.testing.assert_close(found, expected)
    assert found[1].mean() < 0.5 * untrained


@needs_anomalib
@pytest.mark.parametrize("name", TRAINED)
def test_the_cache_is_what_the_network_gives(name):
    peer = make(name, 101)
    peer.learn(images())
    (cached,) = peer.batches
    expected = torch.stack(list(peer.encoder(images()).values()), 1)
    torch.testing.assert_close(cached.float(), expected, rtol=2**-10, atol=2**-14)


@needs_anomalib
def test_two_runs_of_a_seed_are_equal(tmp_path, capsys):
    make_tree(tmp_path)
    flags = [
        "--weights", "random", "--backbone", VIT, "--levels", "2-5", "6-9", "--image-size", "48",
        "--steps", "101", "--batch-size", "2", "--peer", "dinomaly", "--peer", "nearest",
    ]  # fmt: skip
    rows = []
    for seed in ("0", "0", "1"):
        main([str(tmp_path), *flags, "--seed", seed])
        told = capsys.readouterr().out.splitlines()
        rows.append([line.split(", ")[1] for line in told if line.startswith("Dinomaly: step")])
    assert rows[0] == rows[1] != rows[2]


@needs_anomalib
def test_the_coreset_is_that_of_anomalib(monkeypatch):
    from anomalib.models.components.sampling.k_center_greedy import KCenterGreedy

    from benchmarks.peers.methods import _select

    monkeypatch.setattr(coreset, "_POOL", 20)

    def select(choose):
        torch.manual_seed(3)
        np.random.seed(3)
        return choose(KCenterGreedy(torch.randn(200, 7), 0.3))

    assert select(_select) == select(KCenterGreedy.select_coreset_idxs)
