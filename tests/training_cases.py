"""What tests of training share: a short training, and its weights."""

from __future__ import annotations

import dataclasses
import json

import safetensors.torch
import torch
from conftest import BRIEF, SMALL

from rlr_fast.config import TrainExecution
from rlr_fast.training.train import train


def run(dataset, out, tmp_path, config=SMALL, recipe=BRIEF, **options):
    names = {field.name for field in dataclasses.fields(TrainExecution)}
    given = {name: options.pop(name) for name in names & options.keys()}
    execution = TrainExecution(device="cpu", cache_dir=tmp_path / "cache", **given)
    return train(config, recipe, dataset, out, execution, **{"quiet": True} | options)


def run_record(root, classes):
    """Return the text of ``run.json``, of a run on a set in MVTec-AD's layout."""
    images = {"layout": "mvtec", "classes": [*classes], "images": 0, "files_digest": ""}
    data = {"root": str(root), **images, "kept_out_digest": ""}
    return json.dumps({"model": {}, "recipe": {}, "data": data})


def weights(out):
    return safetensors.torch.load_file(out / "model.safetensors")


def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[k], other[k]) for k in one)
