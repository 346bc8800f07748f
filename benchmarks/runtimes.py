"""Exported files in every runtime that is installed: differences from the model, time, size.

``python -m benchmarks.runtimes RUN IMAGES`` exports a run in each format, an ONNX file in the first
and the last opset, and prints a table; eager and compiled PyTorch stand beside. Differences are
shares of the model's largest value. Times are of the processor, with one thread: a call's, per
image, and what tracing and writing a file took. It exits with 1 where a runtime disagrees, see
`rlr_fast.export.compare.TOLERANCE`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rlr_fast.config import InferenceExecution
from rlr_fast.export.compare import Comparison, compare, model_outputs
from rlr_fast.export.formats import FORMATS, OPSETS, Format, require_packages, write
from rlr_fast.export.graph import ExportGraph, describe
from rlr_fast.export.images import comparison_images
from rlr_fast.export.runtimes import Outputs, runtimes
from rlr_fast.pictures.batches import load_model
from rlr_fast.prediction.image_files import find_images

# Name, format, opset, and whether weights are in float16.
FILES: tuple[tuple[str, Format, int, bool], ...] = (
    (f"ONNX, opset {OPSETS[0]}", "onnx", OPSETS[0], False),
    (f"ONNX, opset {OPSETS[-1]}", "onnx", OPSETS[-1], False),
    (f"ONNX, opset {OPSETS[-1]}, half", "onnx", OPSETS[-1], True),
    ("OpenVINO IR", "openvino", OPSETS[-1], False),
    ("OpenVINO IR, half", "openvino", OPSETS[-1], True),
    ("torch.export", "torch", OPSETS[0], False),
)
BATCHES = (1, 8)
_SECONDS = 3.0  # that a timing takes at least
_CALLS = 5


def milliseconds(run: Callable[[NDArray[np.uint8]], Any], images: NDArray[np.uint8]) -> float:
    """Return the least processor time of a call, per image: other work on a machine adds none."""
    times: list[float] = []
    while len(times) < _CALLS or sum(times) < _SECONDS:
        start = time.process_time()
        run(images)
        times.append(time.process_time() - start)
    return 1e3 * min(times) / len(images)


def row(file: str, comparison: Comparison, times: list[float], about: str = " | | ") -> str:
    """Return a row of the table."""
    return (
        f"| {file} | {comparison.runtime} | {comparison.score_map:.1e} | {comparison.score:.1e} | "
        f"{comparison.rank_correlation:.5f} | "
        f"{times[0]:.1f} | {times[1]:.1f} | {about} |"
    )


def main() -> int:
    """Print the table; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("images", type=Path, nargs="+")
    args = parser.parse_args()
    torch.set_num_threads(1)
    try:
        for _, kind, _, _ in FILES:
            require_packages(kind)
        model = load_model(args.run, InferenceExecution(device="cpu"))
        files = [file.path for file in find_images(args.images)]
        images = comparison_images(files, model.config.image_size, half=True)
    except (ValueError, OSError, RuntimeError) as error:
        parser.error(str(error))
    expected = model_outputs(model, images)
    pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
    batches = [np.resize(pixels, (size, *pixels.shape[1:])) for size in BATCHES]
    agree = True
    print(
        "| file | runtime | map | score | order | ms, batch 1 | ms an image, batch 8 | nodes | "
        "MB | s to write |\n"
        "|---|---|---|---|---|---|---|---|---|---|"
    )

    def report(file: str, name: str, run: Any, about: str = " | | ", half: bool = False) -> bool:
        comparison = compare(name, run, images, expected, half=half)
        times = [milliseconds(run, batch) for batch in batches]
        print(row(file, comparison, times, about), flush=True)
        return comparison.agrees

    for text, kind, opset, half in FILES:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "model" + FORMATS[kind].suffix)
            start = time.process_time()
            graph = ExportGraph(model, None, (), attention=FORMATS[kind].attention)
            nodes = write(
                graph.trace(),
                kind,
                path,
                outputs=graph.output_names,
                about=describe(model, None, ()),
                opset=opset,
                half=half,
            )
            seconds = time.process_time() - start
            size = sum(file.stat().st_size for file in FORMATS[kind].files(path)) / 1e6
            about = f"{nodes} | {size:.1f} | {seconds:.0f}"
            for runtime in runtimes(kind, threads=1):
                same = report(text, runtime.name, runtime.load(path), about, half)
                agree = agree and (same or not runtime.required)
    for name in ("eager", "compiled"):
        if name == "compiled":
            model.compile(dynamic=False)

        @torch.inference_mode()
        def run(batch: NDArray[np.uint8]) -> Outputs:
            if not model.is_prepared():
                model.prepare_for_inference()
            output = model(torch.from_numpy(batch).permute(0, 3, 1, 2))
            return {"score_map": output.score_map[:, 0].numpy(), "score": output.score.numpy()}

        report("", f"torch {torch.__version__}, {name}", run)
    return 0 if agree else 1


if __name__ == "__main__":
    raise SystemExit(main())
