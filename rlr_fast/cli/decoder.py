"""``rlr-fast decoder train``."""

from __future__ import annotations

from pathlib import Path

from rlr_fast.cli import flags
from rlr_fast.config import InferenceExecution


def train(
    data: flags.Data,
    /,
    *,
    checkpoint: flags.Checkpoint,
    out: Path,
    epochs: flags.Positive = 40,
    batch_size: flags.Positive = 4,
    lr: float = 2e-3,
    seed: flags.Whole = 0,
    config: flags.Config | None = None,
    layout: flags.Layout = "auto",
    classes: flags.Classes = None,
    backbone_weights: flags.BackboneWeights | None = None,
    quiet: flags.Quiet = False,
    execution: flags.Execution = flags.NONE_GIVEN,
) -> int:
    """Train a decoder, which paints features as pictures for figures.

    Args:
        out: File of the decoder, named *.safetensors.
        epochs: Passes over the images.
        batch_size: Images per step.
        lr: Adam's learning rate at the start.
        seed: Seed of weights and order of images.
    """
    from rlr_fast.cli.common import report_failures
    from rlr_fast.data import read_dataset
    from rlr_fast.data.check import counted
    from rlr_fast.models.checkpoint import CheckpointError
    from rlr_fast.pictures.batches import load_model
    from rlr_fast.training.decoder import train_decoder
    from rlr_fast.training.progress import progress_bar
    from rlr_fast.visualization.decoder import check_decoder_file, save_decoder

    how = InferenceExecution(**execution)
    images = read_dataset(data, layout, classes)
    images.require_train()
    try:
        check_decoder_file(out)
    except (ValueError, CheckpointError) as error:
        raise ValueError(f"--out: {error}") from error
    model = load_model(checkpoint, how, backbone_weights)
    total = epochs * sum(len(samples) for samples in images.train.values())
    with progress_bar("decoder", total, quiet) as bar:

        def show(images: int, loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            bar.update(images)

        result = train_decoder(
            model,
            images,
            epochs=epochs,
            batch_size=batch_size,
            lr=lr,
            seed=seed,
            workers=how.workers,
            progress=show,
        )
    save_decoder(result, model, out)
    loss = result.history[-1]["loss"]
    print(f"trained {counted(epochs, 'epoch')}, loss {loss:.4f}: {out}")
    return report_failures([str(failure.error) for failure in result.failures])
