"""A table's folder: what it is a table of, and a folder for each run with its metrics."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rlr_fast.config import RLRConfig, TrainConfig
from rlr_fast.data import Contents, DataSet, changed_contents, describe_images
from rlr_fast.data.files import alone_in, write_atomically
from rlr_fast.inference.metrics import HEADINGS
from rlr_fast.training.run_dir import TrainingError, changed_settings

SETTINGS_FILE = "settings.json"
METRICS_FILE = "metrics.json"
RUNS = "runs"

_SETTINGS = {"model": dict, "recipe": dict, "data": dict}
_METRICS = {
    **{"settings": dict, "mean": dict, "classes": dict},
    **{"protocol": dict, "environment": dict, "failures": list},
}

_KINDS: dict[type, str] = {dict: "an object", list: "a list", str: "a text"}

_log = logging.getLogger(__name__)


class TableFolder:
    """The folder of a table.

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
        self._told: set[Path] = set()

    def check(self) -> None:
        """Refuse a folder that holds another table, as far as names and sizes of files tell.

        Raises:
            TrainingError: It does, or cannot be read.
        """
        record, previous = self._record(), self._previous()
        if previous is not None:
            _refuse_changes(self.out, _filled(previous, record), record)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other commands out of the folder while the block runs.

        Raises:
            TrainingError: Another command works in it, or it cannot be made.
        """
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(alone_in(self.out))
            except BlockingIOError as error:
                raise TrainingError(
                    f"another command works in {self.out}; wait for it, or choose another --out"
                ) from error
            except OSError as error:
                raise TrainingError(
                    f"cannot write the table in {str(self.out)!r}: {error}"
                ) from error
            yield

    def claim(self, contents: Contents) -> None:
        """Write what the table is, or refuse a folder that holds another.

        What an older version did not record yet is filled in.

        Args:
            contents: Of the data set's files.

        Raises:
            TrainingError: It does, or cannot be read.
            OSError: It cannot be written.
        """
        self.data["contents"] = contents.digests
        record = self._record()
        previous = self._previous()
        filled = record if previous is None else _filled(previous, record)
        _refuse_changes(self.out, filled, record)
        if filled != previous:
            write_atomically(self.out / SETTINGS_FILE, json.dumps(filled, indent=2))

    def run(self, row: str, seed: int) -> Path:
        """Return the folder of a run."""
        return self.out / RUNS / f"{row}-seed{seed}"

    def keep(self, row: str, seed: int, metrics: dict[str, Any]) -> None:
        """Write a finished run's metrics, with the settings that they belong to."""
        values = metrics | {"settings": self._settings(row, seed)}
        write_atomically(self.run(row, seed) / METRICS_FILE, json.dumps(values, indent=2))

    def metrics(self, row: str, seed: int) -> dict[str, Any] | None:
        """Return a finished run's metrics; None where they are missing or, as is told, damaged.

        Raises:
            TrainingError: They are those of other settings.
            OSError: They cannot be read.
        """
        place = self.run(row, seed)
        path = place / METRICS_FILE
        try:
            values = _read(path, _METRICS)
            _check_metrics(values, self.classes)
        except FileNotFoundError:
            return None
        except ValueError as error:
            if path not in self._told:
                _log.warning("%s is damaged and counts as missing: %s", path, error)
            self._told.add(path)
            return None
        _refuse_changes(place, values["settings"], self._settings(row, seed))
        return values

    def finished(self, row: str) -> dict[int, dict[str, Any]]:
        """Return the metrics of a row's finished runs, by seed, whoever asked for them."""
        found = {}
        for place in (self.out / RUNS).glob(f"{row}-seed*"):
            seed = place.name.removeprefix(f"{row}-seed")
            values = self.metrics(row, int(seed)) if seed.isdecimal() else None
            if values is not None:
                found[int(seed)] = values
        return dict(sorted(found.items()))

    def _record(self) -> dict[str, Any]:
        recipe = dataclasses.asdict(self.recipe)
        del recipe["seed"]  # other seeds may be added
        model = self.base.to_dict()
        return _plain({"table": self.table, "model": model, "recipe": recipe, "data": self.data})

    def _previous(self) -> dict[str, Any] | None:
        if self.out.exists() and not self.out.is_dir():
            raise TrainingError(f"{self.out} is a file; a table needs a folder")
        path = self.out / SETTINGS_FILE
        try:
            previous = _read(path, {"table": str, **_SETTINGS})
            _check_contents(previous)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise TrainingError(f"{path} cannot be read: {error}") from error
        if previous["table"] != self.table:
            raise TrainingError(
                f"{self.out} holds table {previous['table']}; choose another --out for table "
                f"{self.table}"
            )
        return previous

    def _settings(self, row: str, seed: int) -> dict[str, Any]:
        return {
            "model": self.configs[row].to_dict(),
            "recipe": dataclasses.asdict(dataclasses.replace(self.recipe, seed=seed)),
            "data": self.data,
        }


def _refuse_changes(place: Path, previous: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    old = dict(previous["data"])
    contents = old.pop("contents", None)
    changed = changed_settings({**previous, "data": old}, now)
    if not changed and contents is not None and "contents" in now["data"]:
        changed = changed_contents(contents, now["data"]["contents"])
    if changed:
        raise TrainingError(
            f"{place} was made with other settings or data: {'; '.join(changed)}. Choose another "
            "--out"
        )


def _filled(previous: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Add what was not recorded: the defaults of settings that came later, and the data of now."""
    model, recipe = _plain(RLRConfig().to_dict()), _plain(dataclasses.asdict(TrainConfig()))
    del recipe["seed"]
    return {
        **previous,
        "model": model | previous["model"],
        "recipe": recipe | previous["recipe"],
        "data": now["data"] | previous["data"],
    }


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives them back."""
    return dict(json.loads(json.dumps(values)))


# The shape of what is read


def _read(path: Path, parts: Mapping[str, type]) -> dict[str, Any]:
    values = json.loads(path.read_text(encoding="utf-8"))
    _check_parts("it", values, parts)
    return dict(values)


def _check_parts(name: str, values: Any, parts: Mapping[str, type]) -> None:
    if not isinstance(values, dict) or not values.keys() >= parts.keys():
        raise ValueError(f"{name} must be an object" + " of " * bool(parts) + ", ".join(parts))
    for part, kind in parts.items():
        if not isinstance(values[part], kind):
            found = json.dumps(values[part])
            found = found if len(found) < 40 else f"{found[:40]} …"
            raise ValueError(f"{part} must be {_KINDS[kind]}, got {found}")


def _check_contents(settings: Mapping[str, Any]) -> None:
    contents = settings["data"].get("contents", {})
    _check_parts("contents", contents, {})
    for name, digests in contents.items():
        _check_parts(f"contents of {name}", digests, {})


def _check_metrics(values: Mapping[str, Any], classes: set[str]) -> None:
    _check_parts("settings", values["settings"], _SETTINGS)
    _check_contents(values["settings"])
    if not all(isinstance(failure, str) for failure in values["failures"]):
        raise ValueError("failures must be texts")
    if values["classes"].keys() != classes:
        raise ValueError(f"its classes must be {', '.join(sorted(classes))}")
    for name, figures in (("the mean", values["mean"]), *values["classes"].items()):
        _check_parts(name, figures, {})
        for key in HEADINGS:
            if key not in figures or not _is_figure(figures[key]):
                raise ValueError(f"{key} of {name} must be a number or null")


def _is_figure(value: Any) -> bool:
    if value is None:
        return True
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
