"""A table's folder: what it is a table of, and a folder for each run with its metrics."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlr_fast.config import RLRConfig, TrainConfig
from rlr_fast.data import DataSet
from rlr_fast.data.contents import changed_files, describe_images, file_digests
from rlr_fast.data.records import read_record
from rlr_fast.files import lock_folder, write_atomically
from rlr_fast.inference.evaluate import METRICS_FILE
from rlr_fast.inference.metrics import HEADINGS
from rlr_fast.training.run_dir import TrainingError, changed_settings

SETTINGS_FILE = "settings.json"
RUNS = "runs"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """What a run or a table was made with, as plain values.

    Attributes:
        model: Fields of `RLRConfig`.
        recipe: Fields of `TrainConfig`; a table's has no seed.
        data: What `describe_images` says of the training and test images.
        files: Of `file_digests`; older versions wrote none.
    """

    model: dict[str, Any]
    recipe: dict[str, Any]
    data: dict[str, Any]
    files: dict[str, dict[str, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class TableSettings(Settings):
    """The content of ``settings.json``.

    Attributes:
        table: The table's name.
    """

    table: str = field(kw_only=True)


@dataclass(frozen=True)
class Metrics:
    """The content of ``metrics.json``: an `Evaluation`, and the settings that it belongs to.

    Attributes:
        settings: Of the run.
        mean: Metrics over the classes; None is not defined.
        classes: Metrics of each class.
        protocol: How they were measured.
        environment: Versions and device.
        failures: Files that could not be read and were left out.
    """

    settings: Settings
    mean: dict[str, float | None]
    classes: dict[str, dict[str, float | None]]
    protocol: dict[str, Any]
    environment: dict[str, Any]
    failures: list[str]


class TableFolder:
    """The folder of a table.

    A folder made from other data is refused: names and sizes of the images always count, and where
    the data set still lies where it lay, names, labels, sizes and times of all files do.

    Args:
        out: Where it lies.
        table: The table's name.
        base: The model that the rows vary.
        configs: The model of each row, by name.
        recipe: Of every run, but for its seed.
        data: Trained on, and tested on.
    """

    def __init__(
        self,
        out: Path,
        table: str,
        base: RLRConfig,
        configs: Mapping[str, RLRConfig],
        recipe: TrainConfig,
        data: DataSet,
    ) -> None:
        self.out, self.table, self.base, self.configs = out, table, base, configs
        self.recipe = recipe
        self.classes = set(data.classes)
        test = describe_images(data, data.test)
        self.data = describe_images(data, data.train) | {
            "test_images": test["images"],
            "test_files_digest": test["files_digest"],
        }
        self.files = file_digests(data)
        self._told: set[Path] = set()

    def check(self) -> None:
        """Refuse a folder that holds another table.

        Raises:
            TrainingError: It does, or cannot be read.
        """
        self._merged()

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other commands out of the folder while the block runs.

        Raises:
            TrainingError: Another command works in it, or it cannot be made.
        """
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(lock_folder(self.out))
            except BlockingIOError as error:
                raise TrainingError(
                    f"another command works in {self.out}; wait for it, or choose another --out"
                ) from error
            except OSError as error:
                raise TrainingError(
                    f"cannot write the table in {str(self.out)!r}: {error}"
                ) from error
            yield

    def open(self) -> None:
        """Write what the table is, or refuse a folder that holds another.

        What an older version did not record yet is filled in.

        Raises:
            TrainingError: It does, or cannot be read.
            OSError: It cannot be written.
        """
        merged, previous = self._merged()
        if merged != previous:
            content = json.dumps(dataclasses.asdict(merged), indent=2)
            write_atomically(self.out / SETTINGS_FILE, content)

    def run(self, row: str, seed: int) -> Path:
        """Return the folder of a run."""
        return self.out / RUNS / f"{row}-seed{seed}"

    def save(self, row: str, seed: int, metrics: dict[str, Any]) -> None:
        """Write a finished run's metrics, with the settings that they belong to."""
        values = metrics | {"settings": dataclasses.asdict(self._settings(row, seed))}
        write_atomically(self.run(row, seed) / METRICS_FILE, json.dumps(values, indent=2))

    def metrics(self, row: str, seed: int) -> Metrics | None:
        """Return a finished run's metrics; None where they are missing or, as is told, damaged.

        Raises:
            TrainingError: They are those of other settings.
            OSError: They cannot be read.
        """
        place = self.run(row, seed)
        path = place / METRICS_FILE
        try:
            metrics = read_record(Metrics, path)
            self._check_complete(metrics)
        except FileNotFoundError:
            return None
        except ValueError as error:
            if path not in self._told:
                _log.warning("%s is damaged and counts as missing: %s", path, error)
            self._told.add(path)
            return None
        _refuse_changes(place, metrics.settings, self._settings(row, seed))
        return metrics

    def finished(self, row: str) -> dict[int, Metrics]:
        """Return the metrics of a row's finished runs, by seed, whoever asked for them."""
        found = {}
        for place in (self.out / RUNS).glob(f"{row}-seed*"):
            seed = place.name.removeprefix(f"{row}-seed")
            values = self.metrics(row, int(seed)) if seed.isdecimal() else None
            if values is not None:
                found[int(seed)] = values
        return dict(sorted(found.items()))

    def _check_complete(self, metrics: Metrics) -> None:
        if metrics.classes.keys() != self.classes:
            raise ValueError(f"its classes must be {', '.join(sorted(self.classes))}")
        for name, values in (("the mean", metrics.mean), *metrics.classes.items()):
            missing = HEADINGS.keys() - values.keys()
            if missing:
                raise ValueError(f"{name} has no {', '.join(sorted(missing))}")

    def _merged(self) -> tuple[TableSettings, TableSettings | None]:
        """Return the table's settings, and those on disk; refuse a folder where they differ."""
        recipe = dataclasses.asdict(self.recipe)
        del recipe["seed"]  # other seeds may be added
        now = TableSettings(
            _plain(dataclasses.asdict(self.base)), recipe, self.data, self.files, table=self.table
        )
        previous = self._previous()
        if previous is None:
            return now, None
        defaults, default_recipe = (dataclasses.asdict(c) for c in (RLRConfig(), TrainConfig()))
        del default_recipe["seed"]
        merged = dataclasses.replace(
            previous,
            model=_plain(defaults) | previous.model,
            recipe=default_recipe | previous.recipe,
            data=now.data | {k: v for k, v in previous.data.items() if k in now.data},
            files=previous.files or now.files,
        )
        _refuse_changes(self.out, merged, now)
        return merged, previous

    def _previous(self) -> TableSettings | None:
        if self.out.exists() and not self.out.is_dir():
            raise TrainingError(f"{self.out} is a file; a table needs a folder")
        path = self.out / SETTINGS_FILE
        try:
            previous = read_record(TableSettings, path)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise TrainingError(f"{path} cannot be read: {error}") from error
        if previous.table != self.table:
            raise TrainingError(
                f"{self.out} holds table {previous.table}; choose another --out for table "
                f"{self.table}"
            )
        return previous

    def _settings(self, row: str, seed: int) -> Settings:
        return Settings(
            dataclasses.asdict(self.configs[row]),
            dataclasses.asdict(dataclasses.replace(self.recipe, seed=seed)),
            self.data,
            self.files,
        )


def _refuse_changes(place: Path, previous: Settings, now: Settings) -> None:
    known = {k: v for k, v in previous.data.items() if k in now.data}
    changed = changed_settings(
        dataclasses.asdict(dataclasses.replace(previous, data=known)), dataclasses.asdict(now)
    )
    # A copy elsewhere has times of its own.
    in_place = Path(known.get("root", "")).absolute() == Path(now.data["root"]).absolute()
    if not changed and previous.files and in_place:
        changed = changed_files(previous.files, now.files)
    if changed:
        raise TrainingError(
            f"{place} was made with other settings or data: {'; '.join(changed)}. Choose another "
            "--out"
        )


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values as JSON gives them back."""
    return dict(json.loads(json.dumps(values)))
