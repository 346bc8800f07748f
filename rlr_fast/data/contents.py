"""What files a data set holds, by names, sizes and times, and which of them cannot be read."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlr_fast.data.images import UnreadableImageError, open_image, read_mask, to_rgb
from rlr_fast.data.layouts import DataSet, Sample
from rlr_fast.data.threads import map_ahead

FILES = {"train": "training images", "test": "test images", "masks": "test masks"}
"""The kinds of files, in words."""

Digests = dict[str, dict[str, str]]
"""Of each class, a digest of each kind of `FILES`."""


def describe_images(data: DataSet, images: Mapping[str, Sequence[Sample]]) -> dict[str, Any]:
    """Return which of a set's images a run takes, by names and sizes, wherever the folder lies."""
    digest, count = hashlib.sha256(), 0
    for samples in images.values():
        for sample in samples:
            name = os.path.relpath(sample.path, data.root)
            size = sample.path.stat().st_size if sample.path.exists() else None
            digest.update(os.fsencode(f"{name}\0{size}\n"))
            count += 1
    return {
        "root": str(data.root),
        "layout": data.layout,
        "classes": list(data.classes),
        "images": count,
        "files_digest": digest.hexdigest(),
    }


def file_digests(data: DataSet) -> Digests:
    """Return digests of the files where they lie: names, labels, sizes and times of change.

    A file that was written again has another digest, even with equal pixels; other pixels are
    missed only where size and time of change are the same.
    """
    digests = {}
    for name in data.classes:
        hashes = {kind: hashlib.sha256() for kind in FILES}
        for split, samples in (("train", data.train[name]), ("test", data.test[name])):
            for sample in samples:
                hashes[split].update(_state(sample.path, data.root) + os.fsencode(sample.defect))
                for mask in sample.mask_paths:
                    hashes["masks"].update(_state(mask, data.root))
        digests[name] = {kind: digest.hexdigest() for kind, digest in hashes.items()}
    return digests


def _state(path: Path, root: Path) -> bytes:
    try:
        stat = path.stat()
        state = f"{stat.st_size} {stat.st_mtime_ns}"
    except OSError:
        state = "missing"
    return os.fsencode(f"{os.path.relpath(path, root)}\0{state}\n")


def changed_files(old: Mapping[str, Mapping[str, str]], new: Digests) -> list[str]:
    """Say in words which files are others, by `file_digests`."""
    return [
        f"the {what} of {name} are others"
        for name in sorted(old.keys() | new.keys())
        for kind, what in FILES.items()
        if old.get(name, {}).get(kind) != new.get(name, {}).get(kind)
    ]


def unreadable_files(
    data: DataSet,
    workers: int | None = None,
    progress: Callable[[int], object] = lambda images: None,
) -> list[str]:
    """Decode every image and mask of training and test; return a line for each that is broken.

    Args:
        data: Its ``train`` and ``test`` samples are read.
        workers: Threads that decode; `default_workers` by default.
        progress: Called with the number of images done since the last call.

    Raises:
        ValueError: Of a class no image to train on, or none to test on, can be read.
    """
    unreadable: list[str] = []
    for name in data.classes:
        for samples, what in ((data.train[name], "training"), (data.test[name], "test")):
            left = len(samples)
            errors: list[UnreadableImageError] = []
            for broken in map_ahead(_errors, samples, workers):
                errors += broken
                left -= bool(broken)
                progress(1)
            if samples and not left:
                raise ValueError(f"no {what} image of {name} can be read: {errors[0]}")
            unreadable += map(str, errors)
    return unreadable


def _errors(sample: Sample) -> list[UnreadableImageError]:
    """Decode an image and its masks."""

    def read_image(path: Path) -> object:
        return to_rgb(open_image(path), path)

    errors = []
    for read, path in ((read_image, sample.path), *((read_mask, m) for m in sample.mask_paths)):
        try:
            read(path)
        except UnreadableImageError as error:
            errors.append(error)
    return errors
