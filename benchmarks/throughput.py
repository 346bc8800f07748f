"""Training throughput: images per second from the second epoch on, and where the time goes.

``python -m benchmarks.throughput`` trains the paper's preset on random features that already lie on
the device. ``python -m benchmarks.throughput --data DATA --preset tiny`` trains on a data set, with
the features kept and made in every epoch, and divides the time of the epochs between forward,
backward, optimizer and the rest (on a GPU, where work is queued, the whole step is one share).
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
import tempfile
import time
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from benchmarks.arguments import positive
from rlr_fast import RLRConfig, RLRModel, TrainConfig
from rlr_fast.config import PRESETS, Precision, TrainExecution
from rlr_fast.data import DataSet, read_dataset
from rlr_fast.functional import Backend, BackendError, resolve_backend
from rlr_fast.training.distributed import Processes
from rlr_fast.training.feature_cache import FeatureCache
from rlr_fast.training.steps import Steps
from rlr_fast.training.train import train
from rlr_fast.training.trainer import Trainer

_EPOCHS = 4


class Clock:
    """Seconds of the epochs from the second on, and of the parts of their steps."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.images = 0
        self._within = False

    @contextmanager
    def watching(self) -> Iterator[Clock]:
        """Time every `Trainer` while the block runs."""
        patched: list[tuple[Any, str, Any]] = []

        def patch(owner: Any, name: str, part: str) -> None:
            original = getattr(owner, name)
            patched.append((owner, name, original))
            setattr(owner, name, self._timed(original, part))

        try:
            if not torch.cuda.is_available():
                patch(RLRModel, "distances", "forward")
                patch(torch.Tensor, "backward", "backward")
                patch(torch.optim.Adam, "step", "optimizer")
            else:
                patch(Steps, "take", "steps")
            patched.append((Trainer, "_train_epoch", Trainer._train_epoch))
            Trainer._train_epoch = self._epochs(Trainer._train_epoch)  # type: ignore[method-assign]
            yield self
        finally:
            for owner, name, original in reversed(patched):
                setattr(owner, name, original)

    def _timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **options)
            if self._within:
                self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start
            return result

        return call

    def _epochs(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(trainer: Trainer, *args: Any) -> None:
            if trainer.epoch == 1:  # the first is over, and what it wrote
                self.seconds, self.images = {}, 0
                self._start = time.perf_counter()
            self._within = True
            function(trainer, *args)
            self._within = False
            if trainer.epoch >= 1:
                self.images += len(trainer.features)
                self.seconds["epochs"] = time.perf_counter() - self._start

        return call

    def info(self) -> dict[str, object]:
        """As plain values for a record."""
        whole = self.seconds["epochs"]
        parts = {k: v / whole for k, v in self.seconds.items() if k != "epochs"}
        return {
            "images_per_s": self.images / whole,
            "shares": {**parts, "the rest": 1 - sum(parts.values())},
        }


def on_features(
    config: RLRConfig,
    recipe: TrainConfig,
    images: int,
    options: argparse.Namespace,
    device: torch.device,
) -> Clock:
    """Train on random features on the device."""
    torch.manual_seed(0)
    model = RLRModel(config, backend=options.backend).to(device)
    model.set_grad_checkpointing(options.grad_checkpointing)
    levels = [
        torch.randn(images, h * w, c, device=device, dtype=torch.bfloat16)
        for (h, w), c in zip(model.backbone.grids, model.backbone.channels, strict=True)
    ]
    with tempfile.TemporaryDirectory() as folder, Clock().watching() as clock:
        cache = FeatureCache(levels, [], "gpu" if device.type == "cuda" else "ram", Path(folder))
        out = Path(folder, "run")
        out.mkdir()
        trainer = Trainer(model, recipe, cache, out, Processes(), compile=options.compile)
        trainer.fit(quiet=True)
    return clock


def on_data(
    data: DataSet, preset: str, recipe: TrainConfig, cache: Any, backend: Any, device: torch.device
) -> Clock:
    """Train on a data set as the command does."""
    with tempfile.TemporaryDirectory() as folder, Clock().watching() as clock:
        train(
            PRESETS[preset].model, recipe, data, Path(folder, "run"),
            TrainExecution(
                device=str(device), backend=backend, cache_dir=Path(folder, "features"), cache=cache
            ),
            quiet=True,
        )  # fmt: skip
    return clock


def main(arguments: Sequence[str] | None = None) -> int:
    """Train briefly, print and record."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.throughput", description=__doc__)
    parser.add_argument("--data", type=Path, help="a data set to train on, cache beside no cache")
    parser.add_argument("--preset", default="tiny", choices=tuple(PRESETS), help="with --data")
    parser.add_argument("--backend", default="auto", choices=typing.get_args(Backend))
    parser.add_argument(
        "--precision",
        choices=typing.get_args(Precision),
        help="default: bf16 on a GPU, fp32 on a CPU",
    )
    parser.add_argument("--batch", type=positive, action="append", help="default: 64, then 4")
    parser.add_argument("--steps", type=positive, default=20, help="steps an epoch, without --data")
    parser.add_argument(
        "--image-size", type=positive, default=256, metavar="PX", help="without --data"
    )
    parser.add_argument("--compile", action="store_true", help="without --data")
    parser.add_argument("--grad-checkpointing", action="store_true", help="without --data")
    record.add_record_option(parser)
    options = parser.parse_args(arguments)
    device = record.bench_device()
    try:
        data = read_dataset(options.data) if options.data else None
        backend = resolve_backend(options.backend, device)
    except (ValueError, BackendError) as error:
        parser.error(str(error))
    precision: Precision = options.precision or ("bf16" if device.type == "cuda" else "fp32")
    recorder = record.Recorder(options.record)

    def add(what: str, batch: int, make: Callable[[TrainConfig], Clock]) -> None:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        base = PRESETS[options.preset].train if options.data else TrainConfig()
        recipe = dataclasses.replace(base, epochs=_EPOCHS, batch_size=batch, precision=precision)
        found = make(recipe).info()
        peak = float(torch.cuda.max_memory_allocated()) if device.type == "cuda" else 0.0
        recorder.add(
            {"suite": "throughput", "outcome": "ok", "what": what, "rival": backend,
             "dtype": precision, "batch": batch, "peak_bytes": peak, **found}
        )  # fmt: skip
        shares = ", ".join(f"{k} {v:.1%}" for k, v in found["shares"].items())  # type: ignore[attr-defined]
        print(
            f"{what}, {backend}, {precision}, batch {batch}: {found['images_per_s']:.1f} images/s, "
            f"{peak / 2**30:.2f} GiB; {shares}",
            flush=True,
        )

    if data is not None:
        batches = options.batch or [PRESETS[options.preset].train.batch_size]
        for batch, cache in itertools.product(batches, ("auto", "none", "auto", "none")):
            kept = "features made each epoch" if cache == "none" else "features kept"
            add(
                f"{options.preset}, {kept}",
                batch,
                lambda recipe, cache=cache: on_data(  # type: ignore[misc]
                    data, options.preset, recipe, cache, backend, device
                ),
            )
    else:
        side = options.image_size
        config = RLRConfig(backbone_weights="random", image_size=(side, side))
        what = f"paper at {side} px, random features" + (", compiled" if options.compile else "")
        what += ", blocks computed again" if options.grad_checkpointing else ""
        for batch in options.batch or (64, 4):
            images = batch * options.steps
            add(
                what,
                batch,
                lambda recipe, images=images: on_features(  # type: ignore[misc]
                    config, recipe, images, options, device
                ),
            )
    recorder.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
