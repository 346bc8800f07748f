"""Data sets as their publishers lay them out: which image is for what, which mask belongs to it.

==================  ==============================================================================
layout              where the images are
==================  ==============================================================================
``mvtec``           MVTec-AD, MPDD: ``CLASS/train/good``, ``CLASS/test/{good,DEFECT}``,
                    ``CLASS/ground_truth/DEFECT/STEM_mask.png``
``visa``            VisA as downloaded: ``split_csv/1cls.csv`` names images and masks
``visa-converted``  ``1cls/CLASS/{train/good,test/{good,bad},ground_truth/bad/STEM.png}``,
                    or the folder ``1cls`` itself
``loco``            MVTec LOCO: as ``mvtec``, with ``validation/good`` and a folder of masks for
                    each image, ``ground_truth/DEFECT/STEM/*.png``
``btad``            ``CLASS/{train/ok,test/{ok,ko},ground_truth/ko/STEM.{png,bmp}}``
``folder``          images right in a folder: one class, with images to train on alone;
                    or several such folders side by side
==================  ==============================================================================

Where classes have ``train`` and ``test`` folders, a root that is itself such a class is read as one
class. Masks in ``ground_truth`` are found by one rule: ``STEM_mask.*``, else ``STEM.*``, else every
image in the folder ``STEM/``. Only names are read here, never pixels.
"""

from __future__ import annotations

import contextlib
import csv
import difflib
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

NORMAL = "good"
"""`Sample.defect` of an image without a defect, whatever its layout calls the folder."""

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"})
"""Lower-case suffixes that make a file an image; the case on disk does not matter."""

VISA_SPLIT = Path("split_csv", "1cls.csv")
"""Where VisA as downloaded says which image is used for what."""

_LOOKED_FOR = {
    "mvtec": "CLASS/train/good or CLASS/test/good (or train/good right here)",
    "visa": f"{VISA_SPLIT.as_posix()}",
    "visa-converted": "1cls/CLASS/train/good, or a folder named 1cls with CLASS/train/good",
    "loco": "as mvtec, with CLASS/test/logical_anomalies or structural_anomalies",
    "btad": "CLASS/train/ok or CLASS/test/ok (or train/ok right here)",
    "folder": "images right here, or in folders right here (none of them named like train or good)",
}
LAYOUTS: tuple[str, ...] = tuple(_LOOKED_FOR)
"""The layouts `read_dataset` knows."""

# Folders with these names divide one class; read as classes they would mix defects into training.
# The folders in one of `_SPLITS` are no classes either, whatever they are called.
_SPLITS = frozenset(
    {
        *("train", "test", "val", "valid", "validation"),
        *("ground_truth", "gt", "mask", "masks"),
    }
)
_NOT_CLASSES = _SPLITS | frozenset(
    {
        *("good", "ok", "normal"),
        *("bad", "ko", "ng", "defect", "defects", "defective"),
        *("anomaly", "anomalies", "abnormal"),
    }
)
# Folders of masks, with the folder of images beside them.
_IMAGES_BESIDE = {"ground_truth": "test", "Masks": "Images"}
_LOCO_DEFECTS = frozenset({"logical_anomalies", "structural_anomalies"})


Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Sample:
    """One image of a data set.

    Attributes:
        path: The image file.
        category: Its class.
        defect: The kind of defect, ``"good"`` for a normal image.
        mask_paths: Ground-truth masks; their union marks the defect. Empty for normal images and
            where no mask was found.
        box: The part of the image that is meant, in its pixels: top, left, height and width; None
            is all of it.
    """

    path: Path
    category: str
    defect: str
    mask_paths: tuple[Path, ...] = ()
    box: Box | None = None

    @property
    def is_anomaly(self) -> bool:
        """Whether the image shows a defect."""
        return self.defect != NORMAL


