"""Whole jobs, from files to figures: what a user waits for. Images a second stand beside the time.

Pictures are noise with structure, written once. A CPU runs the ``tiny`` preset, a GPU the paper's
with untrained weights of the backbone: speed does not depend on them.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import rankdata

from benchmarks.check import WrongResultError
from benchmarks.record import bench_device
from rlr_fast import RLRConfig, RLRModel, TrainConfig
from rlr_fast.config import Cache, TrainExecution
from rlr_fast.data import DataSet, load_image, read_dataset
from rlr_fast.inference.metrics import class_metrics
from rlr_fast.prediction.image_files import find_images
from rlr_fast.prediction.predict import predict
from rlr_fast.prediction.results import LINES_FILE, read_rows
from rlr_fast.training.feature_cache import FeatureCache, cached_features
from rlr_fast.training.train import train

DEVICE = bench_device()
GPU = DEVICE.type == "cuda"
CONFIG = dataclasses.replace(
    RLRConfig.preset("paper" if GPU else "tiny"), backbone_weights="random"
)
IMAGES = 256 if GPU else 32
SIDE = 512  # of the files: inspection cameras give more pixels than the model sees
BATCH = 64 if GPU else 8
RECIPE = TrainConfig(epochs=3, batch_size=BATCH, precision="bf16" if GPU else "fp32")

# Of the jobs, those that a headline on a CPU has the time for.
CPU_HEADLINE = ("test_train[auto]", "test_predict[scores]")

# Wall time: files, host and device all belong to a job.
pytestmark = pytest.mark.benchmark(min_rounds=3)


class Setting:
    """The pictures, the model and a folder to write to; made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        rng = np.random.default_rng(0)
        for i in range(IMAGES):
            path = folder / "data/part" / ("train" if i % 2 else "test") / "good" / f"{i:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            coarse = rng.integers(0, 255, (SIDE // 16, SIDE // 16, 3), dtype=np.uint8)
            noise = rng.integers(0, 8, (SIDE, SIDE, 3), dtype=np.uint8)
            smooth = np.asarray(Image.fromarray(coarse).resize((SIDE, SIDE))) // 2 + noise
            Image.fromarray(smooth).save(path)
        self.data: DataSet = read_dataset(folder / "data")
        torch.manual_seed(0)
        self.model = RLRModel(CONFIG).to(DEVICE).eval()
        self.samples = self.data.train["part"] + self.data.test["part"]
        self.images = torch.stack(
            [load_image(s.path, CONFIG.image_size) for s in self.samples[:BATCH]]
        ).to(DEVICE)

    def fresh(self) -> Path:
        """An empty folder."""
        return Path(tempfile.mkdtemp(dir=self.folder))


def _require(ok: bool, what: str) -> None:
    if not ok:
        raise WrongResultError(what)


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    """The pictures and the model, for all jobs."""
    yield Setting(tmp_path_factory.mktemp("jobs"))


def _time(measure: Callable[..., None], job: str, images: int, check: object, call: object) -> None:
    info = {
        "suite": "jobs",
        "job": job,
        "images": images,
        "preset": "paper" if GPU else "tiny",
        "image_size": "x".join(map(str, CONFIG.image_size)),
        "file_size": f"{SIDE}x{SIDE}",
        "batch": BATCH,
        "dtype": RECIPE.precision,
    }
    measure(info, f"job {job}", check, lambda: call)


def test_backbone(measure: Callable[..., None], setting: Setting) -> None:
    """Images on the device → feature maps, a batch."""

    def check() -> dict[str, float]:
        whole = setting.model.tokens(setting.images)
        alone = setting.model.tokens(setting.images[-1:])
        error = max(
            float((w[-1:] - a).norm() / a.norm()) for w, a in zip(whole, alone, strict=True)
        )
        _require(error < 1e-3, f"an image's features depend on its batch by {error:.1e}")
        return {"features": error}

    _time(measure, "backbone", BATCH, check, partial(setting.model.tokens, setting.images))


