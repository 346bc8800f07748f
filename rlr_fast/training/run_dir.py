"""A run's folder: its settings, and the checkpoint of its last written epoch.

Each file is whole at any time, and the training state alone suffices to resume.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from rlr_fast.config import RLRConfig, TrainConfig, short_windows
from rlr_fast.data import DataSet
from rlr_fast.data.records import parse_record, read_record
from rlr_fast.data.threads import BackgroundWriter
from rlr_fast.files import (
    check_writable,
    lock_folder,
    write_atomically,
    write_tensors,
)
from rlr_fast.models.checkpoint import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    CheckpointError,
    read_weights,
    sealed,
)
from rlr_fast.training.calibration import CALIBRATION_FILE, trained_classes

RUN_FILE = "run.json"
STATE_FILE = "training_state.safetensors"
HISTORY_FILE = "history.jsonl"
TRAINED_FILE = "trained_images.txt"

_log = logging.getLogger(__name__)

# Of numbers in the history: whole ones, and others, which are those of float32.
_MOST = 2**53
_LARGEST = 3.5e38

_DIGEST = re.compile("[0-9a-f]{32}")  # of `file_digest`
_PARTS = ("model", "recipe", "data")
_DIGESTS = {
    "files_digest": "the training images have other names or sizes",
    "test_files_digest": "the test images have other names or sizes",
    "kept_out_digest": "the images that are kept out of training have other names or sizes",
}

Row = dict[str, float]


class TrainingError(RuntimeError):
    """Training cannot start or go on; the message says why, and what is kept."""


@dataclass(frozen=True)
class Checkpoint:
    """What an epoch leaves.

    Attributes:
        epoch: Finished epochs.
        model: Tensors of `RLRModel.checkpoint_state`.
        optimizer: Of each parameter, by its number, the optimizer's tensors by name.
        progress: What else a resumed run needs, as plain values.
        metadata: Of `RLRModel.checkpoint_metadata`.
        history: Rows of the log so far.
    """

    epoch: int
    model: Mapping[str, Tensor]
    optimizer: Mapping[int, Mapping[str, Tensor]]
    progress: Mapping[str, Any]
    metadata: Mapping[str, str]
    history: Sequence[Row]


@dataclass(frozen=True)
class _Images:
    """Which images a run takes, in ``run.json``; see `rlr_fast.data.contents.describe_images`."""

    root: str
    layout: str
    classes: list[str]
    images: int
    files_digest: str
    kept_out_digest: str


@dataclass(frozen=True)
class _Record:
    """The content of ``run.json`` that a resumed run is held against."""

    model: dict[str, Any]
    recipe: dict[str, Any]
    data: _Images
    processes: int = 1


@dataclass(frozen=True)
class _Progress:
    """What a training state says of itself."""

    epoch: int
    steps: int
    scaler: dict[str, Any]
    backbone_fingerprint: str


def read_run(out: Path) -> dict[str, Any] | None:
    """Return the settings of the run in ``out``, or None where there is none.

    Raises:
        TrainingError: The record is missing beside a training state, or damaged.
    """
    path = out / RUN_FILE
    if not path.exists() and not (out / STATE_FILE).exists():
        return None
    try:
        return asdict(read_record(_Record, path))
    except (OSError, ValueError) as error:
        raise TrainingError(f"{path} cannot be read: {error}") from error


def unfinished(run: Path) -> str | None:
    """Say that training was stopped before its end, if it was; its last act is to write scores.

    Raises:
        CheckpointError: The scores are damaged.
        TrainingError: The run's record is damaged.
    """
    if read_run(run) is None or trained_classes(run):
        return None
    return (
        f"{run} was not trained to its end: the train command that began it finishes it with "
        "--resume"
    )


def tell_unfinished(run: Path) -> None:
    """Warn of a model whose training was stopped before its end.

    Raises:
        CheckpointError: The scores are damaged.
        TrainingError: The run's record is damaged.
    """
    if (told := unfinished(run)) is not None:
        _log.warning(told)


def check_trained(out: Path, digests: Collection[str | None]) -> None:
    """Refuse to go on where a file has changed that a run was trained on.

    Args:
        out: Folder of the run.
        digests: Of the files that it would go on with, as from
            `rlr_fast.data.images.digest_images`.

    Raises:
        TrainingError: Some are others, or cannot be read; or the list of them is damaged.
    """
    known = _known_trained(out)
    changed = len(known.difference(digests))
    if changed:
        raise TrainingError(
            f"{out} cannot be resumed with other images: of {len(known)} that it was trained on, "
            f"{changed} have another content now or cannot be read; put them back, or choose "
            "another --out"
        )


def write_trained(out: Path, digests: Collection[str | None]) -> None:
    """Write which files a run is trained on; one that goes on must have read the same.

    Args:
        out: Folder of the run.
        digests: Of the files that could be read, as from `rlr_fast.data.images.digest_images`.

    Raises:
        TrainingError: The run that goes on read others, or its list of them is damaged.
        OSError: They cannot be written.
    """
    known = _known_trained(out)
    trained = {digest for digest in digests if digest is not None}
    if known and trained != known:
        raise TrainingError(
            f"{out} cannot be resumed with other images: it was trained on {len(known)}, and "
            f"{len(trained)} can be read now, {len(trained - known)} of them for the first time; "
            "choose another --out"
        )
    if not known:
        write_atomically(out / TRAINED_FILE, "".join(f"{d}\n" for d in sorted(trained)))


def _known_trained(out: Path) -> frozenset[str]:
    # What finished no epoch leaves the folder free, to a run on other images, too.
    return read_trained(out) if (out / STATE_FILE).exists() else frozenset()


def read_trained(out: Path) -> frozenset[str]:
    """Return the digests of the files that a run was trained on; none where it does not say.

    They are those of `rlr_fast.files.file_digest`.

    Raises:
        TrainingError: The list is damaged.
    """
    path = out / TRAINED_FILE
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:  # of a run of an older version
        return frozenset()
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError(f"{path} cannot be read: {error}") from error
    if not all(map(_DIGEST.fullmatch, lines)):
        raise TrainingError(f"{path} cannot be read: it must hold a digest in each line")
    return frozenset(lines)


def check_folder(out: Path, record: Mapping[str, Any], resume: bool, data: DataSet) -> None:
    """Refuse a folder that holds another run, or that lies among the images, before any work.

    Args:
        out: Folder of the run.
        record: Settings of the run.
        resume: Whether a run in the folder is to go on.
        data: The data set.

    Raises:
        TrainingError: ``out`` cannot be written, holds a run that is not to be resumed, or one of
            other settings; or it would be read as a part of the data set.
    """
    if out.exists() and not out.is_dir():
        raise TrainingError(f"{out} is a file; a run needs a folder")
    try:
        check_writable(out)
    except OSError as error:
        raise TrainingError(f"cannot write the run in {str(out)!r}: {error}") from error
    if not (out / STATE_FILE).exists():  # what finished no epoch leaves the folder free
        check_outside(out, data, "run")
        if (out / WEIGHTS_FILE).exists():
            raise TrainingError(
                f"{out} holds a model without its {STATE_FILE}, which cannot be resumed and is not "
                "overwritten; choose another --out"
            )
        return
    previous = read_run(out)
    assert previous is not None
    if not resume:
        raise TrainingError(
            f"{out} already holds a run; go on with it by --resume, or choose another --out"
        )
    changed = changed_settings(previous, record)
    if changed:
        raise TrainingError(f"{out} cannot be resumed with other settings: {'; '.join(changed)}")


def check_outside(out: Path, data: DataSet, what: str) -> None:
    """Refuse a folder that lies among the images of a data set.

    Args:
        out: The folder.
        data: The data set.
        what: What is about to be written there.

    Raises:
        TrainingError: It would be read as a part of the data set.
    """
    # Elsewhere in a data set only folders that look like classes are read.
    read = [data.root] if data.layout == "folder" else data.folders.values()
    if any(out.resolve().is_relative_to(folder.resolve()) for folder in read):
        raise TrainingError(
            f"the {what} cannot be written in {str(out)!r}, among the images of "
            f"{str(data.root)!r}: it would be read as a part of them; choose another --out"
        )


def tell_other_processes(out: Path, record: Mapping[str, Any]) -> None:
    """Warn of a run that goes on in another number of processes than it was begun in.

    Raises:
        TrainingError: The run's record is damaged.
    """
    previous = read_run(out)
    try:
        if previous is None or unfinished(out) is None:
            return
    except CheckpointError:  # of the scores, which are written when a run ends
        return
    begun, now = previous["processes"], record["processes"]
    if begun != now:
        _log.warning(
            "%s was begun by %s process(es) and goes on with %d: other images share a step, so the "
            "result is not that of one uninterrupted run",
            out,
            begun,
            now,
        )


@contextlib.contextmanager
def lock_run(out: Path) -> Iterator[None]:
    """Keep other commands out of a run's folder while the block runs.

    Raises:
        TrainingError: Another one works in it, or it cannot be made.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock_folder(out))
        except OSError as error:
            raise TrainingError(f"cannot write the run in {str(out)!r}: {error}") from error
        yield


