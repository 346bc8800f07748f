"""Whether a data set is fit for a run: every file is decoded, and what is wrong is told at once.

Errors would stop a run or leave it without a result that was asked for; warnings would not, but
make its numbers doubtful:

===============  ========  =======================================================================
kind             severity  meaning
===============  ========  =======================================================================
``missing``      error     a listed file is not there (VisA's table; a link that leads nowhere)
``unreadable``   error     an image or mask cannot be decoded
``mask-size``    error     a mask has another size than its image
``no-mask``      error     a defect has no mask though others have: its pixels cannot be scored
``no-train``     error     a class has no image to train on
``no-truth``     warning   no defect of the data set has a mask: images can be scored, not pixels
``no-test``      warning   a class has no normal, or no defective, image to test on: no AUROC
``empty-mask``   warning   a mask marks nothing, as stored or once resized
``lossy-mask``   warning   a mask is a JPEG file, whose noise around edges counts as anomaly
``orphan-mask``  warning   a mask in the ground truth belongs to no image
``not-read``     warning   images in the folder of a class that the layout has no use for, and
                           pictures in files of a kind that is not read
``dark``         warning   all 16-bit images of a class use 12 bits or fewer: read nearly black
``leak``         warning   an image to test on is, byte for byte, one to train or validate on, or
                           one to validate on is one to train on
===============  ========  =======================================================================
"""

from __future__ import annotations

import contextlib
import difflib
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from rlr_fast.data.images import (
    UnreadableImageError,
    checked_size,
    open_image,
    read_mask,
    resize_mask,
    to_rgb,
)
from rlr_fast.data.layouts import (
    DataSet,
    Sample,
    list_images,
    normal_folder,
    read_dataset,
    subfolders,
)
from rlr_fast.data.threads import map_ahead
from rlr_fast.files import file_digest

