"""What is said before training: what is about to be done, and what promises little."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Mapping, Sequence
from typing import cast

from rlr_fast.config import RLRConfig, TrainConfig, level_name
from rlr_fast.data import DataSet, Sample
from rlr_fast.data.check import counted
from rlr_fast.data.hold_out import MIN_IMAGES
from rlr_fast.data.parts import cut
from rlr_fast.models.reconstructor import Reconstructor
from rlr_fast.models.rlr import RLRModel
from rlr_fast.training.images import TrainingImages

# On 400 photographs `accurate` loses 1 to 2 points of I-AUROC with half of its 1,200 steps.
_FEW_STEPS = 600

_log = logging.getLogger(__name__)


def tell_plan(
    model: RLRModel,
    recipe: TrainConfig,
    data: DataSet,
    images: TrainingImages,
    workers: int | None,
    resume: bool,
    quiet: bool,
) -> None:
    """Say what is about to be trained, and warn of what promises little.

    Args:
        model: Not trained yet, on its device.
        recipe: That it is to be trained by.
        data: The data set, after `hold_out`.
        images: What is trained on.
        workers: Threads that read the headers of files.
        resume: The run goes on, and its number of steps is no choice any more.
        quiet: Warn alone.
    """
    held = _without_unfit(data, model.config, images, workers)
    for line in _keyless_levels(model):
        _log.warning(line)
    count, (height, width) = len(images.samples), model.config.image_size
    steps = recipe.epochs * math.ceil(count / recipe.batch_size)
    if not resume and steps < _FEW_STEPS:
        _log.warning(_few_steps(count, steps, recipe))
    if not quiet:
        print(
            f"{images}, classes: {len(data.classes)}, {model.config.backbone} at {height} x "
            f"{width}, epochs: {recipe.epochs} ({steps} steps), on {model.device}",
            file=sys.stderr,
        )
        print(_calibration_plan(held, model.config, recipe.calibration_share), file=sys.stderr)


def _few_steps(images: int, steps: int, recipe: TrainConfig) -> str:
    """Say how many epochs of so few images would be enough steps."""
    enough = math.ceil(_FEW_STEPS / math.ceil(images / recipe.batch_size))
    batch = counted(min(images, recipe.batch_size), "image")
    return (
        f"{counted(steps, 'step')} of {batch} are few, and a model that hardly learned finds "
        f"little: --epochs {enough} or more help"
    )


def _keyless_levels(model: RLRModel) -> list[str]:
    """Say of which levels MLKA sees no key from anywhere, and so adds nothing."""
    if "mlka" not in model.config.attention:
        return []
    lines = []
    levels = cast("list[Reconstructor]", list(model.levels))
    for place, level in zip(model.config.out_indices, levels, strict=True):
        window = level.window
        grid = [side // level.patch for side in level.grid]
        if all(side // 2 >= tokens - 1 for side, tokens in zip(window, grid, strict=True)):
            lines.append(
                f"level {level_name(place)}: the window of {window[0]} x {window[1]} covers the "
                f"grid of {grid[0]} x {grid[1]} tokens from everywhere, so MLKA has no key and "
                "gives nothing; smaller --windows or a larger --image-size help"
            )
    return lines


def _without_unfit(
    data: DataSet, config: RLRConfig, images: TrainingImages, workers: int | None
) -> dict[str, list[Sample]]:
    """Return of each class the images that calibrate, and tell how many have no tiles."""
    if config.tiles is None:
        return {name: data.validation.get(name, []) for name in data.classes}
    held, lost = {}, [failure.error for failure in images.failures]
    for name in data.classes:
        samples = data.validation.get(name, [])
        _, _, failures = cut(samples, config.tiles, workers)
        unfit = {failure.index for failure in failures}
        held[name] = [sample for i, sample in enumerate(samples) if i not in unfit]
        lost += [failure.error for failure in failures]
    if lost:
        _log.warning("%s left out, such as: %s", counted(len(lost), "image"), lost[0])
    return held


def _calibration_plan(held: Mapping[str, Sequence[Sample]], config: RLRConfig, share: float) -> str:
    """Say how many images there are of each class to calibrate decisions on."""
    images = sum(map(len, held.values()))
    line = f"{counted(images, 'image')} not trained on, to calibrate decisions"
    if not images:
        line += ": predict will give scores alone until rlr-fast calibrate is run"
    small = [name for name, samples in held.items() if not samples]
    if share and small:
        tiles = "" if config.tiles is None else ", or none as large as a tile"
        line += f"; none of {', '.join(small)} (fewer than {MIN_IMAGES} images{tiles})"
    return line
