"""The data set on disk: MVTec-AD's folders of PNG files, and a manifest written last."""

from __future__ import annotations

import json
import operator
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rlr_fast.data.synthetic.render import PRODUCTS, render_sample
from rlr_fast.data.threads import map_ahead
from rlr_fast.files import lock_folder, put_in_place, replacing, write_atomically

CLASS_NAMES: tuple[str, ...] = tuple(sorted(PRODUCTS))

# Raised whenever the same parameters would give other bytes.
_VERSION = 2
_MANIFEST = "dataset.json"
# The manifest's name while pictures are still missing.
_UNFINISHED = "dataset.unfinished.json"
_LEAST_SIDE = 32


@dataclass(frozen=True)
class _Picture:
    class_name: str
    split: str
    kind: str
    index: int

    def path(self) -> str:
        return f"{self.class_name}/{self.split}/{self.kind}/{self.index:03d}.png"

    def mask_path(self) -> str:
        return f"{self.class_name}/ground_truth/{self.kind}/{self.index:03d}_mask.png"

    def paths(self) -> tuple[str, ...]:
        return (self.path(),) if self.kind == "good" else (self.path(), self.mask_path())


def make_dataset(
    root: str | os.PathLike[str],
    *,
    size: int | tuple[int, int] = 256,
    seed: int = 0,
    train_per_class: int = 48,
    good_per_class: int = 10,
    defects_per_kind: int = 2,
    classes: Sequence[str] | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a synthetic inspection data set in MVTec-AD's layout.

    For each class: ``train/good``, ``test/good``, ``test/<defect>`` and
    ``ground_truth/<defect>/<stem>_mask.png`` (0 and 255, the pixels that the defect altered).
    A picture depends on ``seed``, its class, split, kind, index and ``size`` alone: more pictures,
    other classes or another number of workers leave its bytes as they are. (Bytes are promised for
    one machine and one set of NumPy, SciPy and Pillow versions; elsewhere a rounding may differ.)

    ``dataset.json`` is written last and says that the set is complete. A complete set with the same
    parameters is left alone; one that was interrupted is made again in place.

    Args:
        root: folder to write; made if missing.
        size: picture side in pixels, or (height, width); at least 32.
        seed: of every random choice; zero or positive.
        train_per_class: good pictures to train on.
        good_per_class: good test pictures.
        defects_per_kind: test pictures of each of a class's 6 to 8 defect kinds.
        classes: names out of `CLASS_NAMES`; None means all.
        workers: threads that render; None means one per CPU.
        progress: called as ``progress(done, total)`` after each picture, from the calling thread.

    Returns:
        ``root`` as a path.

    Raises:
        ValueError: an argument breaks its rule, or ``root`` holds anything else than this set.
        NotADirectoryError: ``root`` is a file.
        BlockingIOError: another process makes a set in ``root``.
    """
    shape = _shape(size)
    seed = _count("seed", seed)
    counts = {
        "train_per_class": _count("train_per_class", train_per_class),
        "good_per_class": _count("good_per_class", good_per_class),
        "defects_per_kind": _count("defects_per_kind", defects_per_kind),
    }
    names = _names(classes)
    if workers is not None and operator.index(workers) < 1:
        raise ValueError(f"workers must be positive or None, got {workers=}")
    manifest = {
        "generator": "rlr_fast synthetic inspection set",
        "version": _VERSION,
        "size": list(shape),
        "seed": seed,
        **counts,
        "classes": {name: list(PRODUCTS[name].kinds) for name in names},
    }
    pictures = list(_pictures(names, **counts))
    folder = Path(root)
    if _is_complete(folder, manifest, pictures):
        return folder
    with lock_folder(folder):
        if not _is_complete(folder, manifest, pictures):  # another process may have been first
            _write(folder, manifest, pictures, workers, progress)
    return folder


def _write(
    folder: Path,
    manifest: dict[str, Any],
    pictures: list[_Picture],
    workers: int | None,
    progress: Callable[[int, int], object] | None,
) -> None:
    """Write all pictures and what they were made by."""
    height, width = manifest["size"]
    # While pictures are missing only the unfinished name exists; the rename at the end is atomic.
    (folder / _MANIFEST).unlink(missing_ok=True)
    write_atomically(folder / _UNFINISHED, json.dumps(manifest, indent=1) + "\n")
    for part in sorted({Path(path).parent for picture in pictures for path in picture.paths()}):
        (folder / part).mkdir(parents=True, exist_ok=True)

    def write(picture: _Picture) -> None:
        sample = render_sample(
            picture.class_name,
            picture.split,
            picture.kind,
            picture.index,
            size=(height, width),
            seed=manifest["seed"],
        )
        _save(sample.image, folder / picture.path())
        if picture.kind != "good":
            _save(sample.mask.astype(np.uint8) * 255, folder / picture.mask_path())

    # Threads, not processes: the work is in NumPy and SciPy calls that release the interpreter's
    # lock, and a script that calls this needs no ``__main__`` guard.
    threads = workers or os.cpu_count() or 1
    for done, _ in enumerate(map_ahead(write, pictures, threads), start=1):
        if progress is not None:
            progress(done, len(pictures))
    put_in_place(folder / _UNFINISHED, folder / _MANIFEST)


def _pictures(
    names: Sequence[str], train_per_class: int, good_per_class: int, defects_per_kind: int
) -> Iterator[_Picture]:
    for name in names:
        for index in range(train_per_class):
            yield _Picture(name, "train", "good", index)
        for index in range(good_per_class):
            yield _Picture(name, "test", "good", index)
        for kind in PRODUCTS[name].kinds:
            for index in range(defects_per_kind):
                yield _Picture(name, "test", kind, index)


def _save(pixels: np.ndarray, path: Path) -> None:
    with replacing(path) as partial:
        Image.fromarray(pixels).save(partial, format="PNG", compress_level=4)


def _is_complete(folder: Path, manifest: dict[str, Any], pictures: Sequence[_Picture]) -> bool:
    """Say whether ``folder`` already holds the set; refuse a folder that holds something else."""
    if not folder.exists():
        return False
    if not folder.is_dir():
        raise NotADirectoryError(f"root must be a folder, got root={str(folder)!r}")
    if all(path.name.startswith(".") for path in folder.iterdir()):
        return False
    for name in (_MANIFEST, _UNFINISHED):
        try:
            content = json.loads((folder / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except ValueError:
            # Cut off while it was written: nothing can be said of what lies beside it.
            raise ValueError(
                f"root must not hold a damaged {name}: delete it or choose another folder, "
                f"got root={str(folder)!r}"
            ) from None
        if content != manifest:
            other = sorted(
                key
                for key in manifest
                if not isinstance(content, dict) or content.get(key) != manifest[key]
            )
            raise ValueError(
                f"root must be empty or hold this very set, but its {name} differs in "
                f"{', '.join(other)}: delete it or choose another, got root={str(folder)!r}"
            )
        return name == _MANIFEST and all(
            (folder / path).is_file() for picture in pictures for path in picture.paths()
        )
    raise ValueError(
        f"root must be empty or hold this very set, but it holds other files and no {_MANIFEST}, "
        f"got root={str(folder)!r}"
    )


def _shape(size: int | tuple[int, int]) -> tuple[int, int]:
    sides = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    rule = f"size must be an integer or (height, width), each at least {_LEAST_SIDE}, got {size=}"
    try:
        height, width = (operator.index(side) for side in sides)
    except (TypeError, ValueError):
        raise ValueError(rule) from None
    if min(height, width) < _LEAST_SIDE:
        raise ValueError(rule)
    return height, width


def _count(name: str, value: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = -1
    if number < 0:
        raise ValueError(f"{name} must be an integer, zero or positive, got {name}={value!r}")
    return number


def _names(classes: Sequence[str] | None) -> tuple[str, ...]:
    if classes is None:
        return CLASS_NAMES
    names = (classes,) if isinstance(classes, str) else tuple(classes)
    unknown = [name for name in names if name not in PRODUCTS]
    if unknown or not names or len(set(names)) != len(names):
        raise ValueError(
            f"classes must name each class once, out of {', '.join(CLASS_NAMES)}, got {classes=}"
        )
    return tuple(sorted(names))