_ERRORS = frozenset({"missing", "unreadable", "mask-size", "no-mask", "no-train"})
_SHOWN_OF_A_KIND = 5
# What folders of a class are called, whatever the layout calls its normal images.
_FOLDERS = ("train", "test", "validation", "ground_truth")
_TWELVE_BITS = 4096
# Suffixes of pictures that other programs write, and `IMAGE_SUFFIXES` lacks.
_OTHER_PICTURES = frozenset(
    {
        ".avif",
        ".dng",
        ".exr",
        ".heic",
        ".heif",
        ".jp2",
        ".jxl",
        ".pbm",
        ".pgm",
        ".ppm",
        ".psd",
        ".tga",
    }
)


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        kind: One of the kinds in the table on top of this file.
        category: The class, empty for the whole data set.
        path: The file or folder, None where there is none to point at.
        message: What is wrong with it.
    """

    kind: str
    category: str
    path: Path | None
    message: str

    @property
    def severity(self) -> Literal["error", "warning"]:
        """``"error"`` if a run would fail or lack a result over it."""
        return "error" if self.kind in _ERRORS else "warning"


@dataclass(frozen=True)
class ClassReport:
    """What was found of one class.

    Attributes:
        train: Images to train on.
        validation: Normal images held back from training.
        test_good: Normal images to test on.
        test_defects: Kind of defect → images to test on.
        masks: Mask files.
        image_sizes: (height, width) → images of that size, of those that could be read.
    """

    train: int
    validation: int
    test_good: int
    test_defects: dict[str, int]
    masks: int
    image_sizes: dict[tuple[int, int], int]


@dataclass(frozen=True)
class Report:
    """What `check_dataset` found.

    Attributes:
        root: The folder that was read.
        layout: Its layout.
        classes: Report of each class, by name.
        problems: Class by class, in the order of the files.
    """

    root: Path
    layout: str
    classes: dict[str, ClassReport]
    problems: list[Problem]

    @property
    def ok(self) -> bool:
        """Whether a run would get through: there may be warnings, but no errors."""
        return not self.errors

    @property
    def errors(self) -> list[Problem]:
        """The problems that would stop a run."""
        return [problem for problem in self.problems if problem.severity == "error"]

    @property
    def warnings(self) -> list[Problem]:
        """The problems that would not."""
        return [problem for problem in self.problems if problem.severity == "warning"]


@dataclass
class _Checked:
    """What decoding one sample gave."""

    image_size: tuple[int, int] | None = None
    peak_16_bit: int | None = None
    problems: list[Problem] = field(default_factory=list)


def check_dataset(
    root: str | os.PathLike[str],
    layout: str = "auto",
    classes: Iterable[str] | None = None,
    size: tuple[int, int] | None = None,
    workers: int | None = None,
) -> Report:
    """Decode every file of a data set and report what would stop a run or spoil its numbers.

    Args:
        root: As for `read_dataset`.
        layout: As for `read_dataset`.
        classes: As for `read_dataset`.
        size: (H, W) that a run would work at; with it, defects that vanish at that size are told.
        workers: Threads that decode; `default_workers` by default.

    Raises:
        ValueError: If `read_dataset` refuses `root`, `layout` or `classes`, or `size` is not two
            positive integers.
    """
    if size is not None:
        size = checked_size(size)
    data = read_dataset(root, layout, classes)
    problems: list[Problem] = []
    reports: dict[str, ClassReport] = {}
    leaks = _leaks(data)
    has_masks = data.has_masks
    if not has_masks and any(
        sample.is_anomaly for name in data.classes for sample in data.test[name]
    ):
        message = "no defective image has a mask: images can be scored, their pixels cannot"
        problems.append(Problem("no-truth", "", data.root, message))

    for name in data.classes:
        train, test = data.train[name], data.test[name]
        validation = data.validation.get(name, [])
        samples = [*train, *validation, *test]
        checked = list(
            map_ahead(lambda sample: _check_sample(sample, has_masks, size), samples, workers)
        )

        problems += _check_counts(name, train, test, data.layout)
        for i, (sample, result) in enumerate(zip(samples, checked, strict=True)):
            problems += result.problems
            if i >= len(train) and sample in leaks:
                use = "calibrated" if sample in validation else "tested"
                message = f"the same file as {leaks[sample]}, which is not to be {use} on"
                problems.append(Problem("leak", name, sample.path, message))
        peaks = [result.peak_16_bit for result in checked if result.peak_16_bit is not None]
        if peaks and max(peaks) < _TWELVE_BITS:
            message = (
                f"no 16-bit image exceeds {max(peaks)} of 65535, so all are read nearly black; "
                "stretch them to the full range"
            )
            problems.append(Problem("dark", name, data.folders[name], message))
        problems += _check_unused(name, samples, data)

        defects = Counter(sample.defect for sample in test if sample.is_anomaly)
        sizes = Counter(result.image_size for result in checked if result.image_size is not None)
        reports[name] = ClassReport(
            train=len(train),
            validation=len(validation),
            test_good=sum(not sample.is_anomaly for sample in test),
            test_defects=dict(sorted(defects.items())),
            masks=sum(len(sample.mask_paths) for sample in test),
            image_sizes=dict(sorted(sizes.items())),
        )
    if classes is None:
        problems += _check_beside(data)
    return Report(data.root, data.layout, reports, problems)


def format_report(report: Report) -> str:
    """Return a report as text: a table of the classes, the problems, and one line that sums up.

    Of many problems of one kind in one class the first few are shown and the others counted.
    """
    lines = [f"{report.root} (layout {report.layout})", "", *_table(report)]
    for severity, problems in (("error", report.errors), ("warning", report.warnings)):
        groups: dict[tuple[str, str], list[Problem]] = {}
        for problem in problems:
            groups.setdefault((problem.category, problem.kind), []).append(problem)
        if groups:
            lines.append("")
        for (category, kind), group in groups.items():
            where = f" in {category}" if category else ""
            for problem in group[:_SHOWN_OF_A_KIND]:
                path = "" if problem.path is None else f"{problem.path}: "
                lines.append(f"{severity}{where} [{kind}] {path}{problem.message}")
            if len(group) > _SHOWN_OF_A_KIND:
                more = len(group) - _SHOWN_OF_A_KIND
                lines.append(f"{severity}{where} [{kind}] and {more} more like these")
    return "\n".join([*lines, "", _verdict(report)])


def _check_sample(sample: Sample, has_masks: bool, size: tuple[int, int] | None) -> _Checked:
    result = _Checked()

    def problem(kind: str, path: Path, message: str) -> None:
        result.problems.append(Problem(kind, sample.category, path, message))

    def unreadable(error: UnreadableImageError) -> None:
        is_missing = isinstance(error.__cause__, FileNotFoundError)
        problem("missing" if is_missing else "unreadable", error.path, error.reason)

    try:
        image = open_image(sample.path)
        to_rgb(image, sample.path)
    except UnreadableImageError as error:
        unreadable(error)
    else:
        result.image_size = (image.height, image.width)
        if image.mode.startswith("I;16") or image.mode == "I":
            result.peak_16_bit = int(np.asarray(image).max())
    if not sample.is_anomaly:
        return result
    if not sample.mask_paths:
        if has_masks:
            problem("no-mask", sample.path, f"no mask marks its defect ({sample.defect})")
        return result

    masks = []
    for path in sample.mask_paths:
        try:
            mask = read_mask(path)
        except UnreadableImageError as error:
            unreadable(error)
            continue
        masks.append(mask)
        if result.image_size is not None and mask.shape != result.image_size:
            message = (
                f"it is {_by(mask.shape)}, its image {sample.path} is {_by(result.image_size)}"
            )
            problem("mask-size", path, message)
        elif not mask.any():
            problem("empty-mask", path, f"it marks nothing, though its image shows {sample.defect}")
        if path.suffix.lower() in (".jpg", ".jpeg"):
            problem("lossy-mask", path, "JPEG noise counts as anomaly; save the mask as PNG")
    # A mask that is empty, broken or of another size has been told of already.
    is_sound = len(masks) == len(sample.mask_paths) and len({mask.shape for mask in masks}) == 1
    if size is not None and is_sound and all(mask.any() for mask in masks):
        union = np.logical_or.reduce(masks)
        if not resize_mask(union, size).any():
            message = f"its {int(union.sum())} marked pixels vanish when resized to {_by(size)}"
            problem("empty-mask", sample.mask_paths[0], message)
    return result


def _check_counts(
    name: str, train: list[Sample], test: list[Sample], layout: str
) -> Iterable[Problem]:
    if not train:
        yield Problem("no-train", name, None, "no image to train on")
    if layout == "folder":
        return  # It has no place for test images, so none are expected.
    if not test:
        yield Problem("no-test", name, None, "no image to test on")
    elif all(sample.is_anomaly for sample in test):
        hints = filter(None, (_meant(s.defect, [normal_folder(layout)]) for s in test))
        message = f"no normal image to test on: AUROC is undefined{next(hints, '')}"
        yield Problem("no-test", name, None, message)
    elif not any(sample.is_anomaly for sample in test):
        yield Problem("no-test", name, None, "no defective image to test on: AUROC is undefined")


def _check_beside(data: DataSet) -> Iterable[Problem]:
    """Yield the folders beside those of the classes, and the root, where they hold images."""
    folders = {os.path.realpath(folder) for folder in data.folders.values()}
    beside = {os.path.realpath(folder.parent) for folder in data.folders.values()}
    if data.layout == "folder" or os.path.realpath(data.root) not in beside:
        return  # it has no other folders, or is itself the class
    told = f"layout {data.layout} has no use for"
    if loose := len(list_images(data.root)):
        yield Problem("not-read", "", data.root, f"{told} {counted(loose, 'image')} right in it")
    for part in subfolders(data.root).values():
        # What nobody asked to read is no reason to fail.
        with contextlib.suppress(PermissionError):
            if os.path.realpath(part) in folders or not any(i for _, i in _image_tree(part)):
                continue
            hints = (_meant(name, list(_FOLDERS)) for name in subfolders(part))
            hint = next(filter(None, hints), "; it is no class, without train or test")
            yield Problem("not-read", "", part, f"{told} the images in it{hint}")


def _check_unused(name: str, samples: list[Sample], data: DataSet) -> Iterable[Problem]:
    """Yield masks that belong to no image one by one, images without use folder by folder."""
    folder = data.folders[name]
    used = {str(path) for sample in samples for path in (sample.path, *sample.mask_paths)}
    truth = ("Data", "Masks") if data.layout == "visa" else ("ground_truth",)
    for part, images in _image_tree(folder):
        yield from _check_kinds(name, part)
        unused = [path for path in images if str(path) not in used]
        parts = part.relative_to(folder).parts
        if not unused or parts[:2] == ("ground_truth", normal_folder(data.layout)):
            continue  # Some sets ship empty masks of normal images; they are not needed.
        if data.layout != "folder" and parts[: len(truth)] == truth:
            for path in unused:
                yield Problem("orphan-mask", name, path, "no image to test on belongs to it")
        else:
            count = counted(len(unused), "image")
            known = [*_FOLDERS, normal_folder(data.layout)]
            hint = next(filter(None, (_meant(folder, known) for folder in parts)), "")
            message = f"layout {data.layout} has no use for {count} in it{hint}"
            yield Problem("not-read", name, part, message)


def _check_kinds(name: str, folder: Path) -> Iterable[Problem]:
    """Yield the pictures right in a folder whose files are of a kind that is not read."""
    suffixes = [Path(file).suffix.lower() for file in os.listdir(folder) if file[0] != "."]
    found = [suffix for suffix in suffixes if suffix in _OTHER_PICTURES]
    if found:
        kinds = ", ".join(sorted(set(found)))
        message = f"{counted(len(found), 'file')} of {kinds} in it, which are not read"
        yield Problem("not-read", name, folder, message)


def _meant(folder: str, known: list[str]) -> str:
    """Say which of the known names a folder's was probably meant to be, if it is another."""
    close = difflib.get_close_matches(folder.lower(), known, n=1, cutoff=0.75)
    return f"; is {folder!r} meant to be {close[0]!r}?" if close and folder != close[0] else ""