@dataclass(frozen=True)
class DataSet:
    """The samples of a data set by class: classes sorted by name, samples by path.

    Attributes:
        root: The folder that was read.
        layout: One of `LAYOUTS`.
        train: Normal images to train on.
        test: Normal and defective images to test on.
        validation: Normal images held back from training, where a layout has ``validation/good``.
        folders: Where the files of each class lie.
    """

    root: Path
    layout: str
    train: dict[str, list[Sample]]
    test: dict[str, list[Sample]]
    validation: dict[str, list[Sample]] = field(default_factory=dict)
    folders: dict[str, Path] = field(default_factory=dict)

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names, sorted."""
        return tuple(self.train)

    @property
    def has_masks(self) -> bool:
        """Whether any test image has a ground-truth mask, that is: whether pixels can be scored."""
        return any(sample.mask_paths for samples in self.test.values() for sample in samples)

    def require_train(self) -> None:
        """Refuse a data set that cannot be trained on.

        Raises:
            ValueError: If a class has no image to train on.
        """
        self._require(self.train, "train", "train on")

    def require_test(self) -> None:
        """Refuse a data set that cannot be evaluated.

        Raises:
            ValueError: If a class has no image to test on.
        """
        self._require(self.test, "test", "test on")

    def _require(self, samples: dict[str, list[Sample]], split: str, purpose: str) -> None:
        missing = [name for name in self.classes if not samples.get(name)]
        if not missing:
            return
        if self.layout == "visa":
            place = f"rows with split={split} in {self.root / VISA_SPLIT}"
        elif self.layout == "folder" and split == "test":
            place = "a layout with a test folder, such as CLASS/test/good and CLASS/test/DEFECT"
        elif self.layout == "folder":
            place = "images right in the folder of the class"
        else:
            normal = normal_folder(self.layout)
            subfolder = f"train/{normal}" if split == "train" else f"test/{normal} and test/DEFECT"
            place = f"images in CLASS/{subfolder}"
        raise ValueError(
            f"every class must have images to {purpose}, but {str(self.root)!r} (layout "
            f"{self.layout}) has none for: {', '.join(missing)}. Expected: {place}. Add them, or "
            "name only the other classes in `classes`"
        )


def pick_samples(samples: Sequence[Sample], per_defect: int) -> list[int]:
    """Return the places of the first ``per_defect`` samples of each defect, and of ``good``."""
    shown: dict[str, int] = {}
    places = []
    for place, sample in enumerate(samples):
        if shown.get(sample.defect, 0) < per_defect:
            shown[sample.defect] = shown.get(sample.defect, 0) + 1
            places.append(place)
    return places


def list_images(folder: str | os.PathLike[str]) -> list[Path]:
    """Image files right in `folder`, sorted by name; hidden files and other suffixes are left out.

    Links are followed, and one that leads nowhere is listed, so that its reader can say so.
    """
    return [Path(path) for path in _image_names(folder).values()]


def find_class(path: Path, classes: Collection[str]) -> str | None:
    """Return the class in whose folder a file lies, by the names in ``path`` as it is given.

    A folder in ``test``, ``train`` or the like is a kind of defect, whatever its name.

    Raises:
        ValueError: Its folders name two classes.
    """
    folders = path.parts[:-1]
    named = {
        name
        for place, name in enumerate(folders)
        if name in classes and not (place and folders[place - 1].lower() in _SPLITS)
    }
    if len(named) > 1:
        raise ValueError(
            f"{str(path)!r} lies in folders of two classes, {' and '.join(sorted(named))}; name "
            "one, or give a path that has one of them"
        )
    return next(iter(named), None)


def holds_masks(folder: Path) -> bool:
    """Return whether a folder holds a data set's masks: it lies beside that of their images."""
    images = _IMAGES_BESIDE.get(folder.name)
    return images is not None and (folder.parent / images).is_dir()


