"""Image files that arrive in folders: each is told once, when it is written completely."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from rlr_fast.data import list_images
from rlr_fast.data.layouts import subfolders
from rlr_fast.prediction.image_files import image_folders

# A folder in which something changed less than this many seconds ago is listed again: clocks of
# file systems are coarse, so a second change may show the same time.
_COARSE = 3.0


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
        self._done = set(done)
        # Path → size, time of the last change, and since when both are known.
        self._waiting: dict[Path, tuple[int, int, float]] = {}
        # Folder → its time of change when it was listed, and its subfolders.
        self._listed: dict[Path, tuple[int, Collection[str]]] = {}

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
                self._done.add(str(path))
        return [path for _, path in sorted(ready)]

    def _list(self, folder: Path) -> None:
        """Look for new files in a folder, if it may have some."""
        try:
            changed = folder.stat().st_mtime_ns
        except FileNotFoundError:
            return
        if self._listed.get(folder, (None,))[0] == changed:
            return
        for path in list_images(folder):
            if path not in self._waiting and str(path) not in self._done:
                self._waiting[path] = -1, -1, self._clock()
        if time.time() - changed / 1e9 > _COARSE:
            self._listed[folder] = changed, tuple(subfolders(folder))
        else:
            self._listed.pop(folder, None)

    def _subfolders(self, folder: Path) -> Collection[str]:
        """Return the names of a folder's subfolders, as they were listed if nothing changed."""
        known = self._listed.get(folder)
        try:
            changed = folder.stat().st_mtime_ns
        except FileNotFoundError:
            return ()
        return known[1] if known is not None and known[0] == changed else subfolders(folder)
