"""Training: one model on all classes, checkpointed each epoch and resumable to the bit."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rlr_fast.config import RLRConfig, TrainConfig, TrainExecution
from rlr_fast.data import DataSet, ImageFailure, Sample
from rlr_fast.data.check import counted
from rlr_fast.data.contents import describe_images
from rlr_fast.data.hold_out import hold_out
from rlr_fast.data.images import digest_images
from rlr_fast.files import write_atomically
from rlr_fast.models.checkpoint import CONFIG_FILE, CheckpointError, load_config
from rlr_fast.models.environment import environment, start_device
from rlr_fast.models.precision import check_precision
from rlr_fast.models.rlr import RLRModel
from rlr_fast.training.calibration import (
    CALIBRATION_FILE,
    HELD_OUT,
    VALIDATION,
    Calibration,
    read_calibration,
    score_held_out,
    score_quantiles,
)
from rlr_fast.training.distributed import Processes, processes
from rlr_fast.training.feature_cache import cached_features
from rlr_fast.training.features import Features, FreshFeatures
from rlr_fast.training.images import TrainingImages, lost_class, training_images
from rlr_fast.training.plan import tell_plan
from rlr_fast.training.progress import progress_bar
from rlr_fast.training.run_dir import (
    TrainingError,
    check_folder,
    check_trained,
    lock_run,
    read_trained,
    tell_other_processes,
    write_settings,
    write_trained,
)
from rlr_fast.training.scales import fit_scales
from rlr_fast.training.score_fit import fit_score
from rlr_fast.training.trainer import Trainer
from rlr_fast.visualization import loss_curve

CURVE_FILE = "loss.png"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """What a training run leaves.

    Attributes:
        out: The run's folder, a checkpoint for `RLRModel.from_pretrained`.
        history: Rows of the log: step, epoch, loss, level_0 …, grad_norm, lr, images_per_s; and
            diversity, that term of the loss, where it has one.
        failures: Images that could not be read and were left out: those to train on, then those to
            calibrate on, each by its place among them.
        images_per_s: Median over the run; NaN where the history is lost.
        began: Epochs that the run had when it was resumed; all of them, if it was finished.
    """

    out: Path
    history: list[dict[str, float]]
    failures: list[ImageFailure]
    images_per_s: float
    began: int


def train(
    config: RLRConfig,
    recipe: TrainConfig,
    data: DataSet,
    out: Path,
    execution: TrainExecution = TrainExecution(),
    *,
    resume: bool = False,
    quiet: bool = False,
    progress: Callable[[str, int], object] = lambda what, images: None,
) -> TrainResult:
    """Train one model on the normal images of all classes and leave a checkpoint in ``out``.

    Minimizes eq. 13-14 with Adam. The features of the frozen backbone are computed once. Images are
    shuffled and perturbed by numbers that depend on seed, epoch, step and process alone, so that a
    resumed run sees what an uninterrupted one sees. With ``config.tile`` every tile of a picture is
    such an image; what is kept out are whole pictures, scored as prediction scores them.

    A share of each class's images is kept out (``recipe.calibration_share``), or the class's
    ``validation`` images are taken: their scores, in ``calibration.json``, are what decisions rest
    on, see `rlr_fast.inference.decisions`. Without any of them a run gives scores alone.

    Started by torchrun, all processes call this together. Process r of W computes and holds the
    features of images r, r + W, r + 2W, … and shuffles them by itself, so each number of processes
    has its own order of images and its own noise. A step is exact whatever their number: the
    gradient is that of the mean loss over the images that all of them took, ``batch_size`` of them.

    Args:
        config: The model.
        recipe: Epochs, batch size, learning rate, precision, seed.
        data: Its ``train`` samples are used, and its ``validation`` samples to calibrate on.
        out: Folder of the run: ``config.json``, ``model.safetensors``,
            ``training_state.safetensors``, ``run.json``, ``history.jsonl``, a TensorBoard log,
            ``loss.png``, ``calibration.json``. The first process alone reads and writes it.
        execution: Where and how to train; the result depends on it by rounding alone.
        resume: Go on from the last finished epoch of the run in ``out``, if there is one. Another
            number of processes may go on; the result is then not that of one uninterrupted run.
        quiet: No progress bar, and no line that says what is about to be trained.
        progress: Called with ``"features"`` or ``"train"`` and the number of images done since the
            last call; a resumed run first tells those of its finished epochs.

    Raises:
        ValueError: A class has no training images, an option does not fit the device, or the
            processes were not given the same run.
        BackendError: The backend cannot run on the device.
        TrainingError: ``out`` holds another run or one of other images, another command works in
            it, the disk is full, the loss is not finite, or there are more processes than images.
        CacheError: The feature cache cannot be written.
        PeerError: Another process met one of these.
    """
    with processes() as group, contextlib.ExitStack() as stack:
        with group.together():
            device = start_device(execution)
            if config.diversity > 0 and recipe.loss_power != 1:
                raise ValueError(
                    "loss_power must be 1 beside the diversity of references, got "
                    f"loss_power={recipe.loss_power:g} and diversity={config.diversity:g}"
                )
            whole, data = data, hold_out(data, recipe.calibration_share, recipe.seed)
            _check_request(recipe, data, device, group)
            images = training_images(data, config, group.workers(execution.workers))
            count = len(images.samples)
            if count < group.world_size:
                raise TrainingError(
                    f"{counted(count, 'training image')} cannot be shared among "
                    f"{group.world_size} processes; start {count} at most"
                )
            record = {
                "model": config.to_dict(),
                "recipe": dataclasses.asdict(recipe),
                "data": describe_images(whole, whole.train)
                | {"kept_out_digest": describe_images(data, data.validation)["files_digest"]},
                "processes": group.world_size,
            }
            if group.is_main:
                check_folder(out, record, resume, data)
            torch.manual_seed(recipe.seed)
            model = RLRModel(config, backend=execution.backend).to(device)
            model.set_grad_checkpointing(execution.grad_checkpointing)
            if group.is_main:
                stack.enter_context(lock_run(out))
                check_folder(out, record, resume, data)  # another command may have been there
                tell_other_processes(out, record)
        group.agree(_decisive(record, model))

        def begin() -> list[str | None]:
            tell_plan(model, recipe, data, images, execution.workers, resume, quiet)
            digests = digest_images([s.path for s in images.pictures], execution.workers)
            check_trained(out, digests)
            return digests

        digests = group.broadcast(begin)
        features, samples, failures = _features(
            model, images, digests, execution, quiet, progress, group
        )
        fit_scales(model, features, group)
        trainer = Trainer(
            model,
            recipe,
            features,
            out,
            group,
            compile=execution.compile,
            micro_batch_size=execution.micro_batch_size,
            progress=partial(progress, "train"),
        )
        with group.together():
            if group.is_main:
                record["environment"] = environment(device)
                record["way"] = {
                    "backend": execution.backend,
                    "compiled": execution.compile,
                    "grad_checkpointing": execution.grad_checkpointing,
                    "piece": execution.micro_batch_size,
                }
                failed = {failure.index for failure in failures}
                write_trained(out, [d for i, d in enumerate(digests) if i not in failed])
                write_settings(out, config.to_json(), record)
        trainer.fit(quiet)
        fitted = group.broadcast(lambda: _fitted_score(out, trainer.began == recipe.epochs))
        if fitted is not None:
            model.set_score(**fitted)
        else:
            fit_score(model, recipe, features, group)
            if model.uncertainty:  # its tensors are part of the checkpoint
                trainer.save()
        scores = score_quantiles(model, features, [s.category for s in samples], group)
        sources = {n: VALIDATION if whole.validation.get(n) else HELD_OUT for n in data.classes}
        trained = group.broadcast(lambda: read_trained(out))
        calibration, unread = score_held_out(
            model, data.validation, sources, trained, group, group.workers(execution.workers)
        )
        failures += unread
        with group.together():
            if group.is_main:
                calibration = _later_calibration(out, model) or calibration
                if calibration is not None:
                    scores["calibration"] = dataclasses.asdict(calibration)
                write_atomically(out / CONFIG_FILE, model.config.to_json())
                write_atomically(out / CALIBRATION_FILE, json.dumps(scores, indent=2))
                if trainer.history:
                    loss_curve(trainer.history, out / CURVE_FILE)
        speeds = [row["images_per_s"] for row in trainer.history]
        speed = statistics.median(speeds) if speeds else math.nan
        return TrainResult(out, trainer.history, failures, speed, trainer.began)


def _fitted_score(out: Path, finished: bool) -> dict[str, Any] | None:
    """Return the score that a run was given when it ended: another fit differs by rounding."""
    if not finished or not (out / CALIBRATION_FILE).exists():
        return None
    config = load_config(out / CONFIG_FILE)
    return {"level_offsets": config.level_offsets, "level_weights": config.level_weights}


def _later_calibration(out: Path, model: RLRModel) -> Calibration | None:
    """Return what a run of the same weights holds already: it may be of images taken later."""
    try:
        previous = read_calibration(out)
    except CheckpointError as error:
        _log.warning("%s; it is written anew", error)
        return None
    return previous if previous is not None and previous.is_of(model) else None


def _check_request(
    recipe: TrainConfig,
    data: DataSet,
    device: torch.device,
    processes: Processes,
) -> None:
    data.require_train()
    check_precision(recipe.precision, device)
    if processes.world_size > 1 and device.type not in ("cpu", "cuda"):
        raise ValueError(f"several processes need device cpu or cuda, got {str(device)!r}")


def _decisive(record: dict[str, Any], model: RLRModel) -> dict[str, Any]:
    """Return by name what all processes of a run must have in common."""
    values = {f"{p} {k}": v for p in ("model", "recipe", "data") for k, v in record[p].items()}
    # Each machine may keep images and weights where it likes; their digests decide.
    del values["data root"], values["model backbone_weights"]
    return values | {"fingerprint of the backbone": model.backbone.fingerprint}


def _features(
    model: RLRModel,
    images: TrainingImages,
    digests: Sequence[str | None],
    execution: TrainExecution,
    quiet: bool,
    progress: Callable[[str, int], object],
    processes: Processes,
) -> tuple[Features, list[Sample], list[ImageFailure]]:
    """Return the features of this process's share, their samples, and all processes' failures."""
    samples = images.samples
    mine = samples[processes.rank :: processes.world_size]
    with (
        processes.together(),
        progress_bar("features", len(mine), quiet or not processes.is_main) as bar,
    ):
        threads = processes.workers(execution.workers)

        def done(images: int) -> None:
            bar.update(images)
            progress("features", images)

        features: Features
        if execution.cache == "none":
            features = FreshFeatures(model, mine, threads, done)
        else:
            features = cached_features(
                model,
                mine,
                execution.cache_dir,
                execution.cache,
                digests=[digests[i] for i in images.places[processes.rank :: processes.world_size]],
                workers=threads,
                progress=done,
                sharers=processes.local_world_size,
            )
    shares = processes.all_gather(features.failures)
    failed = {failure.index: failure for failure in images.failures}
    for rank, share in enumerate(shares):
        for failure in share:  # of a picture once, whatever the number of its tiles
            place = images.places[rank + processes.world_size * failure.index]
            failed[place] = ImageFailure(place, failure.error)
    failures = [failed[place] for place in sorted(failed)]
    error = lost_class(images.pictures, failures)
    if error is not None:
        raise processes.alike(error)
    mine_failed = {failure.index for failure in features.failures}
    return features, [s for i, s in enumerate(mine) if i not in mine_failed], failures