def read_dataset(
    root: str | os.PathLike[str], layout: str = "auto", classes: Iterable[str] | None = None
) -> DataSet:
    """List the images and masks of the data set in `root`, without reading any.

    A class that lacks images to train or test on is listed with none: `DataSet.require_train` and
    `DataSet.require_test` tell.

    Args:
        root: Folder with the class folders, or one class folder.
        layout: One of `LAYOUTS`, or ``"auto"`` to look at the folders.
        classes: Only these classes; all by default.

    Raises:
        ValueError: If `root` is not a folder or does not follow the layout, if the layout or a
            class is unknown, or if the table of VisA is not as published.
    """
    root = _existing_folder(root)
    if layout != "auto" and layout not in LAYOUTS:
        raise ValueError(f"layout must be 'auto' or one of {', '.join(LAYOUTS)}, got {layout=}")
    if layout == "auto":
        guessed = _guess(root)
        if guessed is None:
            raise ValueError(_nothing_fits(root, LAYOUTS))
        layout = guessed
    if layout == "visa":
        return _read_visa(root, classes)

    folders = _class_folders(root, layout)
    if not folders:
        raise ValueError(_nothing_fits(root, (layout,)))
    folders = {name: folders[name] for name in _selected(classes, folders)}
    train: dict[str, list[Sample]] = {}
    test: dict[str, list[Sample]] = {}
    validation: dict[str, list[Sample]] = {}
    for name, folder in folders.items():
        if layout == "folder":
            train[name] = _normal_samples(folder, name)
            test[name], validation[name] = [], []
        else:
            normal = normal_folder(layout)
            train[name] = _normal_samples(folder / "train" / normal, name)
            validation[name] = _normal_samples(folder / "validation" / normal, name)
            test[name] = _test_samples(folder, name, normal)
    return DataSet(root, layout, train, test, validation, folders)


def _existing_folder(root: str | os.PathLike[str]) -> Path:
    path = Path(root)
    if not path.is_dir():
        why = "a file" if path.exists() else "nothing there"
        raise ValueError(f"the data's root must be an existing folder, got {str(path)!r} ({why})")
    return path


def normal_folder(layout: str) -> str:
    """Name of the folders with normal images in a layout that has them."""
    return "ok" if layout == "btad" else NORMAL


def _guess(root: Path) -> str | None:
    if os.path.isfile(root / VISA_SPLIT):
        return "visa"
    name = _folder_name(root)
    if (name == "1cls" or os.path.isdir(root / "1cls")) and _class_folders(root, "visa-converted"):
        return "visa-converted"
    folders = _class_folders(root, "mvtec")
    if any(_LOCO_DEFECTS & subfolders(folder / "test").keys() for folder in folders.values()):
        return "loco"
    if folders:
        return "mvtec"
    if _class_folders(root, "btad"):
        return "btad"
    if _image_names(root) and any(_image_names(folder) for folder in subfolders(root).values()):
        return None  # One class or several? The caller has to say.
    return "folder" if _class_folders(root, "folder") else None


def _class_folders(root: Path, layout: str) -> dict[str, Path]:
    """Class name → folder, sorted; empty where `root` is not of `layout` (any but ``visa``)."""
    if layout == "folder":
        return _plain_class_folders(root)
    normal = normal_folder(layout)
    if layout == "visa-converted" and os.path.isdir(root / "1cls"):
        root = root / "1cls"
    if _has_normal_images(root, normal):
        return {_folder_name(root): root}
    folders = {
        name: folder
        for name, folder in subfolders(root).items()
        if os.path.isdir(folder / "train") or os.path.isdir(folder / "test")
    }
    # One class that is as it should be makes the others incomplete rather than of another layout.
    if not any(_has_normal_images(folder, normal) for folder in folders.values()):
        return {}
    return folders


def _plain_class_folders(root: Path) -> dict[str, Path]:
    if _image_names(root):
        return {_folder_name(root): root}
    folders = subfolders(root)
    if _folder_name(root).lower() in _SPLITS or _NOT_CLASSES & {name.lower() for name in folders}:
        return {}
    if any(subfolders(folder) for folder in folders.values()):
        return {}
    return folders if any(_image_names(folder) for folder in folders.values()) else {}


