"""``python -m benchmarks.peers ROOT``: other methods on a data set, by the metrics of RLR.

All see the same pictures at the same size through the same network, one model for all classes, and
are measured as ``rlr-fast eval`` measures: metrics per class, then their mean. ``--run FOLDER``
adds a trained RLR. All but nearest neighbors need `requirements.txt` beside this file, in an
environment of their own if you like.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import record
from benchmarks.peers.catalog import PEERS, make_peer
from benchmarks.peers.methods import Method
from benchmarks.peers.transformers import Training
from rlr_fast.config import InferenceExecution, check_seed, read_level
from rlr_fast.data import read_dataset
from rlr_fast.data.images import iterate_images
from rlr_fast.data.layouts import DataSet, Sample
from rlr_fast.inference.evaluate import check_masks, evaluate, ground_truth
from rlr_fast.inference.metrics import HEADINGS, class_metrics, format_table, mean_metrics
from rlr_fast.models.backbone import Backbone
from rlr_fast.models.backbone_weights import BackboneWeightsError
from rlr_fast.models.checkpoint import CheckpointError, check_checkpoint
from rlr_fast.pictures.batches import load_model

_BATCH = 8


def images_of(samples: Sequence[Sample], size: tuple[int, int]) -> Iterator[Tensor]:
    """Yield batches (B, 3, H, W) in [0, 1]; an image that cannot be read ends the program."""
    for batch in iterate_images(samples, size, _BATCH):
        if batch.failures:
            raise SystemExit(str(batch.failures[0].error))
        yield batch.images.float() / 255


def fit(method: Method, data: DataSet, size: tuple[int, int]) -> float:
    """Learn from the training images of all classes; return the seconds."""
    start = time.perf_counter()
    for samples in data.train.values():
        for images in images_of(samples, size):
            method.learn(images)
    method.finish()
    return time.perf_counter() - start


def measure(method: Method, data: DataSet, size: tuple[int, int]) -> tuple[dict[str, Any], float]:
    """Return the metrics by class, and the seconds that scoring took per image."""
    classes, seconds = {}, 0.0
    for name, samples in data.test.items():
        scores, maps = [], []
        start = time.perf_counter()
        for images in images_of(samples, size):
            score, score_map = method.score(images)
            scores.append(score.float().numpy())
            maps.append(score_map.float().numpy())
        seconds += time.perf_counter() - start
        masks = np.stack([ground_truth(sample, size) for sample in samples])
        labels = np.array([sample.is_anomaly for sample in samples])
        classes[name] = class_metrics(np.concatenate(scores), labels, np.concatenate(maps), masks)
    return classes, seconds / sum(map(len, data.test.values()))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("root", type=Path, help="a data set, as rlr-fast train takes it")
    parser.add_argument(
        "--peer", choices=PEERS, action="append", help="default: each that needs no gradient steps"
    )
    parser.add_argument("--run", type=Path, action="append", help="a trained RLR, as another row")
    parser.add_argument("--backbone", default="tf_efficientnet_lite0")
    parser.add_argument("--weights", default="package", help="as of rlr-fast train")
    parser.add_argument(
        "--levels", nargs="+", default=["2", "3"],
        help="such as 2 3, or 2-5 6-9 for the means of two groups of a ViT's blocks",
    )  # fmt: skip
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=Training.steps, help="of dinomaly, inp-former")
    parser.add_argument("--batch-size", type=int, default=Training.batch_size, help="of a step")
    record.add_record_option(parser)
    options = parser.parse_args(arguments)
    size = (options.image_size, options.image_size)
    methods: dict[str, Method] = {}
    try:
        check_seed(options.seed)
        runs = {run.name: run for run in options.run or []}
        if len(runs) < len(options.run or []):
            raise ValueError(
                "--run: folders must have names of their own, by which rows are called"
            )
        for run in runs.values():
            check_checkpoint(run)
        data = read_dataset(options.root)
        data.require_train()
        data.require_test()
        check_masks(data)
        levels = [read_level(level) for level in options.levels]
        backbone = Backbone(options.backbone, options.weights, levels, size)
        training = Training(options.steps, options.batch_size)
        for name in options.peer or [name for name, peer in PEERS.items() if not peer.is_trained]:
            torch.manual_seed(options.seed)
            methods[name] = make_peer(name, backbone, training)
    except (ValueError, BackboneWeightsError, CheckpointError, ModuleNotFoundError) as error:
        parser.error(str(error))
    recorder = record.Recorder(options.record)
    rows: dict[str, dict[str, float]] = {}

    def add(name: str, label: str, classes: dict[str, Any], **facts: Any) -> None:
        rows[name] = mean_metrics(classes)
        recorder.add(
            {"suite": "peers", "outcome": "ok", "name": name, "label": label,
             "data": data.root.name, "seed": options.seed, "mean": rows[name], "classes": classes,
             **facts}
        )  # fmt: skip
        told = "  ".join(f"{HEADINGS[k]} {100 * v:.1f}" for k, v in rows[name].items())
        print(f"{name}: {told}  {facts}", flush=True)

    for name, method in methods.items():
        torch.manual_seed(options.seed)
        np.random.seed(options.seed)  # PatchCore's projection, on which its coreset depends
        fit_s = fit(method, data, size)
        classes, image_s = measure(method, data, size)
        facts = dataclasses.asdict(training) if PEERS[name].is_trained else {}
        add(name, PEERS[name].label, classes, fit_s=fit_s, image_s=image_s, **facts)
    for folder, run in runs.items():
        model = load_model(run, InferenceExecution())
        name = f"rlr {folder}"
        start = time.perf_counter()
        found = evaluate(model, data)
        images = sum(map(len, data.test.values()))
        add(name, "RLR", dict(found.classes), fit_s=None,
            image_s=(time.perf_counter() - start) / images)  # fmt: skip
    recorder.close()
    print(format_table(rows, rows[next(reversed(rows))]).rsplit("\n", 2)[0])
    return 0


if __name__ == "__main__":
    sys.exit(main())
