"""A table of the paper, run: every row and seed trained and measured, in folders of their own."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from rlr_fast.backbone import BackboneWeightsError
from rlr_fast.config import RLRConfig, TrainConfig, from_dict, suggest
from rlr_fast.data import DataSet
from rlr_fast.evaluate import check_masks, evaluate
from rlr_fast.feature_cache import CacheError, Placement
from rlr_fast.files import write_atomically
from rlr_fast.functional import Backend, BackendError
from rlr_fast.inference import check_precision
from rlr_fast.metrics import HEADINGS
from rlr_fast.model import CheckpointError, RLRModel
from rlr_fast.paper_report import REPORT_FILE, write_report
from rlr_fast.paper_tables import LEVELS, PER_LEVEL, Row, Table
from rlr_fast.run_folder import TrainingError, changed_settings
from rlr_fast.time_left import RunsBar
from rlr_fast.train import describe_images, train

SETTINGS_FILE = "settings.json"
METRICS_FILE = "metrics.json"
RUNS = "runs"

# What ends a run, and not the table.
_RUN_ERRORS = (
    ValueError,
    OSError,
    TrainingError,
    CacheError,
    CheckpointError,
    BackendError,
    BackboneWeightsError,
    torch.OutOfMemoryError,
)


@dataclass(frozen=True)
class TableResult:
    """What `run_table` leaves.

    Attributes:
        text: The table as Markdown.
        failed: Runs that failed, by name; the reasons were told.
        left_out: Files that could not be read, a line each.
        seconds: Where the time of this call went: ``features``, ``train``, ``rest``.
    """

    text: Path
    failed: list[str]
    left_out: list[str]
    seconds: dict[str, float]


def configure(table: Table, row: Row, base: RLRConfig) -> RLRConfig:
    """Return a row's configuration: the base with the row's changes.

    Raises:
        ValueError: `RLRConfig` has no such field, the base lacks a level's value, or the result
            breaks a rule.
    """
    values = dict(row.changes)
    levels = values.get("out_indices", base.out_indices)
    try:
        for name in PER_LEVEL:
            if name in values:
                values[name] = _of_levels(name, LEVELS, values[name], levels)
            elif "out_indices" in values:
                values[name] = _of_levels(name, base.out_indices, getattr(base, name), levels)
        return from_dict(RLRConfig, values, base)
    except ValueError as error:
        raise ValueError(f"table {table.name}, row {row.name}: {error}") from error


def _of_levels(
    name: str, known: Sequence[int], values: Sequence[Any], levels: Sequence[int]
) -> tuple[Any, ...]:
    by_level = dict(zip(known, values, strict=True))
    if not by_level.keys() >= set(levels):
        raise ValueError(
            f"{name} must have a value for each of out_indices={tuple(levels)}, the base has them "
            f"for {tuple(known)}"
        )
    return tuple(by_level[level] for level in levels)


def run_table(
    table: Table,
    base: RLRConfig,
    recipe: TrainConfig,
    data: DataSet,
    out: Path,
    *,
    device: torch.device,
    seeds: int = 3,
    only: Sequence[str] | None = None,
    backend: Backend = "auto",
    cache_root: Path | None = None,
    cache: Placement | Literal["none"] = "auto",
    compiled: bool = False,
    grad_checkpointing: bool = False,
    piece: int | None = None,
    workers: int | None = None,
    quiet: bool = False,
    tell: Callable[[str], object] = print,
) -> TableResult:
    """Train and evaluate every row of a table with several seeds, and write the table.

    What is finished in ``out`` is not done again, and a run that was stopped goes on from its last
    epoch. ``table.md``, ``table.csv`` and ``table.json`` are written after each run, from all that
    is finished in ``out``. Every row has its first seed before any has its second.

    Args:
        table: The table.
        base: The model that the rows vary.
        recipe: Of every run; its seed is the first of them.
        data: Trained on, and tested on.
        out: Folder of the table, and of its runs.
        device: Where to train and to evaluate.
        seeds: Runs of each row.
        only: Names of the rows to run; None is all.
        backend: See `rlr_fast.train.train`, also for the next six.
        cache_root: Folder of feature caches.
        cache: Where the features lie.
        compiled: Compile the reconstructors.
        grad_checkpointing: Less memory for more time.
        piece: Images of a step in memory at once.
        workers: Threads that decode images.
        quiet: No progress bar.
        tell: Called with a line after each run.

    Raises:
        ValueError: A row does not fit the base, or the data cannot be trained or tested on; found
            before any run.
        BackboneWeightsError: The backbone's weights cannot be had.
        TrainingError: ``out`` holds a table of other settings.
        OSError: The table cannot be written; finished runs are kept.
    """
    configs = {row.name: configure(table, row, base) for row in table.rows}
    _refuse_equal(table, configs)
    rows = _chosen(table, only)
    data.require_train()
    data.require_test()
    check_masks(data)
    check_precision(recipe.precision, device)
    RLRModel(configs[rows[0].name])  # fails without the backbone's weights

    folder = _Folder(out, table, configs, recipe, data)
    folder.claim(base)
    wanted = range(recipe.seed, recipe.seed + seeds)
    runs = [(row.name, seed) for seed in wanted for row in rows]
    failed: list[str] = []
    todo = [each for each in runs if folder.metrics(*each) is None]
    if len(todo) < len(runs):
        tell(f"finished before: {len(runs) - len(todo)} of {len(runs)} runs")

    def report() -> None:
        finished = {row.name: folder.finished(row.name) for row in table.rows}
        write_report(out, table, base, recipe, data, wanted, finished)

    def run(row: str, seed: int, bar: RunsBar) -> str:
        place = folder.run(row, seed)
        train(
            configs[row],
            dataclasses.replace(recipe, seed=seed),
            data,
            place,
            device=device,
            resume=True,
            backend=backend,
            cache_root=cache_root,
            cache=cache,
            compiled=compiled,
            grad_checkpointing=grad_checkpointing,
            piece=piece,
            workers=workers,
            quiet=True,
            progress=bar.progress,
        )
        model: RLRModel = RLRModel.from_pretrained(place, backend=backend)
        result = evaluate(
            model.to(device), data, workers=workers, progress=lambda n: bar.progress("eval", n)
        )
        folder.keep(row, seed, json.loads(result.to_json()))
        return ", ".join(f"{HEADINGS[k]} {100 * v:.1f}" for k, v in result.mean.items())

    report()
    train_images = sum(map(len, data.train.values())) * recipe.epochs
    test_images = sum(map(len, data.test.values()))
    kinds = [row for row, _ in todo]
    with RunsBar(f"table {table.name}", kinds, train_images, test_images, quiet) as bar:
        for row, seed in todo:
            name = f"{row}, seed {seed}"
            bar.begin(name)
            try:
                figures = run(row, seed, bar)
            except _RUN_ERRORS as error:
                failed.append(name)
                bar.end(finished=False)
                bar.tell(tell, f"{name}: failed: {error}")
                continue
            finally:
                if compiled:
                    torch.compiler.reset()  # else it gives up after the eighth model
            bar.end(finished=True)
            bar.tell(tell, f"{name}: {figures}")
            report()
    kept = [values for each in runs if (values := folder.metrics(*each)) is not None]
    left_out = sorted({line for values in kept for line in values["failures"]})
    return TableResult(out / REPORT_FILE, failed, left_out, bar.clock.seconds())


def _chosen(table: Table, only: Sequence[str] | None) -> list[Row]:
    known = [row.name for row in table.rows]
    for name in only or ():
        if name not in known:
            raise ValueError(f"table {table.name} has no row {name!r}; {suggest(name, known)}")
    return [row for row in table.rows if only is None or row.name in only]


def _refuse_equal(table: Table, configs: Mapping[str, RLRConfig]) -> None:
    seen: dict[RLRConfig, str] = {}
    for name, config in configs.items():
        if config in seen:
            raise ValueError(
                f"table {table.name}: with these settings the rows {seen[config]} and {name} are "
                "the same model"
            )
        seen[config] = name


class _Folder:
    """What a table's folder holds: its settings, and a folder for each run with its metrics."""

    def __init__(
        self,
        out: Path,
        table: Table,
        configs: Mapping[str, RLRConfig],
        recipe: TrainConfig,
        data: DataSet,
    ) -> None:
        self.out, self.table, self.configs, self.recipe = out, table, configs, recipe
        self.classes = set(data.classes)
        test = describe_images(data, data.test)
        self.data = describe_images(data, data.train) | {
            "test_images": test["images"],
            "test_files_digest": test["files_digest"],
        }

    def claim(self, base: RLRConfig) -> None:
        """Write what the table is, or refuse a folder that holds another.

        Raises:
            TrainingError: It does, or cannot be read.
            OSError: It cannot be written.
        """
        recipe = dataclasses.asdict(self.recipe)
        del recipe["seed"]  # other seeds may be added
        record = {
            "table": self.table.name,
            "model": dataclasses.asdict(base),
            "recipe": recipe,
            "data": self.data,
        }
        path = self.out / SETTINGS_FILE
        if self.out.exists() and not self.out.is_dir():
            raise TrainingError(f"{self.out} is a file; a table needs a folder")
        try:
            previous = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(previous, dict) or not previous.keys() >= record.keys():
                raise ValueError(f"it must have {', '.join(record)}")
        except FileNotFoundError:
            self.out.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(record, indent=2))
            return
        except (OSError, ValueError) as error:
            raise TrainingError(f"{path} cannot be read: {error}") from error
        if previous["table"] != self.table.name:
            raise TrainingError(
                f"{self.out} holds table {previous['table']}; choose another --out for table "
                f"{self.table.name}"
            )
        _refuse_changes(self.out, previous, record)

    def run(self, row: str, seed: int) -> Path:
        """Return the folder of a run."""
        return self.out / RUNS / f"{row}-seed{seed}"

    def keep(self, row: str, seed: int, metrics: dict[str, Any]) -> None:
        """Write a finished run's metrics, with the settings that they belong to."""
        values = metrics | {"settings": self._settings(row, seed)}
        write_atomically(self.run(row, seed) / METRICS_FILE, json.dumps(values, indent=2))

    def metrics(self, row: str, seed: int) -> dict[str, Any] | None:
        """Return a finished run's metrics; None where they are missing or not complete.

        Raises:
            TrainingError: They are those of other settings.
        """
        place = self.run(row, seed)
        try:
            values = json.loads((place / METRICS_FILE).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        complete = (
            isinstance(values, dict)
            and values.keys() >= {"settings", "mean", "classes", "protocol", "failures"}
            and values["settings"].keys() >= {"model", "recipe", "data"}
            and values["classes"].keys() == self.classes
            and all(m.keys() >= HEADINGS.keys() for m in values["classes"].values())
        )
        if not complete:
            return None
        _refuse_changes(place, values["settings"], self._settings(row, seed))
        return dict(values)

    def finished(self, row: str) -> dict[int, dict[str, Any]]:
        """Return the metrics of a row's finished runs, by seed, whoever asked for them."""
        found = {}
        for place in (self.out / RUNS).glob(f"{row}-seed*"):
            seed = place.name.removeprefix(f"{row}-seed")
            values = self.metrics(row, int(seed)) if seed.isdecimal() else None
            if values is not None:
                found[int(seed)] = values
        return dict(sorted(found.items()))

    def _settings(self, row: str, seed: int) -> dict[str, Any]:
        return {
            "model": dataclasses.asdict(self.configs[row]),
            "recipe": dataclasses.asdict(dataclasses.replace(self.recipe, seed=seed)),
            "data": self.data,
        }


def _refuse_changes(place: Path, previous: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    changed = changed_settings(previous, now)
    if changed:
        raise TrainingError(
            f"{place} was made with other settings: {'; '.join(changed)}. Choose another --out"
        )
