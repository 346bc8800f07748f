"""Export: a model's graph as a file, kept only where every runtime agrees with the model."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rlr_fast.data.images import resize_image
from rlr_fast.export.compare import Comparison, compare, model_outputs
from rlr_fast.export.formats import (
    FORMATS,
    OPENVINO_OPSET,
    OPSETS,
    ExportError,
    Format,
    first_line,
    require_packages,
    write,
)
from rlr_fast.export.graph import ExportGraph, columns, describe
from rlr_fast.export.runtimes import Outputs, Runtime, runtimes
from rlr_fast.files import LOCK_FILE, check_writable, lock_folder, put_in_place
from rlr_fast.inference.decisions import Decider, Rule
from rlr_fast.models.rlr import RLRModel

_MOST_PIXELS = 2**26  # of an image; the comparison holds eight of them, and resizing one in float32


@dataclass(frozen=True)
class Exported:
    """What `export` did.

    Attributes:
        files: Those that it wrote; the last is the one to read.
        nodes: Of the graph.
        seconds: To trace and write it.
        compared: With the runtimes that decide whether it is kept.
        differs: Settings of a runtime with which it differs from the model, of which the user
            should know.
    """

    files: list[Path]
    nodes: int
    seconds: float
    compared: list[Comparison]
    differs: list[Comparison]

    @property
    def bytes(self) -> int:
        """Size of the files."""
        return sum(file.stat().st_size for file in self.files)


def check_target(
    out: Path,
    kind: Format,
    opset: int | None = None,
    half: bool = False,
    input_size: tuple[int, int] | None = None,
) -> None:
    """Refuse what cannot be exported to, before any work.

    Args:
        out: The file.
        kind: The format.
        opset: Of an ONNX file, if it was asked for.
        half: Whether weights in float16 were asked for.
        input_size: (H, W) of the file's images, if it was asked for.

    Raises:
        ValueError: ``out`` exists or has another suffix than the format's, there is no such opset,
            the format keeps no weights in float16, or the images are too large.
        ExportError: A package of the format is missing.
        OSError: The folder cannot be written.
    """
    spec = FORMATS[kind]
    if out.suffix != spec.suffix:
        raise ValueError(f"--out must end in {spec.suffix} for --to {kind}, got {str(out)!r}")
    if opset is not None and kind != "onnx":
        raise ValueError(f"--opset is of ONNX files, got it with --to {kind}")
    if opset is not None and opset not in OPSETS:
        raise ValueError(f"--opset must be from {OPSETS[0]} to {OPSETS[-1]}, got {opset}")
    if half and kind not in ("onnx", "openvino"):
        raise ValueError(f"--half is of ONNX files and OpenVINO's IR, got it with --to {kind}")
    if input_size is not None and math.prod(input_size) > _MOST_PIXELS:
        raise ValueError(
            f"--input-size must be at most {_MOST_PIXELS} pixels in all, got {input_size[0]} x "
            f"{input_size[1]}"
        )
    for file in spec.files(out):
        if file.exists():
            raise ValueError(f"--out: {str(file)!r} exists already; delete it or choose another")
    check_writable(out.parent)
    require_packages(kind)


def export(
    model: RLRModel,
    out: Path,
    kind: Format,
    images: Tensor,
    *,
    decider: Decider | None = None,
    classes: Sequence[str] = (),
    opset: int | None = None,
    input_size: tuple[int, int] | None = None,
    half: bool = False,
) -> Exported:
    """Write a model as a file that needs nothing of this package; compare it, then keep it.

    The file computes, in float32, what `rlr_fast.prediction.predict.predict` computes of an image
    that has ``input_size``. It appears whole, or, where a runtime disagrees, not at all.

    Args:
        model: A trained model that is not compiled; it stays as it is.
        out: The file, which must not exist; a missing folder is made.
        kind: ``onnx``, ``torch`` (a program of `torch.export`) or ``openvino`` (its IR).
        images: (n, 3, H, W) uint8 RGB to compare on, of ``input_size``.
        decider: Decides in the file, too; it must be able to decide each of ``classes`` and all
            pooled. None leaves decisions out.
        classes: Those of the run.
        opset: Of an ONNX file; 18 by default.
        input_size: (H, W) of the file's images, which it resizes to the model's image size; None
            for that.
        half: Keep weights in float16: half the size, at `HALF_TOLERANCE`.

    Returns:
        What was written, and the comparisons.

    Raises:
        ValueError: See `check_target`; or ``decider`` cannot decide, or the model is compiled, or
            not of float32.
        ExportError: A package is missing, the model has no such form, or a runtime disagrees.
        OSError: The file cannot be written.
    """
    check_target(out, kind, opset, half, input_size)
    opset = OPSETS[0] if opset is None else opset
    rules = [] if decider is None else columns(decider, classes)
    about = describe(model, decider, classes, input_size)
    size = model.config.image_size
    expected = model_outputs(model, torch.stack([resize_image(image, size) for image in images]))
    start = time.perf_counter()
    graph = ExportGraph(
        model, decider, classes, input_size=input_size, attention=FORMATS[kind].attention
    )
    try:
        program = graph.trace()
    except RuntimeError as error:
        raise ExportError(f"the model cannot be traced: {first_line(error)}") from error
    with _workshop(out) as folder:
        part = folder / out.name
        try:
            nodes = write(
                program,
                kind,
                part,
                outputs=graph.output_names,
                about=about,
                opset=opset,
                half=half,
            )
        except OSError as error:
            error.filename = str(out)  # not that of a file that will be gone
            raise
        except ExportError:
            raise
        except (RuntimeError, ValueError) as error:  # of PyTorch's writer, and of a file over 2 GB
            raise ExportError(f"cannot write {str(out)!r}: {first_line(error)}") from error
        seconds = time.perf_counter() - start
        compared, differs = [], []
        for runtime in runtimes(kind):
            result = _compared(runtime, part, images, expected, rules, half)
            if runtime.required and not result.agrees:
                raise ExportError(_refusal(result, kind, opset))
            if runtime.required:
                compared.append(result)
            elif not result.agrees:
                differs.append(result)
        check_target(out, kind, opset if kind == "onnx" else None, half, input_size)  # still
        for file in FORMATS[kind].files(out):
            put_in_place(part.with_name(file.name), file)
    return Exported(FORMATS[kind].files(out), nodes, seconds, compared, differs)


@contextlib.contextmanager
def _workshop(out: Path) -> Iterator[Path]:
    """Make a folder beside a file to write it in, without what a kill has left there.

    Raises:
        BlockingIOError: Another process writes the file.
        OSError: The folder cannot be written.
    """
    folder = out.with_name(f".{out.name}.partial")

    def clear() -> None:
        for path in folder.iterdir():
            if path.name != LOCK_FILE:
                path.unlink()

    with lock_folder(folder):
        clear()
        try:
            yield folder
        finally:
            clear()
    with contextlib.suppress(OSError):
        (folder / LOCK_FILE).unlink(missing_ok=True)
        folder.rmdir()


def _compared(
    runtime: Runtime,
    path: Path,
    images: Tensor,
    expected: Outputs,
    rules: Sequence[Rule],
    half: bool,
) -> Comparison:
    try:
        return compare(runtime.name, runtime.load(path), images, expected, rules, half=half)
    except Exception as error:  # the errors of ONNX Runtime have no base class of their own
        raise ExportError(
            f"{runtime.name} cannot run the file, so it is not kept: {first_line(error)}"
        ) from error


def _refusal(result: Comparison, kind: Format, opset: int) -> str:
    """Say that a runtime disagrees, and what else there is to try."""
    allowed = result.tolerance
    told = f"not exported, for of the largest values only {allowed:g} is allowed: {result}"
    if "openvino" in result.runtime:
        told += "; try OpenVINO 2026.4 or later"
        if kind == "onnx" and opset < OPENVINO_OPSET:
            told += f", or --opset {OPENVINO_OPSET}"
    return told
