"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from torch import Tensor


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a file so that a reader, a kill or a full disk meets the old content or the new.

    Raises:
        OSError: The file cannot be written; the old one is as it was.
    """
    data = content.encode() if isinstance(content, str) else content
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and metadata as a safetensors file, atomically.

    Raises:
        OSError: The file cannot be written; the old one is as it was.
    """
    host = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    write_atomically(path, safetensors.torch.save(host, metadata=dict(metadata)))
