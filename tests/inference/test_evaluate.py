"""Evaluation: the model's numbers, and a bad file does not stop the others."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

from rlr_fast import RLRModel
from rlr_fast.data import load_image, load_sample_mask, read_dataset
from rlr_fast.files import file_digest
from rlr_fast.inference.decisions import Decider
from rlr_fast.inference.evaluate import FigureOptions, evaluate, protocol
from rlr_fast.training.calibration import Calibration, ClassScores
from rlr_fast.visualization.report.writer import ReportWriter


@pytest.fixture
def model(small):
    return RLRModel(small).eval()


@torch.no_grad()
def scored(model, samples):
    size = model.config.image_size
    outs = [model(load_image(s.path, size)[None]) for s in samples]
    return torch.cat([o.score for o in outs]), torch.cat([o.score_map[:, 0] for o in outs])


def test_metrics_are_those_of_the_models_scores_and_the_masks(model, dataset, small):
    result = evaluate(model, dataset)
    for name, samples in dataset.test.items():
        score, maps = scored(model, samples)
        labels = [s.is_anomaly for s in samples]
        masks = np.stack([load_sample_mask(s, small.image_size).numpy() for s in samples])
        found = result.classes[name]
        assert found["image_auroc"] == pytest.approx(roc_auc_score(labels, score))
        assert found["pixel_auroc"] == pytest.approx(roc_auc_score(masks.ravel(), maps.ravel()))
    means = [np.mean([c[k] for c in result.classes.values()]) for k in result.mean]
    assert list(result.mean.values()) == pytest.approx(means)


def test_metrics_file_has_the_agreed_format(model, dataset):
    values = json.loads(evaluate(model, dataset).to_json())
    assert list(values) == ["mean", "classes", "protocol", "environment", "failures"]
    assert set(values["classes"]) == {"bolt", "cloth"}
    metrics = "image_auroc image_ap image_f1max pixel_auroc pixel_ap pixel_f1max aupro"
    assert list(values["mean"]) == metrics.split()
    assert values["protocol"]["image_size"] == [48, 64]
    assert torch.__version__.startswith(values["environment"]["packages"]["torch"])


@pytest.mark.parametrize(
    ("size", "smoothing", "words"),
    [
        ((64, 64), 4.0, "the score map after a Gaussian, sigma 1 px"),
        ((48, 64), 4.0, "the score map after a Gaussian, sigma 0.75 x 1 px"),
        ((48, 64), 0.0, "the score map"),
    ],
    ids=["square", "oblong", "off"],
)
def test_the_image_score_is_told_in_words(small, dataset, size, smoothing, words):
    config = dataclasses.replace(small, image_size=size, smoothing=smoothing)
    assert protocol(RLRModel(config), dataset)["image_score"] == f"maximum of {words}"


def test_the_surround_is_told(small, dataset):
    config = dataclasses.replace(small, image_size=(64, 128), smoothing=4.0, surround=32.0)
    told = protocol(RLRModel(config), dataset)
    assert told["image_score"].endswith("the score map after a Gaussian, sigma 1 x 2 px")
    assert told["pixel_score"] == (
        "score map, less what a Gaussian of sigma 8 x 16 px makes of it, not smoothed"
    )
    told = protocol(RLRModel(dataclasses.replace(config, image_surround=16.0)), dataset)
    assert told["image_score"].endswith(
        "after a Gaussian, sigma 1 x 2 px, less what a Gaussian of sigma 4 x 8 px makes of it"
    )


def test_the_power_of_the_uncertainty_is_told(small, dataset):
    for power in (0.0, 0.4):
        config = dataclasses.replace(small, uncertainty=power)
        assert protocol(RLRModel(config), dataset)["uncertainty"] == power


def test_the_share_of_the_highest_pixels_is_told(small, dataset):
    words = protocol(RLRModel(dataclasses.replace(small, top_share=0.005)), dataset)["image_score"]
    assert words.startswith("mean of the highest 0.500% of the score map after a Gaussian")


def test_a_corrupt_test_image_is_left_out_and_named(model, dataset):
    broken = dataset.test["bolt"][0].path
    broken.write_bytes(b"no image")
    result = evaluate(model, dataset)
    assert len(result.failures) == 1 and str(broken) in result.failures[0]
    assert np.isfinite(result.classes["bolt"]["pixel_auroc"])


def test_a_class_of_which_no_image_can_be_read_costs_no_other(model, dataset, tmp_path):
    for sample in dataset.test["bolt"]:
        sample.path.write_bytes(b"no image")
    with ReportWriter(tmp_path, "evaluation", (0.0, 1.0), {}) as report:
        figures = FigureOptions(tmp_path / "sheets", (0.0, 1.0))
        result = evaluate(model, dataset, report=report, figures=figures)
    assert len(result.failures) == len(dataset.test["bolt"])
    values = json.loads(result.to_json())
    assert set(values["classes"]["bolt"].values()) == {None}
    assert values["mean"] == values["classes"]["cloth"] and None not in values["mean"].values()
    for sample in dataset.test["cloth"]:
        sample.path.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"no test image can be read: .*bolt"):
        evaluate(model, dataset)


def test_a_mask_of_the_wrong_size_stops_before_any_image_is_scored(model, dataset, tree):
    Image.new("L", (10, 10)).save(tree / "cloth/ground_truth/hole/001_mask.png")
    model.register_forward_pre_hook(lambda *_: pytest.fail("an image was scored"))
    with pytest.raises(
        ValueError, match=r"masks that are missing or of another size: 1\n.*001_mask\.png is 10 x"
    ):
        evaluate(model, dataset)


def test_a_defective_image_without_mask_is_not_taken_for_normal(model, tree):
    (tree / "cloth/ground_truth/hole/001_mask.png").unlink()
    with pytest.raises(ValueError, match=r"hole/001\.png shows a defect and has no mask"):
        evaluate(model, read_dataset(tree))


def test_a_set_without_any_mask_has_image_metrics_only(model, tree):
    shutil.rmtree(tree / "cloth/ground_truth")
    shutil.rmtree(tree / "bolt/ground_truth")
    values = json.loads(evaluate(model, read_dataset(tree)).to_json())
    assert values["mean"]["pixel_auroc"] is None and values["mean"]["image_auroc"] is not None


def test_a_corrupt_mask_costs_its_image_only(model, dataset):
    mask = dataset.test["bolt"][2].mask_paths[0]
    mask.write_bytes(mask.read_bytes()[:60])
    result = evaluate(model, dataset)
    assert len(result.failures) == 1 and str(mask) in result.failures[0]
    assert np.isfinite(result.classes["bolt"]["pixel_auroc"])


def test_a_class_without_test_images_is_named(model, tree):
    for path in (tree / "cloth/test").rglob("*.png"):
        path.unlink()
    with pytest.raises(ValueError, match="cloth"):
        evaluate(model, read_dataset(tree))


def test_only_normal_images_give_null_instead_of_numbers(model, tree):
    for path in (tree / "cloth/test/hole").iterdir():
        path.unlink()
    values = json.loads(evaluate(model, read_dataset(tree)).to_json())
    assert values["classes"]["cloth"]["image_auroc"] is None
    assert values["mean"]["image_auroc"] == values["classes"]["bolt"]["image_auroc"]


def test_figures_are_written_for_each_class(model, dataset, tmp_path):
    evaluate(model, dataset, figures=FigureOptions(tmp_path / "figures", (0.0, 1.0)))
    assert {p.name for p in (tmp_path / "figures").iterdir()} == {"bolt.png", "cloth.png"}


def test_false_alarms_and_misses_are_counted_without_the_calibration_images(model, dataset):
    name, samples = "bolt", dataset.test["bolt"]
    score, _ = scored(model, samples)
    limit = float(score[:2].max())  # of the normal images
    known = [(limit, limit, "")] * 8 + [(limit, limit, file_digest(samples[0].path))]
    calibration = Calibration({}, {name: ClassScores.of(known, "test")})
    result = evaluate(model, dataset, decider=Decider(calibration, 0.1))
    values = json.loads(result.to_json())["decisions"]
    assert list(values["classes"]) == [name]  # cloth has no calibration images
    labels = np.array([s.is_anomaly for s in samples])
    above = score.numpy() > limit
    counts = values["classes"][name]
    assert (counts["threshold"], counts["calibration_images"]) == (limit, 9)
    assert counts["normal"] == 1 and counts["false_alarms"] == int(above[1]) == 0
    assert counts["anomalous"] == 2 and counts["misses"] == int((~above & labels).sum())
    assert values["all"]["miss_rate"] == counts["miss_rate"] == counts["misses"] / 2
    assert values["alpha"] == 0.1 and values["pool"] is False
    assert "decisions at alpha 0.1:" in result.table()


def test_an_image_without_a_finite_score_is_left_out_and_named(model, dataset, monkeypatch):
    forward, seen = RLRModel.forward, []

    def broken(self, batch):
        out = forward(self, batch)
        if not seen:
            out.score[0] = float("nan")
        seen.append(batch)
        return out

    monkeypatch.setattr(RLRModel, "forward", broken)
    result = evaluate(model, dataset)
    [failure] = result.failures
    assert str(dataset.test["bolt"][0].path) in failure and "not finite" in failure