def _has_normal_images(folder: Path, normal: str) -> bool:
    return os.path.isdir(folder / "train" / normal) or os.path.isdir(folder / "test" / normal)


def _selected(classes: Iterable[str] | None, known: Iterable[str]) -> list[str]:
    """The classes asked for, sorted."""
    known = sorted(known)
    if classes is None:
        return known
    if isinstance(classes, str):
        raise ValueError(f"classes must be a list of names, got a single string: {classes!r}")
    wanted = sorted(set(classes))
    if not wanted:
        raise ValueError("classes must name at least one class, or be None for all of them")
    unknown = [name for name in wanted if name not in known]
    if unknown:
        close = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"classes must be among {', '.join(known)}; got unknown {', '.join(unknown)}.{hint}"
        )
    return wanted


def _normal_samples(folder: Path, category: str) -> list[Sample]:
    return [Sample(path, category, NORMAL) for path in list_images(folder)]


def _test_samples(folder: Path, category: str, normal: str) -> list[Sample]:
    samples: list[Sample] = []
    for defect, images in subfolders(folder / "test").items():
        if defect == normal:
            samples.extend(_normal_samples(images, category))
            continue
        truth = folder / "ground_truth" / defect
        masks = {os.path.splitext(name)[0]: path for name, path in _image_names(truth).items()}
        mask_folders = subfolders(truth)
        for name, path in _image_names(images).items():
            stem = os.path.splitext(name)[0]
            mask = masks.get(f"{stem}_mask") or masks.get(stem)
            paths: tuple[Path, ...] = ()
            if mask is not None:
                paths = (Path(mask),)
            elif stem in mask_folders:
                paths = tuple(list_images(mask_folders[stem]))
            samples.append(Sample(Path(path), category, defect, paths))
    return samples


def _read_visa(root: Path, classes: Iterable[str] | None) -> DataSet:
    table = root / VISA_SPLIT
    if not os.path.isfile(table):
        raise ValueError(_nothing_fits(root, ("visa",)))
    rows = list(_visa_rows(table))
    if not rows:
        raise ValueError(f"{str(table)!r} lists no image")
    images = Counter((split, image) for _, split, _, image, _ in rows)
    (split, image), count = images.most_common(1)[0]
    if count > 1:
        raise ValueError(f"{str(table)!r} lists {image} {count} times in {split}")
    names = _selected(classes, {category for category, *_ in rows})
    splits: dict[str, dict[str, list[Sample]]] = {
        split: {name: [] for name in names} for split in ("train", "test", "validation")
    }
    for category, split, label, image, mask in rows:
        if category not in splits[split]:
            continue
        is_normal = label == "normal"
        mask_paths = () if is_normal or not mask else (root / mask,)
        defect = NORMAL if is_normal else label
        splits[split][category].append(Sample(root / image, category, defect, mask_paths))
    for samples_of in splits.values():
        for samples in samples_of.values():
            samples.sort(key=lambda sample: sample.path)
    folders = {name: root / name for name in names}
    return DataSet(root, "visa", **splits, folders=folders)


def _visa_rows(table: Path) -> Iterator[tuple[str, str, str, str, str]]:
    """Rows (object, split, label, image, mask) of VisA's table, checked."""
    with table.open(newline="", encoding="utf-8-sig") as file:
        try:
            yield from _checked_rows(table, csv.DictReader(file))
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{str(table)!r} cannot be read: {error}") from error


