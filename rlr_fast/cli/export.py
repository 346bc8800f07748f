"""``rlr-fast export``."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from rlr_fast.cli import flags

_log = logging.getLogger(__name__)

_RUN = "Folder of a run, or OWNER/NAME or OWNER/NAME@REVISION on the hub."
To = Literal["onnx", "torch", "openvino"]


def export(
    run: Annotated[str, Parameter(name="RUN", help=_RUN)],
    /,
    *,
    to: To,
    out: Annotated[Path, Parameter(help="The file: .onnx, .pt2 or .xml.")],
    images: tuple[Path, ...] | None = None,
    alpha: flags.Alpha | None = None,
    pool: flags.Pool = False,
    opset: Annotated[flags.Whole | None, Parameter(show_default="18")] = None,
    input_size: flags.Pixels | None = None,
    half: flags.Switch = False,
    config: flags.Config | None = None,
    backbone_weights: flags.BackboneWeights | None = None,
) -> int:
    """Write a model as a file for other runtimes, if they agree with it on real images.

    Args:
        to: ONNX, a program of torch.export, or OpenVINO's IR.
        images: Images, or folders of images, to compare on; by default those that the run was
            trained and tested on, where they still are.
        opset: Version of ONNX's operators, from 18 to 23.
        input_size: Height and width of the images that the file takes and resizes, such as a
            camera's; a single number is both. By default the model's image size.
        half: Keep weights in float16: half the size; scores differ by a thousandth or so.
    """
    from rlr_fast.cli.common import given_decider
    from rlr_fast.config import InferenceExecution
    from rlr_fast.export.export import check_target, export
    from rlr_fast.export.images import comparison_images, run_images
    from rlr_fast.models.checkpoint import fetch_checkpoint
    from rlr_fast.pictures.batches import load_model
    from rlr_fast.prediction.image_files import find_images
    from rlr_fast.training.calibration import read_calibration, scoring_identity, trained_classes
    from rlr_fast.training.run_dir import tell_unfinished

    size = None if input_size is None else flags.pair("--input-size", input_size)
    check_target(out, to, opset, half, size)
    folder = fetch_checkpoint(run)
    tell_unfinished(folder)
    files = run_images(folder) if images is None else [f.path for f in find_images(images)]
    calibration = read_calibration(folder)
    classes = sorted(trained_classes(folder) or (calibration.classes if calibration else ()))
    model = load_model(folder, InferenceExecution(device="cpu"), backbone_weights)
    tiles = model.config.tiles
    decider = None
    if tiles is None:
        decider = given_decider(
            folder,
            scoring_identity(model),
            {*classes, None},
            alpha=alpha,
            pool=pool,
            needed=False,
            whole=True,
        )
    else:
        about = (
            f"the model sees pictures in tiles of {tiles.size[0]} x {tiles.size[1]} pixels: an "
            "image of the file is one of them, and decisions, which are of pictures, are not in it"
        )
        if alpha is not None or pool:
            raise ValueError(f"--alpha and --pool: {about}")
        _log.warning(about)
    result = export(
        model,
        out,
        to,
        comparison_images(files, size or model.config.image_size, half),
        decider=decider,
        classes=classes,
        opset=opset,
        input_size=size,
        half=half,
    )
    for comparison in result.compared:
        print(comparison)
    for comparison in result.differs:
        _log.warning(
            "%s (shares of the largest values): compile it with INFERENCE_PRECISION_HINT f32",
            comparison,
        )
    decides = "no decisions" if decider is None else f"decisions at alpha {decider.alpha:g}"
    print(
        f"{result.nodes} nodes, {result.bytes / 1e6:.1f} MB, {decides}, "
        f"in {result.seconds:.0f} seconds: {out}"
    )
    return 0
