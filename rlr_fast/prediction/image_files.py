"""Which files are scored: images in folders and their subfolders, in some 140 bytes a file."""

from __future__ import annotations

import bisect
import copy
import hashlib
import itertools
import logging
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import overload

from rlr_fast.data import list_images
from rlr_fast.data.layouts import IMAGE_SUFFIXES, find_class, holds_masks, subfolders
from rlr_fast.visualization.report import REPORT_FOLDER

RESULTS_FILE = "results.csv"
LINES_FILE = "results.jsonl"
PICTURES_FOLDER = "pictures"
MASKS_FOLDER = "masks"

_WRITTEN = (PICTURES_FOLDER, MASKS_FOLDER, REPORT_FOLDER)  # of a prediction, beside its results
_LONGEST = 255  # bytes of a file's name

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageFile:
    """A file to score, the name of its picture in the output folder, and its class, if known."""

    path: Path
    picture: Path
    category: str | None = None


@dataclass(frozen=True)
class _Folder:
    """Files of a folder, one after the other.

    Attributes:
        first: Place of the first one in the list.
        path: The folder.
        place: Of their pictures in the output folder.
        category: Class of the files, if known.
    """

    first: int
    path: Path
    place: Path
    category: str | None = None


class ImageFiles(Sequence[ImageFile]):
    """A list of files to score, from `find_images`."""

    def __init__(self) -> None:
        self._folders: list[_Folder] = []
        self._names: list[str] = []
        self._pictures: dict[int, Path] = {}  # of files that do not have the usual one

    def __len__(self) -> int:
        return len(self._names)

    @overload
    def __getitem__(self, index: int) -> ImageFile: ...
    @overload
    def __getitem__(self, index: slice) -> list[ImageFile]: ...
    def __getitem__(self, index: int | slice) -> ImageFile | list[ImageFile]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        after = bisect.bisect_right(self._folders, index, key=lambda folder: folder.first)
        folder, name = self._folders[after - 1], self._names[index]
        picture = self._pictures.get(index) or picture_name(folder.place / name)
        return ImageFile(folder.path / name, picture, folder.category)

    def classified(self, classes: Collection[str]) -> ImageFiles:
        """Return the files, each with the class in whose folder it lies, if any.

        See `rlr_fast.data.layouts.find_class`.

        Raises:
            ValueError: The folders of a file name two classes.
        """
        firsts = [folder.path / self._names[folder.first] for folder in self._folders]
        return self._with([find_class(path, classes) for path in firsts])

    def of_class(self, category: str) -> ImageFiles:
        """Return the files, all of a class."""
        return self._with([category] * len(self._folders))

    @property
    def categories(self) -> set[str | None]:
        """The classes of the files; None is among them if that of a file is not known."""
        return {folder.category for folder in self._folders}

    def count(self, category: object) -> int:
        """Return how many files are of a class; None stands for one that is not known."""
        firsts = [folder.first for folder in self._folders] + [len(self)]
        sizes = [after - first for first, after in itertools.pairwise(firsts)]
        pairs = zip(self._folders, sizes, strict=True)
        return sum(size for folder, size in pairs if folder.category == category)

    def _with(self, categories: Sequence[str | None]) -> ImageFiles:
        files = copy.copy(self)
        pairs = zip(self._folders, categories, strict=True)
        files._folders = [replace(folder, category=category) for folder, category in pairs]
        return files

    def _add(self, folder: Path, place: Path, name: str, picture: Path | None = None) -> None:
        """Add a file of a folder; ``picture`` is its picture's name where it is not the usual."""
        if not self._folders or (self._folders[-1].path, self._folders[-1].place) != (
            folder,
            place,
        ):
            self._folders.append(_Folder(len(self), folder, place))
        if picture is not None:
            self._pictures[len(self)] = picture
        self._names.append(name)


def find_images(paths: Sequence[str | Path], out: Path | None = None) -> ImageFiles:
    """List the image files among ``paths``: files as they are, folders with all their subfolders.

    Hidden files and folders are left out, and so are pictures, masks and a report's small pictures
    that an earlier prediction wrote in ``out``; and, which is logged, what one wrote elsewhere and
    the masks of a data set in a folder. Links are followed, to no folder twice.

    Raises:
        ValueError: A path does not exist, or there is no image in a folder; or see
            `check_results_folder`.
    """
    if out is not None:
        check_results_folder(out, paths)
    files = ImageFiles()
    # Only several paths can name a file twice, or two files whose pictures have one name.
    several = len(paths) > 1
    seen: set[Path] = set()
    pictures: set[Path] = set()
    for path in map(Path, paths):
        found = False
        for folder, place, names in _images(path, out):
            found = True
            for name in names:
                if not several:
                    files._add(folder, place, name)
                elif (file := folder / name) not in seen:
                    picture = picture_name(place / name)
                    taken = picture in pictures
                    if taken:
                        picture = own_picture_name(file)
                    seen.add(file)
                    pictures.add(picture)
                    files._add(folder, place, name, picture if taken else None)
        if not found:
            raise ValueError(f"there is no image in {str(path)!r}")
    return files


