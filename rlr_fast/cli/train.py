"""``rlr-fast train``."""

from __future__ import annotations

import logging
from pathlib import Path

from rlr_fast.cli import flags
from rlr_fast.config import PRESETS, RLRConfig, TrainConfig, TrainExecution, from_dict

_log = logging.getLogger(__name__)


def train(
    data: flags.Data,
    /,
    *,
    out: Path,
    resume: flags.Switch = False,
    config: flags.Config | None = None,
    preset: flags.Preset | None = None,
    layout: flags.Layout = "auto",
    classes: flags.Classes = None,
    quiet: flags.Quiet = False,
    model: flags.Model = flags.NONE_GIVEN,
    recipe: flags.Recipe = flags.NONE_GIVEN,
    execution: flags.TrainExecution = flags.NONE_GIVEN,
) -> int:
    """Train one model on the normal images of all classes.

    Args:
        out: Folder of the run.
        resume: Go on from the run's last epoch, with its settings.
    """
    from rlr_fast.cli.common import report_failures
    from rlr_fast.data import read_dataset
    from rlr_fast.data.check import counted
    from rlr_fast.training.distributed import processes
    from rlr_fast.training.run_dir import read_run
    from rlr_fast.training.train import train

    with processes() as group:
        previous = group.broadcast(lambda: read_run(out) if resume else None)
        with group.together():
            # A preset that is given counts, so that one that is not the run's is refused.
            base = PRESETS[preset or "paper"]
            base_model, base_recipe = base.model, base.train
            if previous is not None and preset is None:
                base_model = from_dict(RLRConfig, previous["model"])
                base_recipe = from_dict(TrainConfig, previous["recipe"])
            if resume and previous is None and group.is_main:
                _log.warning(
                    "there is no run in %s to resume; a new one begins, of the preset %s",
                    out,
                    preset or "paper",
                )
            settings = from_dict(RLRConfig, model, base_model)
            training = from_dict(TrainConfig, recipe, base_recipe)
            how = TrainExecution(**execution)
            if previous is not None:
                classes = classes or previous["data"]["classes"]
                layout = previous["data"]["layout"] if layout == "auto" else layout
            images = read_dataset(data, layout, classes)
        result = train(settings, training, images, out, how, resume=resume, quiet=quiet)
        if not group.is_main:
            return 0
    figures = ""
    if result.history:
        loss = result.history[-1]["loss"]
        figures = f", loss {loss:.4f}, {result.images_per_s:.0f} images/s"
    trained = "already trained" if result.began == training.epochs else "trained"
    print(f"{trained} {counted(training.epochs, 'epoch')}{figures}: {result.out}")
    return report_failures([str(failure.error) for failure in result.failures])
