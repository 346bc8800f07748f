"""Feature cache: a frozen backbone's tokens of a list of images, computed once and kept."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
from torch import Tensor

from rlr_fast.data.images import (
    ImageFailure,
    UnreadableImageError,
    digest_images,
    iterate_images,
    load_image,
)
from rlr_fast.data.layouts import Sample
from rlr_fast.data.records import read_record
from rlr_fast.data.threads import BackgroundWriter
from rlr_fast.files import file_digest, put_in_place, write_atomically
from rlr_fast.memory import available_memory
from rlr_fast.models.rlr import RLRModel

Placement = Literal["auto", "gpu", "ram", "disk"]

_FORMAT = 2
_META = "meta.json"
_BATCH = 8
# A placement may take this share of what is free; the rest is for the model and everybody else.
_SHARE = 0.5
_STALE_SECONDS = 3600.0
_NAME_LENGTH = 20  # of a cache's folder, in hexadecimal digits of its key


class CacheError(RuntimeError):
    """The feature cache cannot be written or read; the message says where and why."""


@dataclass(frozen=True)
class FeatureCache:
    """Pooled feature tokens of a list of images, in bfloat16.

    Attributes:
        levels: [(n, N_j, C_j)] tokens of all images, as `RLRModel.tokens` gives them.
        failures: Images of the list that could not be read; they have no row in ``levels``.
        placement: Where the tokens lie: ``gpu``, ``ram`` or ``disk`` (a memory-mapped file).
        folder: Where the cache lies on disk.
    """

    levels: list[Tensor]
    failures: list[ImageFailure]
    placement: str
    folder: Path

    def __len__(self) -> int:
        return self.levels[0].shape[0]

    def batch(self, rows: Tensor, device: torch.device) -> list[Tensor]:
        """Return the tokens [(B, N_j, C_j)] of the rows (B,), float32 on ``device``."""
        # Gathered where they lie, so that only a batch of them travels.
        rows = rows.to(self.levels[0].device)
        return [
            level.index_select(0, rows).to(device, non_blocking=True).float()
            for level in self.levels
        ]

    def batches(self, rows: Sequence[Tensor], device: torch.device) -> Iterator[list[Tensor]]:
        """Yield `batch` of each group of rows."""
        return (self.batch(group, device) for group in rows)


def default_cache_root() -> Path:
    """Return where caches lie by default: ``rlr_fast`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "rlr_fast" / "features"


def cached_features(
    model: RLRModel,
    samples: Sequence[Sample],
    root: Path | None = None,
    placement: Placement = "auto",
    *,
    digests: Sequence[str | None] | None = None,
    workers: int | None = None,
    progress: Callable[[int], object] | None = None,
    sharers: int = 1,
) -> FeatureCache:
    """Return the features of ``samples``, computed now or taken from an earlier run.

    A cache is known by everything that decides its numbers: backbone and fingerprint of its
    weights, levels, image size, neighborhood, and the content of each file, and which part of it is
    meant. So it serves a copy of the images, wherever they lie. It appears under its name only when
    complete, so half a cache is never read. Of several processes each asks for the images of its
    own share, and keeps a cache of them.

    Args:
        model: Its backbone and neighborhood give the features, on the device where it lies.
        samples: The images.
        root: Folder of all caches; default `default_cache_root`.
        placement: ``gpu``, ``ram``, ``disk``, or ``auto``: the first of them with room.
        digests: Of each sample's file, as from `digest_images`; by default they are read for it.
        workers: Threads that read files and decode images.
        progress: Called with the number of images done since the last call.
        sharers: Processes that divide this machine's memory among them.

    Raises:
        ValueError: The placement does not fit the model's device.
        CacheError: The disk is full, the folder cannot be written, or the GPU's memory is too
            small.
    """
    device = model.device
    if placement == "gpu" and device.type != "cuda":
        raise ValueError(f"cache placement 'gpu' needs the model on a GPU, it is on {device}")
    root = default_cache_root() if root is None else root
    if digests is None:
        digests = digest_images([sample.path for sample in samples], workers)
    identity = _identity(model, samples, digests)
    folder = root / identity["key"][:_NAME_LENGTH]
    meta = _read_meta(folder, identity, _shapes(model))
    if meta is not None and any(_readable(samples[f.index]) for f in meta.failures):
        shutil.rmtree(folder, ignore_errors=True)  # what was wrong with a file is put right
        meta = None
    if meta is None:
        try:
            root.mkdir(parents=True, exist_ok=True)
            _remove_stale(root)
            meta = _build(model, samples, folder, identity, workers, progress)
        except OSError as error:
            raise CacheError(f"cannot write the feature cache in {str(root)!r}: {error}") from error
        except torch.OutOfMemoryError as error:
            height, width = model.config.image_size
            raise CacheError(
                f"out of GPU memory while the backbone sees {_BATCH} images of {height} x {width} "
                f"pixels ({str(error).splitlines()[0]}); a smaller --image-size or --backbone "
                "needs less"
            ) from error
    failures = [
        ImageFailure(f.index, UnreadableImageError(samples[f.index].path, f.reason))
        for f in meta.failures
    ]
    count = len(samples) - len(failures)
    levels = [
        _map(folder / f"level_{j}.bf16", (count, tokens, channels))
        for j, (tokens, channels) in enumerate(meta.levels)
    ]
    where = _choose(placement, sum(level.nbytes for level in levels), device, sharers)
    if where == "gpu":
        levels = [level.to(device) for level in levels]
    elif where == "ram":
        levels = [level.clone() for level in levels]
    return FeatureCache(levels, failures, where, folder)


def _map(file: Path, shape: tuple[int, int, int]) -> Tensor:
    if shape[0] == 0:  # no file of no bytes can be mapped
        return torch.empty(shape, dtype=torch.bfloat16)
    try:
        whole = torch.from_file(str(file), size=math.prod(shape), dtype=torch.bfloat16)
    except RuntimeError as error:  # deleted or cut meanwhile
        raise CacheError(f"{str(file)!r} cannot be read: {error}") from error
    return whole.view(shape)


def _shapes(model: RLRModel) -> list[list[int]]:
    """Return the tokens and channels of each level."""
    grids = zip(model.backbone.grids, model.backbone.channels, strict=True)
    return [[height * width, channels] for (height, width), channels in grids]


def _readable(sample: Sample) -> bool:
    try:
        load_image(sample.path, (1, 1))
    except UnreadableImageError:
        return False
    return True


def _identity(
    model: RLRModel, samples: Sequence[Sample], digests: Sequence[str | None]
) -> dict[str, Any]:
    digest = hashlib.sha256()
    for sample, content in zip(samples, digests, strict=True):
        part = "" if sample.box is None else f" {sample.box}"
        digest.update(f"{content}{part}\n".encode())
    identity: dict[str, Any] = {
        "format": _FORMAT,
        **model.feature_identity(),
        "files": len(samples),
        "files_digest": digest.hexdigest(),
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return identity | {"key": key}


@dataclass(frozen=True)
class _Failure:
    index: int
    reason: str


@dataclass(frozen=True)
class _Meta:
    """What a complete cache says of itself; of each level tokens and channels, and its digest."""

    identity: dict[str, Any]
    levels: list[list[int]]
    failures: list[_Failure]
    digests: list[str]


def _read_meta(folder: Path, identity: dict[str, Any], shapes: list[list[int]]) -> _Meta | None:
    """Return what a complete cache of this identity says of itself, or None.

    ``shapes`` are the tokens and channels that each level must have.
    """
    try:
        meta = read_record(_Meta, folder / _META)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise CacheError(
            f"{folder / _META} cannot be read ({error}); delete {str(folder)!r}"
        ) from error
    if meta.identity != identity:
        raise CacheError(f"{str(folder)!r} holds another cache than its name says; delete it")
    count = identity["files"] - len(meta.failures)
    is_sound = meta.levels == shapes and len(meta.digests) == len(shapes)
    if not is_sound or not all(0 <= f.index < identity["files"] for f in meta.failures):
        raise CacheError(f"{folder / _META} is damaged; delete {str(folder)!r}")
    for j, (tokens, channels) in enumerate(shapes):
        file = folder / f"level_{j}.bf16"
        size = file.stat().st_size if file.exists() else 0
        if size != count * tokens * channels * 2:
            raise CacheError(
                f"{str(file)!r} has {size} bytes, not as written; delete {str(folder)!r}"
            )
        if meta.digests[j] != file_digest(file):
            raise CacheError(f"{str(file)!r} is damaged; delete {str(folder)!r}")
    return meta


def _build(
    model: RLRModel,
    samples: Sequence[Sample],
    folder: Path,
    identity: dict[str, Any],
    workers: int | None,
    progress: Callable[[int], object] | None,
) -> _Meta:
    partial = folder.with_name(f".{folder.name}-{secrets.token_hex(8)}")
    partial.mkdir()  # with the permissions of any folder: a cache may serve several users
    device = model.device
    failures: list[_Failure] = []
    try:
        with contextlib.ExitStack() as stack:
            names = [f"level_{j}.bf16" for j in range(len(model.levels))]
            files = [stack.enter_context(open(partial / name, "wb")) for name in names]
            # One batch is written while the next is computed.
            writer = stack.enter_context(BackgroundWriter(threads=1, jobs=1))
            for batch in iterate_images(samples, model.config.image_size, _BATCH, workers):
                failures += [_Failure(f.index, f.error.reason) for f in batch.failures]
                if len(batch.images):
                    levels = model.tokens(batch.images.to(device))
                    stored = [tokens.to(torch.bfloat16).contiguous() for tokens in levels]
                    writer.submit(functools.partial(_append, files, stored))
                if progress is not None:
                    progress(len(batch.images) + len(batch.failures))
            writer.finish()
            for file in files:
                file.flush()
                os.fsync(file.fileno())
        digests = [file_digest(partial / name) for name in names]
        meta = _Meta(identity, _shapes(model), failures, digests)
        write_atomically(partial / _META, json.dumps(asdict(meta), indent=2))
        try:
            put_in_place(partial, folder)
        except OSError:
            if not folder.is_dir():  # else another process made the same cache meanwhile
                raise
            shutil.rmtree(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return meta


def _append(files: Sequence[BinaryIO], stored: Sequence[Tensor]) -> None:
    for file, tokens in zip(files, stored, strict=True):
        file.write(tokens.cpu().view(torch.uint8).numpy().data)


def _remove_stale(root: Path) -> None:
    """Remove what killed processes left of any cache: the images may be others by now."""
    for partial in root.glob(f".{'[0-9a-f]' * _NAME_LENGTH}-*"):
        with contextlib.suppress(OSError):  # another process was quicker, or it is another user's
            # A folder's own time stands still while its files grow.
            written = max(p.stat().st_mtime for p in (partial, *partial.iterdir()))
            if time.time() - written > _STALE_SECONDS:
                shutil.rmtree(partial, ignore_errors=True)


def _choose(placement: Placement, size: int, device: torch.device, sharers: int) -> str:
    if placement != "auto":
        return placement
    if device.type == "cuda" and size < _SHARE * torch.cuda.mem_get_info(device)[0]:
        return "gpu"
    return "ram" if size < _SHARE * available_memory() / sharers else "disk"
