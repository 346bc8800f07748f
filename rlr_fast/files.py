"""Files that appear whole or not at all, and folders in which one process works at a time."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import safetensors.torch
from filelock import FileLock, Timeout
from torch import Tensor

LOCK_FILE = ".lock"

_PART = 2**22  # bytes of a file in memory at once

# What a file system without locks answers, and one that does not sync folders.
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EACCES)

_log = logging.getLogger(__name__)


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a file as in `replacing`.

    Raises:
        OSError: The file cannot be written; the old one is as it was.
    """
    data = content.encode() if isinstance(content, str) else content
    with replacing(path) as partial:
        partial.write_bytes(data)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a name to write a file under, which gets its own name when the block ends well.

    So a reader, a kill, a full disk or a loss of power meets the old file or the new. After the
    block the new one is on the disk.

    Args:
        path: The file; the other name lies beside it, is hidden, and has its suffix.

    Raises:
        OSError: The file cannot be replaced; the old one is as it was.
    """
    name = hashlib.blake2b(os.fsencode(path.name), digest_size=8).hexdigest()
    partial = path.with_name(f".{name}.partial{path.suffix}")
    try:
        yield partial
        put_in_place(partial, path)
    except BaseException as error:
        other = (None, partial, str(partial))  # of a full disk, and of a rename that fails
        if isinstance(error, OSError) and error.errno and error.filename in other:
            error.filename, error.filename2 = str(path), None
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def put_in_place(partial: Path, path: Path) -> None:
    """Give a finished file, or a folder of synced files, its own name on the same disk.

    Raises:
        OSError: It cannot be synced or renamed.
    """
    if partial.is_dir():
        _sync_folder(partial)
    else:
        with open(partial, "r+b") as file:
            os.fsync(file.fileno())
    os.replace(partial, path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, where the system can do so.

    Raises:
        OSError: The disk cannot be written.
    """
    if os.name == "nt":  # Windows cannot open a folder
        return
    try:
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


def file_digest(path: Path) -> str:
    """Return a digest of a file's content, equal for copies.

    Raises:
        OSError: It cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while part := file.read(_PART):
            digest.update(part)
    return digest.hexdigest()


def check_writable(folder: Path) -> None:
    """Make the folder and a file in it, and leave nothing.

    Raises:
        OSError: One cannot be made.
    """
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    finally:
        for place in missing:
            with contextlib.suppress(OSError):  # of another process that came meanwhile
                place.rmdir()


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and metadata as a safetensors file, atomically.

    Raises:
        OSError: The file cannot be written; the old one is as it was.
    """
    host = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    write_atomically(path, safetensors.torch.save(host, metadata=dict(metadata)))


def readable_digest(path: Path) -> str | None:
    """Return a file's `file_digest`; None where it cannot be read."""
    try:
        return file_digest(path)
    except OSError:
        return None


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keep other processes that ask for the same out of a folder while the block runs.

    The system itself frees the lock with the process, however that ends.

    Args:
        folder: Made where it is missing, and removed again if nothing is written into it.

    Raises:
        BlockingIOError: Another process is in it.
        OSError: The folder cannot be written.
    """
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK_FILE)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BlockingIOError(f"another process works in {str(folder)!r}") from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        _log.warning("%s cannot be locked (%s): let no other command work there", folder, error)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if is_new and [path.name for path in folder.iterdir()] == [LOCK_FILE]:
                (folder / LOCK_FILE).unlink()  # nothing came of it: leave nothing
                folder.rmdir()
        lock.release()
