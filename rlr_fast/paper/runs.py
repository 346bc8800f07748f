"""A table of the paper, run: every row and seed trained and measured, in folders of their own."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from rlr_fast.config import (
    PER_LEVEL,
    InferenceExecution,
    Level,
    RLRConfig,
    TrainConfig,
    TrainExecution,
    check_seed,
    from_dict,
    per_level,
    suggest,
)
from rlr_fast.data import DataSet
from rlr_fast.data.contents import unreadable_files
from rlr_fast.functional import BackendError
from rlr_fast.inference.evaluate import check_masks, evaluate
from rlr_fast.inference.metrics import HEADINGS
from rlr_fast.models.backbone_weights import BackboneWeightsError
from rlr_fast.models.checkpoint import CheckpointError
from rlr_fast.models.environment import start_device
from rlr_fast.models.precision import check_precision
from rlr_fast.models.rlr import RLRModel
from rlr_fast.paper.folder import TableFolder
from rlr_fast.paper.report import REPORT_FILE, write_report
from rlr_fast.paper.tables import LEVELS, Row, Table
from rlr_fast.pictures.batches import load_model
from rlr_fast.training.feature_cache import CacheError
from rlr_fast.training.progress import progress_bar
from rlr_fast.training.run_dir import TrainingError, check_outside
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
    """

    text: Path
    failed: list[str]
    left_out: list[str]


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
                known = per_level(getattr(base, name), len(base.out_indices))
                values[name] = _of_levels(name, base.out_indices, known, levels)
        return from_dict(RLRConfig, values, base)
    except ValueError as error:
        raise ValueError(f"table {table.name}, row {row.name}: {error}") from error


def _of_levels(
    name: str, known: Sequence[Level], values: Sequence[Any], levels: Sequence[Level]
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
        TrainingError: ``out`` lies among the images or holds a table of other settings or other
            data, another process works in it, or the table cannot be written; finished runs are
            kept.
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
    check_outside(out, data, "table")
    folder = TableFolder(out, table.name, base, configs, recipe, data)
    folder.check()
    wanted = range(recipe.seed, recipe.seed + seeds)
    check_seed(wanted[-1])
    runs = [(row.name, seed) for seed in wanted for row in rows]

    def report(unreadable: Sequence[str]) -> list[str]:
        finished = {row.name: folder.finished(row.name) for row in table.rows}
        results = [metrics for runs in finished.values() for metrics in runs.values()]
        # A run may have met a file that could not be read for a while.
        met = [failure for metrics in results for failure in metrics.failures]
        left_out = list(dict.fromkeys([*unreadable, *met]))
        try:
            write_report(out, table, base, recipe, data, wanted, finished, left_out)
        except OSError as error:
            raise TrainingError(
                f"cannot write the table in {str(out)!r}: {error}; finished runs are kept, and the "
                "same command goes on"
            ) from error
        return left_out

    def run(row: str, seed: int, progress: Callable[[str, int], object]) -> str:
        place = folder.run(row, seed)
        train(
            configs[row],
            dataclasses.replace(recipe, seed=seed),
            data,
            place,
            execution,
            resume=True,
            quiet=True,
            progress=progress,
        )
        model = load_model(place, scoring)
        result = evaluate(model, data, scoring, progress=lambda n: progress("evaluation", n))
        folder.save(row, seed, json.loads(result.to_json()))
        return ", ".join(f"{HEADINGS[k]} {100 * v:.1f}" for k, v in result.mean.items())

    failed: list[str] = []
    images = sum(map(len, data.train.values())) * recipe.epochs
    with folder.lock():
        tested = sum(map(len, data.test.values()))
        with progress_bar("reading", images // recipe.epochs + tested, quiet) as bar:
            unreadable = unreadable_files(data, execution.workers, bar.update)
        folder.open()
        if unreadable:
            more = f", and {len(unreadable) - 1} more" if len(unreadable) > 1 else ""
            tell(f"left out: {unreadable[0]}{more}")
        todo = [each for each in runs if folder.metrics(*each) is None]
        if len(todo) < len(runs):
            tell(f"finished before: {len(runs) - len(todo)} of {len(runs)} runs")
        left_out = report(unreadable)
        with _runs_bar(len(todo) * images, quiet) as bar:
            for number, (row, seed) in enumerate(todo, start=1):
                name = f"{row}, seed {seed}"
                title = f"table {table.name}, run {number} of {len(todo)} ({name})"
                try:
                    line = run(row, seed, _follow(bar, title, images // recipe.epochs))
                except _RUN_ERRORS as error:
                    failed.append(name)
                    line = f"failed: {error}"
                else:
                    left_out = report(unreadable)
                finally:
                    if execution.compile:
                        torch.compiler.reset()  # else it gives up after the eighth model
                bar.update(number * images - bar.n)
                with tqdm.external_write_mode():
                    tell(f"{name}: {line}")
    return TableResult(out / REPORT_FILE, failed, left_out)


def _runs_bar(images: int, quiet: bool) -> tqdm:
    """Return a bar of the training images of all runs and epochs, with the time left."""
    shape = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
    return tqdm(total=images, bar_format=shape, disable=quiet, leave=False)


def _follow(bar: tqdm, title: str, an_epoch: int) -> Callable[[str, int], None]:
    """Return a function (phase, images) that moves the bar by a run's training."""
    start = bar.n

    def progress(phase: str, images: int) -> None:
        if phase == "train":
            bar.update(images)
            phase = f"epoch {1 + (bar.n - start - 1) // an_epoch}"
        bar.set_description_str(f"{title}, {phase}", refresh=False)

    return progress


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
