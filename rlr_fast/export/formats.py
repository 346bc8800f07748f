"""The formats of exported files: which packages each needs, and how it is written."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch.export import ExportedProgram

from rlr_fast.config import Backend

Format = Literal["onnx", "torch", "openvino"]

OPSETS = range(18, 24)
"""Versions of ONNX's operators that a file can have; 18 is the first that PyTorch writes."""

METADATA = "rlr_fast"
"""Under this name a file holds what it says of itself, see `rlr_fast.export.graph.describe`."""

OPENVINO_OPSET = 23
"""The one that OpenVINO is given: it reads attention in tiles wrongly from an older one."""

# Entries of a constant up to which what is computed from constants is stored in their place: as
# many as a mask of the definition has, less than one of tiles on a large grid.
_STORED_ENTRIES = 1 << 20
# From which on a constant is kept in float16 where that was asked for; smaller ones save nothing.
_HALVED_ENTRIES = 1 << 10
# Constants of `ExportGraph` that are never rounded, for scores are compared with them. (Those that
# resize are whole numbers, which float16 holds.)
_EXACT = ("calibration", "threshold")


class ExportError(RuntimeError):
    """A package is missing, the model cannot be written, or a runtime disagrees with it."""


@dataclass(frozen=True)
class FormatSpec:
    """What is to be known of a format.

    Attributes:
        suffix: Of the file's name.
        packages: Those that write and run it.
        extra: The extra of rlr_fast that installs them.
        beside: Suffixes of further files beside it.
        attention: Backend of attention on small grids: the definition for runtimes that fuse it
            themselves, tiles for PyTorch.
    """

    suffix: str
    packages: tuple[str, ...] = ()
    extra: str = ""
    beside: tuple[str, ...] = ()
    attention: Backend = "dense"

    def files(self, path: Path) -> list[Path]:
        """Return the files of an export to ``path``; without the others it cannot be read."""
        return [*(path.with_suffix(suffix) for suffix in self.beside), path]


FORMATS: dict[Format, FormatSpec] = {
    "onnx": FormatSpec(".onnx", ("onnx", "onnx_ir", "onnxscript", "onnxruntime"), "export"),
    "torch": FormatSpec(".pt2", attention="tiled"),
    "openvino": FormatSpec(
        ".xml", ("onnx", "onnx_ir", "onnxscript", "openvino"), "openvino", (".bin",)
    ),
}


def require_packages(kind: Format) -> None:
    """Refuse a format whose packages are not here.

    Raises:
        ExportError: One is not installed, or cannot be imported.
    """
    for package in FORMATS[kind].packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ExportError(
                f"--to {kind} needs the package {package} ({error}): "
                f"pip install 'rlr_fast[{FORMATS[kind].extra}]'"
            ) from error


def write(
    program: ExportedProgram,
    kind: Format,
    path: Path,
    *,
    outputs: Sequence[str],
    about: str,
    opset: int,
    half: bool = False,
) -> int:
    """Write a program as a file; return the number of its nodes.

    Args:
        program: From `rlr_fast.export.graph.ExportGraph.trace`.
        kind: The format.
        path: The file, in an existing folder.
        outputs: Names of the outputs.
        about: What the file says of itself.
        opset: Of an ONNX file.
        half: Keep large constants in float16, in an ONNX file or an IR.

    Raises:
        ExportError: The program has an operator that the format lacks, or OpenVINO cannot write.
        OSError: The file cannot be written.
    """
    if kind == "torch":
        buffer = io.BytesIO()  # PyTorch ends the process where a disk is full
        with _quiet():
            torch.export.save(program, buffer, extra_files={f"{METADATA}.json": about})
        path.write_bytes(buffer.getbuffer())
        return sum(node.op == "call_function" for node in program.graph.nodes)
    import onnx_ir

    model = _onnx_model(program, outputs, OPENVINO_OPSET if kind == "openvino" else opset)
    if half:
        halve(model.graph)
    if kind == "onnx":
        model.metadata_props[METADATA] = about
        onnx_ir.save(model, path)
        return len(model.graph)
    import openvino

    try:
        read = openvino.Core().read_model(onnx_ir.to_proto(model).SerializeToString())
        read.set_rt_info(about, [METADATA])
        openvino.save_model(read, path, compress_to_fp16=False)  # it would round all constants
        return sum(node.get_type_name() != "Constant" for node in read.get_ops())
    except RuntimeError as error:
        raise ExportError(f"OpenVINO cannot write {path.name!r}: {first_line(error)}") from error


def halve(graph: Any) -> None:
    """Keep the large float32 constants of a graph of `onnx_ir` in float16, and cast them back."""
    import numpy as np
    import onnx_ir as ir

    single = ir.TensorType(ir.DataType.FLOAT)
    largest = np.finfo(np.float16).max
    for name, value in list(graph.initializers.items()):
        if value.dtype != ir.DataType.FLOAT or value.const_value.size < _HALVED_ENTRIES:
            continue
        numbers = value.const_value.numpy()
        if name.startswith(_EXACT) or np.abs(numbers).max() > largest:
            continue
        tensor = ir.Tensor(numbers.astype(np.float16), name=f"{name}_half")
        half = ir.Value(
            name=tensor.name,
            shape=value.shape,
            type=ir.TensorType(ir.DataType.FLOAT16),
            const_value=tensor,
        )
        graph.initializers.add(half)
        cast = ir.node("Cast", [half], {"to": ir.DataType.FLOAT})
        [result] = cast.outputs
        result.name, result.shape, result.type = f"{name}_single", value.shape, single
        graph.insert_before(graph[0], cast)
        value.replace_all_uses_with(result)
        del graph.initializers[name]


def _onnx_model(program: ExportedProgram, outputs: Sequence[str], opset: int) -> Any:
    """Return a program as a model of `onnx_ir`, in operators of ONNX alone."""
    import onnxscript
    from onnx_ir.passes import common

    with _quiet():
        try:
            exported = torch.onnx.export(
                program,
                opset_version=opset,
                dynamo=True,
                input_names=["images"],
                output_names=list(outputs),
                dynamic_shapes=({0: "batch"},),
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            reason = first_line(error.__cause__ or error)
            raise ExportError(f"the model cannot be written in ONNX: {reason}") from error
        assert exported is not None
        model = exported.model
        onnxscript.optimizer.optimize_ir(
            model, input_size_limit=_STORED_ENTRIES, output_size_limit=_STORED_ENTRIES
        )
        # Until here every attention of a level has a mask of its own.
        common.DeduplicateInitializersPass(size_limit=_STORED_ENTRIES)(model)
        common.CommonSubexpressionEliminationPass()(model)
        common.ClearMetadataAndDocStringPass()(model)  # where in PyTorch each node comes from
    return model


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its kind where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' remarks on their own work from the user."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir", "torch.onnx")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
