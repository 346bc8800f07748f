"""A table of the paper, run: every row and seed trained and measured, in folders of their own."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlr_fast.config import (
    InferenceExecution,
    RLRConfig,
    TrainConfig,
    TrainExecution,
    from_dict,
    suggest,
)
from rlr_fast.data import DataSet, read_contents
from rlr_fast.functional import BackendError
from rlr_fast.inference.batches import load_model
from rlr_fast.inference.evaluate import check_masks, evaluate
from rlr_fast.inference.metrics import HEADINGS
from rlr_fast.models.backbone import BackboneWeightsError
from rlr_fast.models.checkpoint import CheckpointError
from rlr_fast.models.environment import start_device
from rlr_fast.models.precision import check_precision
from rlr_fast.models.rlr import RLRModel
from rlr_fast.paper.folder import TableFolder
from rlr_fast.paper.report import REPORT_FILE, write_report
from rlr_fast.paper.tables import LEVELS, PER_LEVEL, Row, Table
from rlr_fast.paper.time_left import RunsBar
from rlr_fast.training.feature_cache import CacheError
from rlr_fast.training.progress import progress_bar
from rlr_fast.training.run_dir import TrainingError
from rlr_fast.training.train import train

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
    execution: TrainExecution = TrainExecution(),
    *,
    seeds: int = 3,
    only: Sequence[str] | None = None,
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
        execution: Where and how to train, and where to evaluate.
        seeds: Runs of each row.
        only: Names of the rows to run; None is all.
        quiet: No progress bar.
        tell: Called with a line after each run.

    Raises:
        ValueError: A row does not fit the base, or the data cannot be trained or tested on, or
            not read; found before any run.
        BackendError: The backend cannot run on the device.
        BackboneWeightsError: The backbone's weights cannot be had.
        TrainingError: ``out`` holds a table of other settings or other data, another process works
            in it, or the table cannot be written; finished runs are kept.
    """
    configs = {row.name: configure(table, row, base) for row in table.rows}
    _refuse_equal(table, configs)
    rows = _chosen(table, only)
    data.require_train()
    data.require_test()
    check_masks(data)
    check_precision(recipe.precision, start_device(execution))
    RLRModel(configs[rows[0].name])  # fails without the backbone's weights

    scoring = InferenceExecution(
        device=execution.device, backend=execution.backend, workers=execution.workers
    )
    folder = TableFolder(out, table.name, base, configs, recipe, data)
    folder.check()
    wanted = range(recipe.seed, recipe.seed + seeds)
    runs = [(row.name, seed) for seed in wanted for row in rows]

    def report(unreadable: Sequence[str]) -> list[str]:
        finished = {row.name: folder.finished(row.name) for row in table.rows}
        results = [values for found in finished.values() for values in found.values()]
        # A run may have met a file that could not be read for a while.
        met = [failure for values in results for failure in values["failures"]]
        left_out = list(dict.fromkeys([*unreadable, *met]))
        try:
            write_report(out, table, base, recipe, data, wanted, finished, left_out)
        except OSError as error:
            raise TrainingError(
                f"cannot write the table in {str(out)!r}: {error}; finished runs are kept, and the "
                "same command goes on"
            ) from error
        return left_out

    def run(row: str, seed: int, bar: RunsBar) -> str:
        place = folder.run(row, seed)
        train(
            configs[row],
            dataclasses.replace(recipe, seed=seed),
            data,
            place,
            execution,
            resume=True,
            quiet=True,
            progress=bar.progress,
        )
        model = load_model(place, scoring)
        result = evaluate(model, data, scoring, progress=lambda n: bar.progress("eval", n))
        folder.keep(row, seed, json.loads(result.to_json()))
        return ", ".join(f"{HEADINGS[k]} {100 * v:.1f}" for k, v in result.mean.items())

    failed: list[str] = []
    with folder.alone():
        unreadable = _read_through(folder, data, execution.workers, quiet)
        if unreadable:
            more = f", and {len(unreadable) - 1} more" if len(unreadable) > 1 else ""
            tell(f"left out: {unreadable[0]}{more}")
        todo = [each for each in runs if folder.metrics(*each) is None]
        if len(todo) < len(runs):
            tell(f"finished before: {len(runs) - len(todo)} of {len(runs)} runs")
        left_out = report(unreadable)
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
                    if execution.compile:
                        torch.compiler.reset()  # else it gives up after the eighth model
                bar.end(finished=True)
                bar.tell(tell, f"{name}: {figures}")
                left_out = report(unreadable)
    return TableResult(out / REPORT_FILE, failed, left_out, bar.clock.seconds())


def _read_through(
    folder: TableFolder, data: DataSet, workers: int | None, quiet: bool
) -> list[str]:
    """Hold the data set's files against those of the table; return what cannot be read."""
    images = sum(len(samples) for split in (data.train, data.test) for samples in split.values())
    with progress_bar("reading", images, quiet) as bar:
        contents = read_contents(data, workers, bar.update)
    folder.claim(contents)
    return contents.unreadable


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
