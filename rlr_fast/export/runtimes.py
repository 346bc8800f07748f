"""The runtimes that run an exported file, each as a function from images to named outputs."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rlr_fast.export.formats import Format
from rlr_fast.models.environment import package_version

Outputs = dict[str, NDArray[Any]]
"""By name: ``score_map``, ``score`` and, where the file decides, ``p_value`` and ``anomalous``."""

F32_HINT = {"INFERENCE_PRECISION_HINT": "f32"}
"""With this OpenVINO computes in float32 on every CPU."""


@dataclass(frozen=True)
class Runtime:
    """A way to run a file.

    Attributes:
        name: Package, version and settings, in words.
        load: Return a function of images (B, H, W, 3) uint8 for a file.
        required: Whether the file is refused where its outputs are others; else that is told.
    """

    name: str
    load: Callable[[Path], Callable[[NDArray[np.uint8]], Outputs]]
    required: bool = True


def runtimes(kind: Format, threads: int = 0) -> list[Runtime]:
    """Return the runtimes that are installed and can run files of a format.

    Args:
        kind: The format.
        threads: Of each runtime but PyTorch; 0 leaves their number to it.
    """
    if kind == "torch":
        return [Runtime(f"torch {torch.__version__}", _torch)]
    found = []
    if kind == "onnx":
        name = f"onnxruntime {package_version('onnxruntime')}"
        found.append(Runtime(name, lambda path: onnxruntime_session(path, threads)))
    if importlib.util.find_spec("openvino") is not None:
        name = f"openvino {package_version('openvino')}"
        own: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads} if threads else {}
        found.append(Runtime(f"{name}, f32", lambda path: openvino_model(path, own | F32_HINT)))
        default = _openvino_default()
        if default != "f32":  # of most processors with products of bfloat16 matrices
            name += f", its default {default}"
            found.append(Runtime(name, lambda path: openvino_model(path, own), required=False))
    return found


def onnxruntime_session(path: Path, threads: int = 0) -> Callable[[NDArray[np.uint8]], Outputs]:
    """Load an ONNX file into ONNX Runtime, on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda images: dict(zip(names, session.run(names, {"images": images}), strict=True))


def openvino_model(
    path: Path, settings: Mapping[str, Any] = {}
) -> Callable[[NDArray[np.uint8]], Outputs]:
    """Load an ONNX file or an IR into OpenVINO, on the CPU."""
    import openvino

    model = openvino.Core().compile_model(path, "CPU", dict(settings))
    names = [output.any_name for output in model.outputs]

    def run(images: NDArray[np.uint8]) -> Outputs:
        result = model(images)
        return {name: np.array(result[name]) for name in names}

    return run


def _openvino_default() -> str:
    """Return the precision that OpenVINO takes on this CPU where none is asked for."""
    import openvino

    hint = openvino.Core().get_property("CPU", "INFERENCE_PRECISION_HINT")
    return str(hint.get_type_name())


def _torch(path: Path) -> Callable[[NDArray[np.uint8]], Outputs]:
    module = torch.export.load(path).module()

    @torch.no_grad()
    def run(images: NDArray[np.uint8]) -> Outputs:
        return {name: value.numpy() for name, value in module(torch.from_numpy(images)).items()}

    return run
