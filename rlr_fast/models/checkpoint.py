"""A checkpoint folder: ``config.json``, and ``model.safetensors`` with all but the backbone."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import OfflineModeIsEnabled
from torch import Tensor

from rlr_fast.config import RLRConfig

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"

# One entry of a file's metadata: safetensors writes several in no fixed order.
_SEAL = "rlr_fast"
_DIGEST = "digest"


# What a checkpoint on the hub holds, beside what people read.
_PUBLISHED = ["config.json", "model.safetensors", "calibration.json"]

_log = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint folder is missing, damaged, or made with another backbone."""


def check_checkpoint(name: str | Path) -> None:
    """Refuse what is neither a folder nor OWNER/NAME, the name of a repository on the hub.

    Raises:
        CheckpointError: It is neither.
    """
    folder = Path(name)
    if folder.is_dir():
        return
    if folder.exists() or folder.parent.is_file():
        raise CheckpointError(f"a checkpoint is a folder, {str(folder)!r} is a file")
    repository, has_revision, revision = str(name).partition("@")
    parts = Path(repository).parts
    if len(parts) != 2 or folder.is_absolute() or ".." in parts:
        raise CheckpointError(f"there is no checkpoint folder {str(folder)!r}")
    if has_revision and not revision:
        raise CheckpointError(f"the revision behind '@' is missing in {str(name)!r}")


def fetch_checkpoint(name: str | Path, revision: str | None = None, **options: Any) -> Path:
    """Return the folder of a checkpoint; one on the hub is loaded first, all of one revision.

    Where the hub does not answer, or refuses, what was loaded earlier is taken, with a warning
    that names its commit; without one where that was asked for (offline).

    Args:
        name: Folder of a run, or name of a repository, OWNER/NAME or OWNER/NAME@REVISION.
        revision: Branch, tag or commit of the repository; the newest by default.
        options: Of `huggingface_hub.snapshot_download`: ``token``, ``cache_dir``,
            ``force_download``, ``local_files_only``.

    Raises:
        CheckpointError: It is neither, or the repository cannot be had.
    """
    check_checkpoint(name)
    if Path(name).is_dir():
        return Path(name)
    repository, _, pinned = str(name).partition("@")
    revision = revision or pinned or None
    trouble = None
    if not options.get("local_files_only"):
        try:
            HfApi(token=options.get("token")).model_info(repository, revision=revision)
        except Exception as error:
            if not _is_of_hub(error):
                raise
            trouble = None if isinstance(error, OfflineModeIsEnabled) else _first_line(error)
    with hub_errors(f"there is no folder {str(name)!r}, and the hub does not give it"):
        folder = Path(
            snapshot_download(repository, revision=revision, allow_patterns=_PUBLISHED, **options)
        )
    if trouble is not None and folder.name != revision:
        _log.warning(
            "%s may not be the newest: commit %s, which was loaded earlier, is taken, for the hub "
            "does not give it now (%s)",
            name,
            folder.name,
            trouble,
        )
    return folder


@contextlib.contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Tell an error of the hub, or of the way to it, in a line.

    Raises:
        CheckpointError: Begins with ``what``.
    """
    try:
        yield
    except Exception as error:
        if not _is_of_hub(error):
            raise
        refused = getattr(getattr(error, "response", None), "status_code", None) in (401, 403)
        hint = "; log in by hf auth login, or set HF_TOKEN" if refused else ""
        raise CheckpointError(f"{what}: {_first_line(error)}{hint}") from error


def _is_of_hub(error: Exception) -> bool:
    # Its HTTP library, another one from version to version, has errors of its own.
    of_http = type(error).__module__.partition(".")[0].startswith("httpx")
    return of_http or isinstance(error, (OSError, ValueError))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def load_config(path: Path) -> RLRConfig:
    """Return the configuration of a checkpoint's ``config.json``.

    Raises:
        CheckpointError: It is missing, not a JSON object, or no configuration.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path.parent} is not a checkpoint: it has no {path.name}"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} cannot be read: it holds no JSON object")
    try:
        return RLRConfig.from_dict(values)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def sealed(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """Return metadata for a safetensors file by which `read_weights` sees whether it is damaged.

    Args:
        tensors: Those of the file.
        metadata: What the file says of itself.
    """
    digest = _digest(tensors, metadata)
    return {_SEAL: json.dumps({**metadata, _DIGEST: digest}, sort_keys=True)}


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _opened(tensors: Mapping[str, Tensor], metadata: dict[str, str], path: Path) -> dict[str, str]:
    """Return what `sealed` was given; files of older versions have no seal."""
    if _SEAL not in metadata:
        return metadata
    try:
        inside: dict[str, str] = dict(json.loads(metadata[_SEAL]))
        digest = inside.pop(_DIGEST)
        is_sound = digest == _digest(tensors, inside)
    except (ValueError, TypeError, KeyError, RecursionError):
        is_sound = False
    if not is_sound:
        raise CheckpointError(f"{path} is damaged: it holds something else than what was written")
    return inside


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file: tensors, and its metadata.

    Raises:
        CheckpointError: It is missing, cut short or damaged, or has another content than when it
            was written by `sealed` metadata.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return tensors, _opened(tensors, file.metadata() or {}, path)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path.parent} is not a checkpoint: it has no {path.name}"
        ) from error
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged or incomplete: {error}") from error