def test_feature_cache(measure: Callable[..., None], setting: Setting) -> None:
    """Files → features on disk."""

    def build() -> FeatureCache:
        return cached_features(setting.model, setting.samples, setting.fresh(), "disk")

    def check() -> dict[str, float]:
        found = build().batch(torch.arange(BATCH), DEVICE)
        error = max(
            float((f - t).norm() / t.norm())
            for f, t in zip(found, setting.model.tokens(setting.images), strict=True)
        )
        _require(error < 1e-2, f"the cache's features err by {error:.1e}")
        return {"features": error}

    _time(measure, "feature cache", IMAGES, check, build)


@pytest.mark.parametrize("placement", ["auto", "none"])
def test_train(measure: Callable[..., None], setting: Setting, placement: Cache) -> None:
    """Three epochs, from files and with the features kept from an earlier run."""
    root = setting.fresh()
    count = RECIPE.epochs * len(setting.data.train["part"])

    def run() -> list[dict[str, float]]:
        result = train(
            CONFIG, RECIPE, setting.data, setting.fresh(),
            TrainExecution(device=str(DEVICE), cache_dir=root, cache=placement), quiet=True,
        )  # fmt: skip
        return result.history

    def check() -> dict[str, float]:
        loss = run()[0]["loss"]
        other = train(
            CONFIG, dataclasses.replace(RECIPE, epochs=1), setting.data, setting.fresh(),
            TrainExecution(device=str(DEVICE), cache_dir=root, cache="disk"), quiet=True,
        ).history[0]["loss"]  # fmt: skip
        error = abs(loss - other) / other
        _require(error < 1e-2, f"the first loss is {loss}, {other} with the cache on disk")
        return {"loss": error}

    name = "train, features kept" if placement == "auto" else "train, features made each time"
    _time(measure, name, count, check, run)


def test_metrics(measure: Callable[..., None]) -> None:
    """Scores and masks of a class's test images → its seven metrics."""
    rng = np.random.default_rng(0)
    count, side = 100, 256
    labels = np.arange(count) % 2 == 1
    masks = np.zeros((count, side, side), dtype=bool)
    masks[labels, 40:70, 80:120] = True
    maps = rng.random((count, side, side), dtype=np.float32) + 0.5 * masks
    scores = maps.max((1, 2))

    def check() -> dict[str, float]:
        found = class_metrics(scores[:10], labels[:10], maps[:10], masks[:10])
        pixels, truth = maps[:10].ravel(), masks[:10].ravel()
        ranks = rankdata(pixels)
        ones = truth.sum()
        area = (ranks[truth].sum() - ones * (ones + 1) / 2) / (ones * (len(pixels) - ones))
        error = abs(found["pixel_auroc"] - area)
        _require(error < 1e-9, f"pixel AUROC errs by {error:.1e}")
        return {"pixel_auroc": error}

    _time(measure, "metrics", count, check, lambda: class_metrics(scores, labels, maps, masks))


@pytest.mark.parametrize("pictures", [False, True], ids=["scores", "scores-and-pictures"])
def test_predict(measure: Callable[..., None], setting: Setting, pictures: bool) -> None:
    """Files → table of scores, and heat maps beside them."""
    files = find_images([setting.folder / "data"])
    scale = (0.0, 1.0) if pictures else None

    def run() -> dict[str, float]:
        results = predict(setting.model, files, setting.fresh(), scale).results
        return {row["path"]: row["score"] for row, _ in read_rows(results.with_name(LINES_FILE))}

    def check() -> dict[str, float]:
        scores = run()
        with torch.inference_mode():
            expected = setting.model(setting.images).score.tolist()
        pairs = zip(setting.samples, expected, strict=False)
        error = max(abs(scores[str(s.path)] / e - 1) for s, e in pairs)
        _require(error < 1e-3, f"a score errs by {error:.1e}")
        return {"score": error}

    name = "predict" + (", with pictures" if pictures else "")
    _time(measure, name, IMAGES, check, run)