def check_results_folder(out: Path, paths: Sequence[str | Path] = ()) -> None:
    """Refuse to write pictures and masks over images, or among others that would not be scored.

    Raises:
        ValueError: A path lies where a prediction into ``out`` writes, or such a folder is there
            that no prediction has written.
    """
    for name in _WRITTEN:
        written = (out / name).resolve()
        for path in map(Path, paths):
            if path.resolve().is_relative_to(written):
                raise ValueError(
                    f"{str(path)!r} lies in {str(out / name)!r}, where a prediction writes: give "
                    "another folder for its results"
                )
        is_ours = name == REPORT_FOLDER or _holds_prediction(out)
        if not is_ours and written.is_dir() and any(written.iterdir()):
            raise ValueError(
                f"{str(out / name)!r} is of no prediction, whose {name} would be written there: "
                "give another folder for its results"
            )


def _holds_prediction(folder: Path) -> bool:
    """Return whether a prediction wrote into a folder, of which somebody may have taken a table."""
    return any((folder / name).is_file() for name in (RESULTS_FILE, LINES_FILE))


def _images(path: Path, out: Path | None) -> Iterator[tuple[Path, Path, list[str]]]:
    """Yield folder by folder the images of a path: folder, place of the pictures, and names."""
    if path.is_dir():
        for folder in image_folders(path, out):
            names = [file.name for file in list_images(folder)]
            if names:
                yield folder, picture_place(folder, path), names
    elif path.exists():
        yield path.parent, Path(), [path.name]
    else:
        raise ValueError(f"there is no file or folder {str(path)!r}")


def image_folders(
    root: Path,
    out: Path | None,
    names: Callable[[Path], Collection[str]] = subfolders,
    quiet: bool = False,
) -> Iterator[Path]:
    """Yield a folder and its subfolders that may hold images to score, see `find_images`.

    Args:
        root: The folder.
        out: Where results are written.
        names: Return the names of a folder's subfolders.
        quiet: Do not log which are left out.
    """
    ours = [] if out is None else [(out / name).resolve() for name in _WRITTEN]
    seen: set[tuple[int, int]] = set()

    def walk(folder: Path) -> Iterator[Path]:
        try:
            status = folder.stat()
        except FileNotFoundError:  # it was removed meanwhile
            return
        if (status.st_dev, status.st_ino) in seen or folder.resolve() in ours:
            return
        seen.add((status.st_dev, status.st_ino))
        yield folder
        for name in names(folder):
            what = "masks" if holds_masks(folder / name) else None
            if name in _WRITTEN and _holds_prediction(folder):
                what = "pictures of an earlier prediction"
            if what is None:
                yield from walk(folder / name)
            elif not quiet and (folder / name).resolve() not in ours:
                _log.warning("the %s in %s are not scored", what, folder / name)

    return walk(root)


def picture_place(place: Path, root: Path) -> Path:
    """Return where the pictures of what lies in a given folder belong: in a folder of its name."""
    named = place.relative_to(root.parent)
    if ".." in named.parts:  # of "..", which has no name of its own
        return Path(root.resolve().name, place.relative_to(root))
    return named


def own_picture_name(path: Path) -> Path:
    """Return a picture's name that holds the file's whole path, as it was given: not a link's."""
    return picture_name(Path(*Path(os.path.abspath(path)).parts[1:]))


def picture_name(place: Path) -> Path:
    """``a.png`` → ``a.png``, ``a.jpg`` → ``a.jpg.png``: no two images share a picture.

    So ``a.jpg.png`` becomes ``a.jpg.png.png``. A name too long for that is cut, and a digest of it
    stands at its end.
    """
    if place.suffix == ".png" and Path(place.stem).suffix.lower() not in IMAGE_SUFFIXES:
        return place
    name = os.fsencode(place.name)
    if len(name) > _LONGEST - len(".png"):
        digest = hashlib.sha256(name).hexdigest()[:12]
        cut = name[: _LONGEST - len(f"-{digest}.png")].decode(errors="ignore")
        return place.with_name(f"{cut}-{digest}.png")
    return place.with_name(place.name + ".png")
