"""anomalib trains, tests, keeps and exports RLR, and the numbers are ours."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest
import torch

pytest.importorskip("anomalib", reason="the extra 'anomalib' is not installed")

from anomalib.deploy import CompressionType, OpenVINOInferencer, TorchInferencer
from anomalib.engine import Engine
from anomalib.metrics import AUROC, Evaluator
from anomalib.pre_processing import PreProcessor
from conftest import SMALL, make_tree
from lightning.pytorch.callbacks import Callback
from PIL import Image
from sklearn.metrics import roc_auc_score
from torchvision.transforms.v2 import CenterCrop, Compose, Normalize, Resize

from rlr_fast import RLRModel, TrainConfig
from rlr_fast.config import PRESETS, TrainExecution
from rlr_fast.data import load_image, load_sample_mask, read_dataset
from rlr_fast.integrations.anomalib import MultiCategory, Rlr
from rlr_fast.training.train import train

CONFIG = dataclasses.replace(SMALL, standardize=True, uncertainty=0.5)
RECIPE = TrainConfig(epochs=2, batch_size=4, lr=1e-3, optimizer="muon", score_fit="scaled")
QUIET = {"logger": False, "accelerator": "cpu", "enable_progress_bar": False}


def module(recipe=RECIPE, **options):
    return Rlr("tiny", CONFIG.to_dict(), dataclasses.asdict(recipe), visualizer=False, **options)


def data(root):
    return MultiCategory(root, train_batch_size=4, eval_batch_size=4)


def data_of(root):
    module = data(root / "data")
    module.setup()
    return module


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A data set, and a model that the Engine has trained on it."""
    root = tmp_path_factory.mktemp("anomalib")
    make_tree(root / "data")
    rlr = module()
    engine = Engine(default_root_dir=root / "engine", **QUIET)
    engine.fit(rlr, datamodule=data(root / "data"))
    return root, rlr, engine


@pytest.fixture(scope="module")
def ours(trained):
    """What we train from the same seed."""
    root, _, _ = trained
    execution = TrainExecution(device="cpu", cache="none")
    train(CONFIG, RECIPE, read_dataset(root / "data"), root / "ours", execution, quiet=True)
    return RLRModel.from_pretrained(root / "ours")


def test_the_engine_trains_the_same_weights(trained, ours):
    _, rlr, _ = trained
    found, expected = rlr.rlr.checkpoint_state(), ours.checkpoint_state()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)
    assert rlr.rlr.config.level_weights == pytest.approx(ours.config.level_weights, rel=1e-3)


def test_the_engines_metrics_are_ours(trained, ours, tmp_path):
    root, _, _ = trained
    auroc = [
        AUROC(fields=["pred_score", "gt_label"], prefix="image_"),
        AUROC(fields=["anomaly_map", "gt_mask"], prefix="pixel_"),
    ]
    # Its own scores are clipped to a range that the thresholds set.
    options = {"post_processor": False, "evaluator": Evaluator(test_metrics=auroc)}
    rlr = Rlr.from_run(root / "ours", visualizer=False, **options)
    engine = Engine(default_root_dir=tmp_path, **QUIET)
    [metrics] = engine.test(rlr, datamodule=data(root / "data"), verbose=False)
    labels, scores, masks, maps = [], [], [], []
    for of_class in read_dataset(root / "data").test.values():
        for sample in of_class:
            out = ours.eval()(load_image(sample.path, CONFIG.image_size)[None])
            labels.append(sample.is_anomaly)
            scores.append(out.score.item())
            masks.append(load_sample_mask(sample, CONFIG.image_size).flatten())
            maps.append(out.score_map.detach().flatten())
    expected = roc_auc_score(labels, scores), roc_auc_score(torch.cat(masks), torch.cat(maps))
    found = metrics["image_AUROC"], metrics["pixel_AUROC"]
    assert found == pytest.approx(expected, abs=1e-5)


def test_thresholds_are_of_the_scores_that_the_trained_model_gives(trained):
    root, rlr, _ = trained
    assert rlr.rlr.config.level_weights != (1.0,)  # the levels were scaled
    scores = []
    for batch in data_of(root).val_dataloader():
        with torch.no_grad():
            scores += rlr.rlr.eval()(batch.image).score.tolist()
    found = rlr.post_processor.image_min, rlr.post_processor.image_max
    assert [bound.item() for bound in found] == pytest.approx([min(scores), max(scores)], rel=1e-4)


def test_what_has_no_thresholds_or_no_end_of_training_is_told(trained, ours, tmp_path, caplog):
    root, _, _ = trained
    quiet = {**QUIET, "enable_model_summary": False}
    engine = Engine(default_root_dir=tmp_path, **quiet)
    rlr = Rlr.from_run(root / "ours", visualizer=False)
    engine.test(rlr, datamodule=data(root / "data"), verbose=False)
    assert "call engine.validate(model, datamodule=data) before" in caplog.text
    engine.validate(rlr, datamodule=data(root / "data"), verbose=False)
    caplog.clear()
    engine.test(rlr, datamodule=data(root / "data"), verbose=False)
    engine = Engine(default_root_dir=tmp_path, max_steps=2, **quiet)
    assert not [r for r in caplog.records if r.name.startswith("rlr_fast")]
    engine.fit(module(), datamodule=data(root / "data"))
    assert "training was stopped 4 steps before the end of the recipe" in caplog.text