def changed_settings(previous: Mapping[str, Any], record: Mapping[str, Any]) -> list[str]:
    """Say which settings of a run's record are others now, wherever the data lie."""
    # A run begun before a setting existed had its default.
    defaults = {"model": json.loads(RLRConfig().to_json()), "recipe": asdict(TrainConfig())}
    changed = []
    for part in _PARTS:
        settings = dict(previous[part])
        for name in sorted(defaults.get(part, {}).keys() & record[part].keys()):
            settings.setdefault(name, defaults[part][name])
        for name, old in settings.items():
            new = json.loads(json.dumps(record[part].get(name)))
            if name == "windows":  # once written as they were given, a side or a pair
                old, new = (json.loads(json.dumps(short_windows(w))) for w in (old, new))
            if new != old and name != "root":
                changed.append(_DIGESTS.get(name, f"{name} was {old!r}, now {new!r}"))
    return changed


def write_settings(out: Path, config: str, record: Mapping[str, Any]) -> None:
    """Write what the run is, before its first step; not over what is to be resumed.

    Raises:
        TrainingError: The files cannot be written.
    """
    if (out / STATE_FILE).exists():
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        # A run is finished when it is there: one that was deleted in part has left it.
        (out / CALIBRATION_FILE).unlink(missing_ok=True)
        write_atomically(out / CONFIG_FILE, config)
        write_atomically(out / RUN_FILE, json.dumps(record, indent=2))
    except OSError as error:
        raise TrainingError(f"cannot write the run in {str(out)!r}: {error}") from error


