"""Training throughput of the paper's preset with cached features, on random features.

``python -m benchmarks.throughput``: the training loop of `rlr_fast.train` itself, on features that
already lie on the device, as from the second epoch on; the first is left out of the figure.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import record
from rlr_fast import RLRConfig, RLRModel, TrainConfig
from rlr_fast.distributed import Processes
from rlr_fast.feature_cache import FeatureCache
from rlr_fast.functional import resolve_backend
from rlr_fast.loop import Loop


def images_per_second(
    backend: str, precision: str, batch: int, images: int, device: torch.device
) -> tuple[float, float]:
    """Return the median images/s after the first epoch, and the largest device memory in bytes."""
    torch.manual_seed(0)
    config = RLRConfig(backbone_weights="random")
    model = RLRModel(config, backend=backend).to(device)  # type: ignore[arg-type]
    levels = [
        torch.randn(images, h * w, c, device=device, dtype=torch.bfloat16)
        for (h, w), c in zip(model.backbone.grids, model.backbone.channels, strict=True)
    ]
    recipe = TrainConfig(epochs=2, batch_size=batch, precision=precision)
    with tempfile.TemporaryDirectory() as folder:
        cache = FeatureCache(levels, [], "gpu" if device.type == "cuda" else "ram", Path(folder))
        run = Loop(model, recipe, cache, Path(folder, "run"), Processes())
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        run.go(quiet=True)
    later = [row["images_per_s"] for row in run.history if row["epoch"] > 1]
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    return statistics.median(later), float(peak)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train briefly, print and record."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.throughput", description=__doc__)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--precision", help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--batch", type=int, action="append", help="default: 64, then 4")
    parser.add_argument("--steps", type=int, default=20, help="steps an epoch")
    parser.add_argument("--record", metavar="NAME", help="as of pytest --benchmark-record")
    options = parser.parse_args(arguments)
    device = record.bench_device()
    precision = options.precision or ("bf16" if device.type == "cuda" else "fp32")
    backend = resolve_backend(options.backend, device)
    recorder = record.Recorder(record.record_path(options.record) if options.record else None)
    for batch in options.batch or (64, 4):
        start = time.perf_counter()
        speed, peak = images_per_second(backend, precision, batch, batch * options.steps, device)
        recorder.add(
            {
                "suite": "throughput",
                "outcome": "ok",
                "rival": backend,
                "dtype": precision,
                "batch": batch,
                "images_per_s": speed,
                "peak_bytes": peak,
            }
        )
        print(
            f"{backend} {precision} batch {batch}: {speed:.1f} images/s, "
            f"{peak / 2**30:.2f} GiB ({time.perf_counter() - start:.0f} s in all)",
            flush=True,
        )
    recorder.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