@pytest.mark.parametrize("bits", [8, 16])
def test_images_and_masks_are_read_as_ours(tmp_path, bits):
    make_tree(tmp_path, classes=("bolt",))
    path = sorted((tmp_path / "bolt/train/good").iterdir())[0]
    gray = np.asarray(Image.open(path).convert("L"))
    Image.fromarray(gray.astype(np.uint16) * 257 if bits == 16 else gray).save(path)
    module = data(tmp_path)
    module.setup()
    found = {
        item.image_path: item for part in (module.train_data, module.test_data) for item in part
    }
    expected = read_dataset(tmp_path)
    assert len(found) == len(expected.train["bolt"]) + len(expected.test["bolt"])
    for sample in (*expected.train["bolt"], *expected.test["bolt"]):
        item = found[str(sample.path)]
        size = tuple(item.image.shape[-2:])
        assert torch.equal(
            (255 * item.image).round().to(torch.uint8), load_image(sample.path, size)
        )
        assert torch.equal(item.gt_mask.bool(), load_sample_mask(sample, size))
        assert bool(item.gt_label) == sample.is_anomaly


def test_mistakes_are_told_before_training(tmp_path):
    make_tree(tmp_path, classes=("bolt", "nut"))
    shutil.rmtree(tmp_path / "nut/ground_truth")
    with pytest.raises(ValueError, match="shows a defect and has no mask"):
        data(tmp_path).setup()
    with pytest.raises(ValueError, match="has no field 'epoch'; did you mean 'epochs'"):
        Rlr("tiny", CONFIG.to_dict(), {"epoch": 3})


def test_a_checkpoint_of_the_engine_is_loaded_safely_and_scores_the_same(trained):
    _, rlr, engine = trained
    path = engine.trainer.checkpoint_callback.best_model_path
    assert path
    kept = torch.load(path, weights_only=True)
    assert "rlr_config" in kept
    loaded = Rlr.load_from_checkpoint(path, visualizer=False, weights_only=True)
    images = torch.rand(3, 3, *CONFIG.image_size)
    expected = rlr.rlr.eval()(images)
    torch.testing.assert_close(loaded.rlr.eval()(images).score, expected.score)


def test_a_training_that_is_gone_on_with_ends_as_one_that_was_not_stopped(trained, tmp_path):
    class Keep(Callback):
        def on_train_epoch_end(self, trainer, _):
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "first.ckpt")

    root, _, _ = trained
    recipe = dataclasses.replace(RECIPE, schedule="cosine")
    whole, second = module(recipe), module(recipe)
    engine = Engine(default_root_dir=tmp_path / "whole", callbacks=[Keep()], **QUIET)
    engine.fit(whole, datamodule=data(root / "data"))
    engine = Engine(default_root_dir=tmp_path / "second", **QUIET)
    engine.fit(second, datamodule=data(root / "data"), ckpt_path=tmp_path / "first.ckpt")
    expected = whole.rlr.checkpoint_state()
    for name, value in second.rlr.checkpoint_state().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0, msg=name)


def test_what_was_loaded_is_fitted_to_new_images_as_what_is_new(trained, tmp_path):
    path = trained[2].trainer.checkpoint_callback.best_model_path
    loaded = Rlr.load_from_checkpoint(path, visualizer=False, weights_only=True)
    make_tree(tmp_path / "data", ("nut",), train=7)
    Engine(default_root_dir=tmp_path, **QUIET).fit(loaded, datamodule=data(tmp_path / "data"))
    new = module()
    Engine(default_root_dir=tmp_path, **QUIET).fit(new, datamodule=data(tmp_path / "data"))
    for one, other in zip(loaded.rlr.standardize, new.rlr.standardize, strict=True):
        torch.testing.assert_close(one.mean, other.mean)
        torch.testing.assert_close(one.std, other.std)


def test_a_run_of_ours_is_scored_as_it_is(trained, ours):
    root, _, _ = trained
    rlr = Rlr.from_run(root / "ours", visualizer=False).eval()
    images = torch.rand(3, 3, *CONFIG.image_size)
    found = rlr.model(images)
    expected = ours.eval()(images)
    torch.testing.assert_close(found.pred_score, expected.score)
    torch.testing.assert_close(found.anomaly_map, expected.score_map)


@pytest.fixture
def picture(ours, tmp_path):
    """A file of the model's size, and what we make of it."""
    pixels = torch.randint(0, 256, (3, *CONFIG.image_size), dtype=torch.uint8)
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(tmp_path / "picture.png")
    with torch.no_grad():
        return tmp_path / "picture.png", ours.eval()(pixels[None])