def _checked_rows(
    table: Path, reader: csv.DictReader[str]
) -> Iterator[tuple[str, str, str, str, str]]:
    columns = ("object", "split", "label", "image", "mask")
    if missing := [name for name in columns if name not in (reader.fieldnames or ())]:
        raise ValueError(
            f"{str(table)!r} must have the columns {','.join(columns)}; "
            f"got {reader.fieldnames}, without {','.join(missing)}"
        )
    for row in reader:
        category, split, label, image, mask = ((row[name] or "").strip() for name in columns)
        for name, value, allowed in (
            ("split", split, ("train", "test")),
            ("label", label, ("normal", "anomaly")),
        ):
            if value not in allowed:
                raise ValueError(
                    f"{str(table)!r}, line {reader.line_num}: {name} must be "
                    f"{' or '.join(allowed)}, got {value!r}"
                )
        if not category or not image:
            raise ValueError(
                f"{str(table)!r}, line {reader.line_num}: object and image must not be empty"
            )
        # The class names files of results, which must not lie elsewhere.
        if category in (".", "..") or set(category) & set("/\\\0"):
            raise ValueError(
                f"{str(table)!r}, line {reader.line_num}: object must be a name without a path, "
                f"got {category!r}"
            )
        for name, value in (("image", image), ("mask", mask)):
            if "\0" in value or PurePosixPath(value).is_absolute() or ".." in Path(value).parts:
                raise ValueError(
                    f"{str(table)!r}, line {reader.line_num}: {name} must lie in the data set, "
                    f"got {value!r}"
                )
        if split == "train" and label != "normal":
            raise ValueError(
                f"{str(table)!r}, line {reader.line_num}: only normal images are to train on, "
                f"got {label=} with {split=}"
            )
        yield category, split, label, image, mask


def _nothing_fits(root: Path, layouts: tuple[str, ...]) -> str:
    lines = [f"the data's root must have a known layout, got {str(root)!r}", "looked for:"]
    lines += [f"  {name:<15} {_LOOKED_FOR[name]}" for name in layouts]
    folders = [f"{name}/" for name in subfolders(root)]
    with os.scandir(root) as entries:
        files = sorted(entry.name for entry in entries if not entry.is_dir())
    names = [*folders, *files]
    shown = ", ".join(names[:12]) if names else "an empty folder"
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    lines.append(f"found: {shown}{more}")
    if (fitting := _guess(root)) is not None:
        lines.append(f"it looks like layout {fitting!r}")
    elif "folder" in layouts and _class_folders(root, "folder"):
        lines.append(
            "there are images here and in its folders; layout='folder' reads those here alone"
        )
    elif (nearby := _nearby(root)) is not None:
        lines.append(f"did you mean {str(nearby)!r}? It looks like layout {_guess(nearby)!r}")
    elif "folder" in layouts and any(_image_names(f) for f in subfolders(root).values()):
        deep = [f"{name}/" for name, folder in subfolders(root).items() if subfolders(folder)]
        if deep:
            lines.append(f"folders of images must have no folders in them, as has {deep[0]}")
    return "\n".join(lines)


def _nearby(root: Path) -> Path | None:
    """A folder next above or below `root` that follows a layout with splits."""
    parent = Path(os.path.abspath(root)).parent
    if any(_has_normal_images(parent, normal) for normal in (NORMAL, "ok")):
        return parent
    for folder in subfolders(root).values():
        # A hint is no reason to fail over a folder that nobody asked to read.
        with contextlib.suppress(PermissionError):
            if _guess(folder) not in (None, "folder"):
                return folder
    return None


def _folder_name(folder: Path) -> str:
    # Not resolve(): a linked folder keeps the name it has here.
    return os.path.basename(os.path.abspath(folder))


def subfolders(folder: Path) -> dict[str, Path]:
    """Name → path of the folders in `folder`, sorted, without hidden ones; empty for no folder."""
    return {name: Path(path) for name, path in _scan(folder, folders=True)}


def _image_names(folder: str | os.PathLike[str]) -> dict[str, str]:
    """Name → path of the images in `folder`, sorted, without hidden ones; empty for no folder."""
    return {
        name: path
        for name, path in _scan(folder, folders=False)
        if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES
    }


def _scan(folder: str | os.PathLike[str], folders: bool) -> list[tuple[str, str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(
                (entry.name, entry.path)
                for entry in entries
                if not entry.name.startswith(".") and _is_folder(entry) == folders
            )
    except (FileNotFoundError, NotADirectoryError):
        return []


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle, or into a folder that is closed: its reader says so
        return False
