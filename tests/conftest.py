"""Shared fixtures: seeds, poisoned uninitialized memory, small data sets and a small model."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import Forks
from gpu import DEVICE, ON_GPU
from interpreter import quicken
from PIL import Image

if not ON_GPU:
    # The real kernels, run by Triton's interpreter; Triton reads this when it is imported.
    os.environ["TRITON_INTERPRET"] = "1"
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    # Processes that run tests side by side share the cores; the commands they start do as well.
    _share = max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    os.environ["OMP_NUM_THREADS"] = str(_share)
    torch.set_num_threads(_share)
from rlr_fast import RLRConfig, TrainConfig
from rlr_fast.data import DataSet, read_dataset
from rlr_fast.training import train as _training

HAS_TRITON = importlib.util.find_spec("triton") is not None
collect_ignore_glob = [] if HAS_TRITON else ["kernels/*"]
if HAS_TRITON and not ON_GPU:
    quicken()


# A short training takes less time than the picture of its loss, which one test of training draws.
_training.loss_curve = lambda history, path: Path(path).touch()

# What takes longest comes first, so that no process is left alone with it at the end.
_LONG = ("ptx", "training", "kernels", "benchmarks", "paper", "export")


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config.option, "loadscopereorder"):  # xdist: the files with most tests come first
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.parent.name not in _LONG)


@pytest.fixture(scope="session")
def compiler():
    """A process with Triton's compiler; Triton takes it or its interpreter when imported."""
    modules = ("benchmarks.codegen", "benchmarks.survey", "tests.ptx.__main__")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    with Forks(modules, environment) as process:
        yield process


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned_empty():
    """Fill torch.empty with NaN, so that a value nobody wrote is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def device() -> torch.device:
    return DEVICE


SMALL = RLRConfig(
    backbone="tf_efficientnet_lite0",
    backbone_weights="random",
    out_indices=(2, 3),
    image_size=(48, 64),
    hidden=(16, 32),
    heads=(2, 4),
    windows=(3, (3, 5)),
    blocks=1,
)
BRIEF = TrainConfig(epochs=3, batch_size=4, lr=1e-3)


@pytest.fixture
def small() -> RLRConfig:
    """A model of two levels on 6x8 and 3x4 tokens with an untrained backbone."""
    return SMALL


@pytest.fixture
def brief() -> TrainConfig:
    """Three epochs."""
    return BRIEF


def save_picture(path: Path, seed: int, size: tuple[int, int] = (48, 64)) -> None:
    """Write a picture of smooth noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((size[1], size[0])).save(path)


def make_tree(root: Path, classes: tuple[str, ...] = ("bolt", "cloth"), train: int = 5) -> Path:
    """Write a small set in MVTec-AD's layout: ``train`` + 2 normal, 2 defective images a class."""
    for k, name in enumerate(classes):
        for i in range(train):
            save_picture(root / name / "train/good" / f"{i:03d}.png", 100 * k + i)
        for i in range(2):
            save_picture(root / name / "test/good" / f"{i:03d}.png", 100 * k + 20 + i)
            save_picture(root / name / "test/hole" / f"{i:03d}.png", 100 * k + 40 + i)
            mask = np.zeros((48, 64), dtype=np.uint8)
            mask[8 + 8 * i : 20 + 8 * i, 16:40] = 255
            target = root / name / "ground_truth/hole" / f"{i:03d}_mask.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(target)
    return root


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The folder of a small data set with two classes."""
    return make_tree(tmp_path / "data")


@pytest.fixture
def dataset(tree: Path) -> DataSet:
    return read_dataset(tree)
