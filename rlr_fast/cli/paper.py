"""``rlr-fast paper``: the paper's tables, run."""

from __future__ import annotations

import dataclasses
import sys
from typing import Literal

from rlr_fast.cli import flags
from rlr_fast.config import PRESETS, RLRConfig, TrainConfig, TrainExecution, from_dict

TableName = Literal["1", "2", "3", "4", "5", "S1", "S2", "windows", "perturbation"]


def paper(
    table: TableName,
    data: flags.Data,
    /,
    *,
    out: flags.Out,
    seeds: flags.Positive = 3,
    only: tuple[str, ...] | None = None,
    config: flags.Config | None = None,
    preset: flags.Preset = "paper",
    layout: flags.Layout = "auto",
    classes: flags.Classes = None,
    quiet: flags.Quiet = False,
    model: flags.Model = flags.NONE_GIVEN,
    recipe: flags.Recipe = flags.NONE_GIVEN,
    execution: flags.TrainExecution = flags.NONE_GIVEN,
) -> int:
    """Train and measure all rows of a table of the paper, beside its figures.

    Args:
        table: Name of the table.
        seeds: Runs of each row: with --seed, the seed after it, and so on.
        only: Only these rows.
    """
    from rlr_fast.cli.common import report_failures
    from rlr_fast.data import read_dataset
    from rlr_fast.paper import TABLES, run_table

    base = PRESETS[preset]
    # The paper trains on every image; the flag may say otherwise, a preset may not.
    base_recipe = dataclasses.replace(base.train, calibration_share=0.0)
    result = run_table(
        TABLES[table],
        from_dict(RLRConfig, model, base.model),
        from_dict(TrainConfig, recipe, base_recipe),
        read_dataset(data, layout, classes),
        out,
        TrainExecution(**execution),
        seeds=seeds,
        only=only,
        quiet=quiet,
        tell=lambda line: print(line, flush=True),
    )
    print(result.text)
    code = report_failures(result.left_out)
    if result.failed:
        print(
            f"rlr-fast: failed: {'; '.join(result.failed)}. The same command tries again",
            file=sys.stderr,
        )
        code = 1
    return code
