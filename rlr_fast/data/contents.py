"""A data set's files read through: digests of what they hold, and those that cannot be read."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from rlr_fast.data.images import (
    UnreadableImageError,
    open_image,
    read_mask,
    to_rgb,
)
from rlr_fast.data.layouts import DataSet, Sample
from rlr_fast.models.environment import default_workers

FILES = {"train": "training images", "test": "test images", "masks": "test masks"}
"""The kinds of files, in words."""


@dataclass(frozen=True)
class Contents:
    """What `read_contents` finds.

    Attributes:
        digests: Of each class and kind of `FILES`, over names, labels and bytes, wherever the data
            set lies.
        unreadable: A line for each image or mask that cannot be read.
    """

    digests: dict[str, dict[str, str]]
    unreadable: list[str]


class _File(NamedTuple):
    digest: bytes
    error: UnreadableImageError | None


def read_contents(
    data: DataSet,
    workers: int | None = None,
    progress: Callable[[int], object] = lambda images: None,
) -> Contents:
    """Read and decode every image and mask with which a model is trained and tested.

    Args:
        data: Its ``train`` and ``test`` samples are read.
        workers: Threads that decode; `default_workers` by default.
        progress: Called with the number of images done since the last call.

    Raises:
        ValueError: Of a class no image to train on, or none to test on, can be read.
    """
    digests: dict[str, dict[str, str]] = {}
    unreadable: list[str] = []
    with ThreadPoolExecutor(workers or default_workers()) as pool:
        for name in data.classes:
            hashes = {kind: hashlib.sha256() for kind in FILES}
            for split, what in (("train", "training"), ("test", "test")):
                samples = data.train[name] if split == "train" else data.test[name]
                errors: list[UnreadableImageError] = []
                left = len(samples)
                for sample, files in zip(samples, pool.map(_read, samples), strict=True):
                    masks = [_name(mask, data.root) for mask in sample.mask_paths]
                    label = "\0".join([_name(sample.path, data.root), sample.defect, *masks])
                    hashes[split].update(os.fsencode(label) + files[0].digest)
                    for mask, file in zip(masks, files[1:], strict=True):
                        hashes["masks"].update(os.fsencode(mask) + file.digest)
                    wrong = [file.error for file in files if file.error is not None]
                    errors += wrong
                    left -= bool(wrong)
                    progress(1)
                if samples and not left:
                    raise ValueError(f"no {what} image of {name} can be read: {errors[0]}")
                unreadable += map(str, errors)
            digests[name] = {kind: found.hexdigest() for kind, found in hashes.items()}
    return Contents(digests, unreadable)


def changed_contents(old: dict[str, dict[str, str]], new: dict[str, dict[str, str]]) -> list[str]:
    """Say in words which files are others, by the digests of `Contents`."""
    return [
        f"the {what} of {name} are others"
        for name in sorted(old.keys() | new.keys())
        for kind, what in FILES.items()
        if old.get(name, {}).get(kind) != new.get(name, {}).get(kind)
    ]


def _name(path: Path, root: Path) -> str:
    return os.path.relpath(path, root)


def _read(sample: Sample) -> list[_File]:
    """The image, then its masks."""

    def decode(path: Path) -> object:
        return to_rgb(open_image(path), path)

    return [_file(sample.path, decode), *(_file(path, read_mask) for path in sample.mask_paths)]


def _file(path: Path, decode: Callable[[Path], object]) -> _File:
    try:
        digest = hashlib.sha256(path.read_bytes()).digest()
    except OSError:
        digest = b"unreadable"
    try:
        decode(path)
    except UnreadableImageError as error:
        return _File(digest, error)
    return _File(digest, None)
