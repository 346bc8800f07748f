"""Image files that arrive in folders: each is told once, when it is written completely."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlr_fast.data import list_images
from rlr_fast.data.layouts import subfolders
from rlr_fast.prediction.image_files import image_folders

# Clocks of file systems are coarse, so a second change may show the same time: a folder is listed
# again this many seconds after its time of change was first seen.
_COARSE = 3.0


@dataclass(frozen=True)
class _Listing:
    """What was in a folder when it was listed.

    Attributes:
        changed: The folder's times of change, of its names and of its inode, by the clock of its
            file system. What unpacks an archive sets the first back, but not the second.
        since: When that was seen first, by the clock here.
        at: When the folder was listed.
        subfolders: Their names.
    """

    changed: tuple[int, int]
    since: float
    at: float
    subfolders: Collection[str]

    def holds(self, changed: tuple[int, int], now: float) -> bool:
        """Return whether the folder, with these times of change, need not be listed now."""
        if changed != self.changed:
            return False
        if self.at - self.since > _COARSE:
            return True
        # Just after a change, as far as the two clocks agree, the next file need not wait so long.
        recent = abs(time.time() - max(changed) / 1e9) <= _COARSE
        return not recent and now - self.since <= _COARSE


def check_watched(folders: Sequence[Path], settle: float) -> None:
    """Refuse what cannot be watched.

    Raises:
        ValueError: A folder does not exist, or ``settle`` is negative or not finite.
    """
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"what is watched must be a folder, {str(folder)!r} is none")
    if not 0 <= settle < math.inf:
        raise ValueError(f"settle must be 0 seconds or more, got {settle}")


class Arrivals:
    """The image files in folders and their subfolders that have not been told yet.

    A file is complete when size and time of its last change stay the same for ``settle`` seconds. A
    name counts once: what replaces a file of the same name is not told again.

    Args:
        folders: Where they arrive.
        out: Where results are written; the pictures in it are left out.
        done: Paths that were told earlier.
        settle: Seconds.
        clock: Seconds since any moment.

    Raises:
        ValueError: See `check_watched`.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        out: Path,
        done: Collection[str] = (),
        settle: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        check_watched(folders, settle)
        self._folders, self._out, self._settle, self._clock = folders, out, settle, clock
        self._done = {os.path.abspath(path) for path in done}
        # Path → size, time of the last change, and since when both are known.
        self._waiting: dict[Path, tuple[int, int, float]] = {}
        self._listed: dict[Path, _Listing] = {}

    def poll(self) -> list[Path]:
        """Return the files that are complete now, by the time of their last change.

        Raises:
            OSError: A folder cannot be read.
        """
        for root in self._folders:
            for folder in image_folders(root, self._out, self._subfolders, quiet=True):
                self._list(folder)
        ready = []
        for path, (size, changed, since) in list(self._waiting.items()):
            try:
                status = path.stat()
            except OSError:  # removed meanwhile, or a link that leads nowhere yet
                del self._waiting[path]
                self._listed.pop(path.parent, None)
                continue
            now = self._clock()
            if (status.st_size, status.st_mtime_ns) != (size, changed):
                self._waiting[path] = status.st_size, status.st_mtime_ns, now
            elif now - since >= self._settle:
                ready.append((changed, path))
                del self._waiting[path]
                self._done.add(os.path.abspath(path))
        return [path for _, path in sorted(ready)]

    def _list(self, folder: Path) -> None:
        """Look for new files in a folder, if it may have some."""
        try:
            changed = _times_of_change(folder)
        except FileNotFoundError:
            return
        known, now = self._listed.get(folder), self._clock()
        if known is not None and known.holds(changed, now):
            return
        for path in list_images(folder):
            if path not in self._waiting and os.path.abspath(path) not in self._done:
                self._waiting[path] = -1, -1, now
        since = known.since if known is not None and known.changed == changed else now
        self._listed[folder] = _Listing(changed, since, now, tuple(subfolders(folder)))

    def _subfolders(self, folder: Path) -> Collection[str]:
        """Return the names of a folder's subfolders, as they were listed."""
        known = self._listed.get(folder)
        return () if known is None else known.subfolders


def _times_of_change(folder: Path) -> tuple[int, int]:
    """Return when a folder's names and when its inode were changed, in nanoseconds."""
    status = folder.stat()
    return status.st_mtime_ns, status.st_ctime_ns