def _image_tree(folder: Path) -> Iterable[tuple[Path, list[Path]]]:
    """Yield every folder from `folder` down, sorted, with the images right in it, none twice.

    A folder that does not exist has none.
    """
    seen: set[str] = set()  # Linked folders may lead back up.
    todo = [folder]
    while todo:
        part = todo.pop()
        real = os.path.realpath(part)
        if real in seen or not os.path.isdir(real):
            continue
        seen.add(real)
        yield part, list_images(part)
        todo += reversed(subfolders(part).values())


def _leaks(data: DataSet) -> dict[Sample, Path]:
    """Return sample → an image of the same content, of any class, that is used before it.

    That is an image to train on for one to validate on, and either of them for one to test on.
    """
    earlier: dict[tuple[int, str], Path] = {}
    leaks: dict[Sample, Path] = {}
    splits = [
        [
            (os.path.getsize(sample.path), sample)
            for samples in split.values()
            for sample in samples
            if os.path.isfile(sample.path) and os.access(sample.path, os.R_OK)
        ]
        for split in (data.train, data.validation, data.test)
    ]
    # Files of different length differ, so few need to be read.
    lengths = Counter(length for split in splits for length in {length for length, _ in split})
    for split in splits:
        keys = [
            ((length, file_digest(sample.path)), sample)
            for length, sample in split
            if lengths[length] > 1
        ]
        leaks.update({sample: earlier[key] for key, sample in keys if key in earlier})
        for key, sample in keys:
            earlier.setdefault(key, sample.path)
    return leaks


