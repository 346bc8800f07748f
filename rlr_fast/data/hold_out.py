"""Normal images kept out of training, so that scores on images the model never saw are known."""

from __future__ import annotations

import dataclasses
import hashlib
import os

from rlr_fast.data.layouts import DataSet, Sample

MIN_IMAGES = 50
"""A class of fewer images keeps all of them for training."""


def hold_out(data: DataSet, share: float, seed: int) -> DataSet:
    """Move a part of each class's images to train on into ``validation``.

    Which ones depends on the seed and on their names within the data set alone, so every process
    takes the same. A class that has images in ``validation`` keeps its split, and so does one of
    fewer than `MIN_IMAGES`.

    Args:
        data: A data set.
        share: Of the images of a class, from 0 to 1; at least one of them stays.
        seed: Another seed takes others.
    """
    train, validation = dict(data.train), dict(data.validation)
    for name, samples in data.train.items():
        if share == 0 or validation.get(name) or len(samples) < MIN_IMAGES:
            continue

        def order(sample: Sample) -> bytes:
            place = os.path.relpath(sample.path, data.root)
            return hashlib.sha256(os.fsencode(f"{seed}\0{place}")).digest()

        count = min(round(share * len(samples)), len(samples) - 1)
        held = set(sorted(samples, key=order)[:count])
        train[name] = [sample for sample in samples if sample not in held]
        validation[name] = [sample for sample in samples if sample in held]
    return dataclasses.replace(data, train=train, validation=validation)