def raw(run):
    """Return a run's model without the post-processor, for the scores themselves."""
    return Rlr.from_run(run, visualizer=False, post_processor=False).eval()


def test_anomalibs_torch_inferencer_gives_our_scores(trained, picture, tmp_path, monkeypatch):
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")  # the file is a pickle
    path, expected = picture
    found = TorchInferencer(raw(trained[0] / "ours").to_torch(tmp_path), device="cpu").predict(path)
    torch.testing.assert_close(found.pred_score, expected.score)
    torch.testing.assert_close(found.anomaly_map, expected.score_map[:, 0])


def test_anomalibs_openvino_inferencer_gives_our_scores(trained, picture, tmp_path, monkeypatch):
    pytest.importorskip("openvino")
    monkeypatch.chdir(tmp_path)  # where OpenVINO keeps what it compiles
    path, expected = picture
    rlr = raw(trained[0] / "ours")
    rlr.rlr.set_backend("tiled")  # which takes tiles only on larger grids by itself
    f32 = {"INFERENCE_PRECISION_HINT": "f32"}
    found = OpenVINOInferencer(rlr.to_openvino(tmp_path), config=f32).predict(path)
    assert found.pred_score == pytest.approx(expected.score.numpy(), rel=1e-4)
    largest = float(expected.score_map.max())
    assert found.anomaly_map == pytest.approx(expected.score_map.numpy(), abs=1e-4 * largest)


def test_scores_in_eight_bits_are_refused(trained, tmp_path):
    with pytest.raises(ValueError, match="compression_type must be None or FP16, got int8_ptq"):
        raw(trained[0] / "ours").to_openvino(tmp_path, compression_type=CompressionType.INT8_PTQ)


def test_what_the_engine_trained_is_a_folder_for_us(trained, tmp_path):
    _, rlr, _ = trained
    rlr.rlr.save_pretrained(tmp_path / "run")
    images = torch.rand(2, 3, *CONFIG.image_size)
    found = RLRModel.from_pretrained(tmp_path / "run").eval()(images)
    torch.testing.assert_close(found.score, rlr.rlr.eval()(images).score)


def test_batches_that_are_not_those_of_the_recipe_are_refused(trained, tmp_path):
    root, _, _ = trained
    engine = Engine(default_root_dir=tmp_path, **QUIET)
    with pytest.raises(ValueError, match="train_batch_size must be that of the recipe, 4, got 3"):
        engine.fit(module(), datamodule=MultiCategory(root / "data", train_batch_size=3))


def test_all_normal_images_are_trained_on_where_the_test_has_none(tmp_path):
    make_tree(tmp_path, ("bolt", "cloth"))
    for category in ("bolt", "cloth"):
        shutil.rmtree(tmp_path / category / "test/good")
    module = data(tmp_path)
    module.setup()
    assert len(module.train_data) == 10 and len(module.test_data) == 4


def test_pictures_of_all_classes_are_written(trained, tmp_path):
    root, _, _ = trained
    rlr = Rlr.from_run(root / "ours", backbone_weights="random")
    engine = Engine(default_root_dir=tmp_path, **QUIET)
    engine.validate(rlr, datamodule=data(root / "data"), verbose=False)
    engine.test(rlr, datamodule=data(root / "data"), verbose=False)
    assert len(list(tmp_path.rglob("*.png"))) == 8


def test_a_pre_processor_that_crops_is_one_for_the_scales_too(trained, tmp_path):
    root, _, _ = trained
    crop = PreProcessor(Compose([Resize((56, 72)), CenterCrop(CONFIG.image_size)]))
    Engine(default_root_dir=tmp_path, **QUIET).fit(
        module(pre_processor=crop), datamodule=data(root / "data")
    )


def test_a_pre_processor_of_other_images_than_the_models_is_refused():
    with pytest.raises(ValueError, match="pre_processor must make images of 48 x 64 pixels"):
        module(pre_processor=PreProcessor(Resize((64, 64))))
    normalize = Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    with pytest.raises(ValueError, match=r"must leave pixels in \[0, 1\].* -2.12 to 2.64"):
        module(pre_processor=PreProcessor(Compose([Resize(CONFIG.image_size), normalize])))


def test_levels_are_replaced_as_the_command_does():
    rlr = Rlr("accurate", {"out_indices": [3], "patches": [1], "backbone_weights": "random"})
    assert rlr.config.hidden == PRESETS["accurate"].model.hidden[:1]


def test_a_preset_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="preset: there is no 'small'"):
        Rlr("small")


def test_the_data_module_has_all_classes(trained):
    root, _, _ = trained
    module = data(root / "data")
    module.setup()
    assert len(module.train_data) == 10 and len(module.test_data) == 8
    assert set(module.train_data.samples.category) == {"bolt", "cloth"}
    assert module.task == "segmentation"
    item = next(i for i in module.test_data if i.gt_label)
    assert item.gt_mask.any()