def _table(report: Report) -> list[str]:
    problems = Counter(problem.category for problem in report.problems)
    has_validation = any(part.validation for part in report.classes.values())
    rows = [
        ["class", "train", "validation", "good", "defective", "image size", "problems", "defects"]
    ]
    for name, part in report.classes.items():
        rows.append(
            [
                name,
                str(part.train),
                str(part.validation),
                str(part.test_good),
                str(sum(part.test_defects.values())),
                _size_range(part.image_sizes),
                str(problems[name]),
                ", ".join(f"{defect} {count}" for defect, count in part.test_defects.items()),
            ]
        )
    if not has_validation:
        rows = [[*row[:2], *row[3:]] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if title in ("class", "image size", "defects") else cell.rjust(width)
            for title, cell, width in zip(rows[0], row, widths, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def _size_range(sizes: dict[tuple[int, int], int]) -> str:
    if not sizes:
        return "-"
    if len(sizes) == 1:
        return _by(next(iter(sizes)))
    heights, widths = zip(*sizes, strict=True)
    smallest, largest = (min(heights), min(widths)), (max(heights), max(widths))
    return f"{_by(smallest)} to {_by(largest)}"


def _verdict(report: Report) -> str:
    warnings = f", {counted(len(report.warnings), 'warning')}" if report.warnings else ""
    if not report.ok:
        return (
            f"{counted(len(report.errors), 'problem')} would stop a run or cost it files{warnings}"
        )
    parts = report.classes.values()
    images = sum(
        part.train + part.validation + part.test_good + sum(part.test_defects.values())
        for part in parts
    )
    masks = sum(part.masks for part in parts)
    untested = "; no test images: enough for train and predict, not for eval"
    if report.layout != "folder":
        untested = ""
    return (
        f"ok: {counted(len(report.classes), 'class', 'classes')}, {counted(images, 'image')} and "
        f"{counted(masks, 'mask')} can be read{warnings}{untested}"
    )


def _by(size: tuple[int, ...]) -> str:
    return f"{size[0]} x {size[1]}"


def counted(number: int, one: str, many: str = "") -> str:
    """Return ``1 image``, ``2 images``; ``many`` where an s does not do."""
    return f"{number} {one if number == 1 else many or one + 's'}"