def read_checkpoint(out: Path) -> Checkpoint | None:
    """Return the last written epoch's checkpoint, if there is one; ``metadata`` is in ``progress``.

    Raises:
        TrainingError: It is damaged.
    """
    path = out / STATE_FILE
    if not path.exists():
        return None
    try:
        tensors, metadata = read_weights(path)
    except CheckpointError as error:
        raise TrainingError(
            f"cannot resume: {error}. {WEIGHTS_FILE} beside it can still be used; delete both to "
            "start the run anew"
        ) from error
    model: dict[str, Tensor] = {}
    optimizer: dict[int, dict[str, Tensor]] = {}
    try:
        progress = parse_record(_Progress, metadata.get("progress", "null"))
        for key, value in tensors.items():
            part, _, name = key.partition(".")
            if part == "model":
                model[name] = value
            else:
                index, name = name.split(".")
                optimizer.setdefault(int(index), {})[name] = value
    except ValueError as error:
        raise TrainingError(f"cannot resume: {path} holds no training state: {error}") from error
    history = _read_history(out / HISTORY_FILE, progress.steps)
    values = asdict(progress)
    return Checkpoint(progress.epoch, model, optimizer, values, values, history)


def _read_history(path: Path, steps: int) -> list[Row]:
    """Return the rows of the first ``steps`` steps."""
    try:
        rows = [_row(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        _log.warning("%s is missing: the curve begins anew", path)
        return []
    except (OSError, ValueError) as error:
        raise TrainingError(
            f"{path} cannot be read: {error}. Delete it to resume: nothing but the curve of the "
            "loss is lost"
        ) from error
    return [row for row in rows if row["step"] <= steps]


def _row(line: str) -> Row:
    row = parse_record(dict[str, Any], line)
    missing = sorted({"step", "epoch", "loss", "images_per_s"} - row.keys())
    if missing:
        raise ValueError(f"a row has no {', '.join(missing)}")
    for name, value in row.items():
        # A norm may be infinite where fp16 skipped the step; no curve can be drawn of more.
        is_number = isinstance(value, float) or (type(value) is int and abs(value) < _MOST)
        if not is_number or _LARGEST < abs(value) < math.inf:
            raise ValueError(f"{name} must be a number of float32, got {str(value)[:40]!r}")
    return {name: value if name == "step" else float(value) for name, value in row.items()}


def write_checkpoint(out: Path, checkpoint: Checkpoint) -> None:
    """Write history, training state and weights, in this order.

    Raises:
        OSError: One cannot be written; it and those after it are as they were.
    """
    model = {k: v.detach().cpu() for k, v in checkpoint.model.items()}
    tensors = {f"model.{k}": v for k, v in model.items()}
    for index, state in checkpoint.optimizer.items():
        tensors |= {f"optimizer.{index}.{k}": v.detach().cpu() for k, v in state.items()}
    progress = {"epoch": checkpoint.epoch, **checkpoint.progress, **checkpoint.metadata}
    history = "".join(json.dumps(row) + "\n" for row in checkpoint.history)
    write_atomically(out / HISTORY_FILE, history)
    metadata = {"progress": json.dumps(progress)}
    write_tensors(out / STATE_FILE, tensors, sealed(tensors, metadata))
    write_tensors(out / WEIGHTS_FILE, model, sealed(model, checkpoint.metadata))


class CheckpointWriter(BackgroundWriter):
    """Writes checkpoints in a thread of its own while training goes on.

    Leaving it as a context waits for the last of them.

    Args:
        out: The run's folder.
        epoch: The epoch whose checkpoint is there already; 0 for none.
    """

    def __init__(self, out: Path, epoch: int) -> None:
        super().__init__(threads=1, jobs=1)
        self._out, self._epoch = out, epoch

    def write(self, checkpoint: Checkpoint) -> None:
        """Begin to write a checkpoint, once the one before is written.

        Raises:
            TrainingError: The one before could not be written.
        """
        self.submit(lambda: self._write(checkpoint))

    def kept(self) -> str:
        """Say which epoch's checkpoint is whole."""
        with contextlib.suppress(TrainingError):  # then the one before is
            self.finish()
        return self._kept()

    def _kept(self) -> str:
        if self._epoch == 0:
            return "no epoch was finished"
        return f"the checkpoint of epoch {self._epoch} is intact"

    def _write(self, checkpoint: Checkpoint) -> None:
        try:
            write_checkpoint(self._out, checkpoint)
        except OSError as error:
            raise TrainingError(
                f"cannot write the checkpoint of epoch {checkpoint.epoch} in {str(self._out)!r}: "
                f"{error}; {self._kept()}: make room and resume"
            ) from error
        self._epoch = checkpoint.epoch

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, traceback)
        try:
            self.finish()
        except TrainingError as unwritten:  # the block's own error comes first
            _log.warning("%s", unwritten)
