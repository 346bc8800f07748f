"""RLR as a model of anomalib: trained, tested and exported by its Engine."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from anomalib import LearningType
from anomalib.data import AnomalibDataset, Batch, InferenceBatch
from anomalib.deploy import CompressionType
from anomalib.models.components import AnomalibModule
from anomalib.pre_processing import PreProcessor
from torch import Tensor, nn
from torchvision.transforms.v2 import Resize, Transform

from rlr_fast.config import PRESETS, RLRConfig, TrainConfig, from_dict, suggest
from rlr_fast.data.images import ImageFailure
from rlr_fast.export.formats import OPENVINO_OPSET
from rlr_fast.models.checkpoint import fetch_checkpoint
from rlr_fast.models.rlr import RLRModel
from rlr_fast.training.distributed import Processes
from rlr_fast.training.run_dir import tell_unfinished
from rlr_fast.training.scales import fit_scales
from rlr_fast.training.score_fit import fit_score, score_is_fitted
from rlr_fast.training.steps import Steps

if TYPE_CHECKING:
    from anomalib.evaluator import Evaluator
    from anomalib.visualization import Visualizer

_log = logging.getLogger(__name__)


class Inference(nn.Module):
    """What anomalib calls and exports: images in, scores and maps out.

    Args:
        rlr: The model.
    """

    def __init__(self, rlr: RLRModel) -> None:
        super().__init__()
        self.rlr = rlr

    def forward(self, images: Tensor) -> InferenceBatch:
        """Return image scores (B,) and score maps (B, 1, H, W) of RGB images in [0, 1]."""
        output = self.rlr(images)
        return InferenceBatch(pred_score=output.score, anomaly_map=output.score_map)


class Rlr(AnomalibModule):
    """RLR for anomalib's Engine and command: train, test, predict, export.

    From the same seed, with `MultiCategory` and images of the model's size, the Engine trains the
    weights that ``rlr-fast train --cache none --calibration-share 0`` trains. Images of another
    size are resized by anomalib's bilinear filter, ours by Lanczos.

    Args:
        preset: Where the settings start, one of `rlr_fast.config.PRESETS`.
        model: Fields of `RLRConfig` that differ.
        recipe: Fields of `TrainConfig` that differ. The Engine trains for its ``epochs``; the data
            module's ``train_batch_size`` must be its ``batch_size``.
        pre_processor: See anomalib; by default images are resized to the model's image size. Pixels
            must stay in [0, 1]: the model normalizes by itself.
        post_processor: See anomalib.
        evaluator: See anomalib.
        visualizer: See anomalib.

    Raises:
        ValueError: There is no such preset, a field breaks its rule, or the pre-processor makes
            images of another size or range.
        BackboneWeightsError: The backbone's weights cannot be had.
    """

    def __init__(
        self,
        preset: str = "accurate",
        model: dict[str, Any] | None = None,
        recipe: dict[str, Any] | None = None,
        pre_processor: nn.Module | bool = True,
        post_processor: nn.Module | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        if preset not in PRESETS:
            raise ValueError(f"preset: there is no {preset!r}; {suggest(preset, PRESETS)}")
        start = PRESETS[preset]
        # Before the base class asks for the pre-processor.
        self.config = from_dict(RLRConfig, model or {}, start.model)
        self.config.require_whole("anomalib")
        self.recipe = from_dict(TrainConfig, recipe or {}, start.train)
        super().__init__(pre_processor, post_processor, evaluator, visualizer)
        _check_transform(self.transform, self.config.image_size)
        torch.manual_seed(self.recipe.seed)
        self.model = Inference(RLRModel(self.config))
        self.automatic_optimization = False
        self._steps: Steps | None = None
        self._left = 0
        self._optimizer_states: list[dict[str, Any]] | None = None

    @classmethod
    def from_run(cls, run: str | Path, backbone_weights: str | None = None, **options: Any) -> Rlr:
        """Return the model of a run, to test, predict or export.

        Args:
            run: Folder of a run, or name of a repository on the hub.
            backbone_weights: Where to take the backbone's weights from now, if not from where
                training did.
            options: Of anomalib: pre_processor and the like.

        Raises:
            CheckpointError: A file is missing or damaged, or the backbone's weights are not those
                that training had.
            BackboneWeightsError: The backbone's weights cannot be had.
            TrainingError: The run's record is damaged.
        """
        folder = fetch_checkpoint(run)
        tell_unfinished(folder)
        rlr: RLRModel = RLRModel.from_pretrained(folder, backbone_weights=backbone_weights)
        module = cls(model=rlr.config.to_dict(), **options)
        module.model.rlr.load_checkpoint_state(rlr.checkpoint_state())
        return module

    @property
    def rlr(self) -> RLRModel:
        """The model; its ``save_pretrained`` writes what ``rlr-fast`` reads."""
        rlr: RLRModel = self.model.rlr
        return rlr

    def configure_pre_processor(self, image_size: tuple[int, int] | None = None) -> PreProcessor:
        """Return what resizes images to the model's image size; the model normalizes by itself."""
        size = image_size or self.config.image_size
        return PreProcessor(transform=Resize(size, antialias=True))

    @property
    def transform(self) -> Transform | None:
        """What the pre-processor does to images, if it does anything."""
        return getattr(self.pre_processor, "transform", None)

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """The Engine's: as many epochs as the recipe has."""
        return {
            "max_epochs": self.recipe.epochs,
            "num_sanity_val_steps": 0,
        }

    @property
    def learning_type(self) -> LearningType:
        """Normal images alone are learned from."""
        return LearningType.ONE_CLASS

    def to_onnx(
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> Path:
        """Write an ONNX file as anomalib does, in opset 23 where no other is asked for.

        From anomalib's own default, 14, OpenVINO reads attention in tiles wrongly.
        """
        kwargs.setdefault("opset_version", OPENVINO_OPSET)
        return super().to_onnx(export_root, model_file_name, input_size, **kwargs)

    def to_openvino(
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        compression_type: CompressionType | None = None,
        **options: Any,
    ) -> Path:
        """Write OpenVINO's IR as anomalib does; ask OpenVINO for float32 to run it.

        Raises:
            ValueError: ``compression_type`` is one of 8-bit integers, which lose the small
                distances that tell anomalies.
        """
        if compression_type not in (None, CompressionType.FP16):
            raise ValueError(
                f"compression_type must be None or FP16, got {compression_type.value}: in 8 bits "
                "the score of an image says next to nothing"
            )
        path: Path = super().to_openvino(
            export_root, model_file_name, input_size, compression_type, **options
        )
        return path

    def configure_optimizers(self) -> None:
        """Leave the optimizers to the steps."""

    def on_train_start(self) -> None:
        """Prepare the steps; fit the features' scales to the training images.

        Raises:
            ValueError: The batches are not the recipe's, or there are several processes.
        """
        loader = self.trainer.train_dataloader
        if loader.batch_size != self.recipe.batch_size:
            raise ValueError(
                f"train_batch_size must be that of the recipe, {self.recipe.batch_size}, got "
                f"{loader.batch_size}"
            )
        if self.trainer.world_size > 1:
            raise ValueError("anomalib trains RLR in one process; torchrun ... rlr-fast in several")
        features = _DatasetFeatures(self, loader.dataset)
        self._steps = Steps(self.rlr, self.recipe, [len(features)], Processes())
        # What was loaded is gone on from if the Engine goes on from it, and starts anew otherwise.
        if self.trainer.ckpt_path is not None and self._optimizer_states is not None:
            for optimizer, state in zip(
                self._steps.optimizers, self._optimizer_states, strict=True
            ):
                optimizer.load_state_dict(state)
        else:
            fit_scales(self.rlr, features, Processes())
        self._optimizer_states = None

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Take a step.

        Raises:
            RuntimeError: The loss is not finite.
        """
        assert self._steps is not None
        step = self.current_epoch * self._steps.per_epoch + batch_idx
        losses, _ = self._steps.take(step, _features(self.rlr, batch.image))
        loss = losses.sum()
        if not loss.isfinite():
            raise RuntimeError(f"the loss is not finite at step {step}")
        self.log("train_loss", loss, prog_bar=True, batch_size=len(batch.image))
        # Lightning counts steps by its own optimizers, and writes checkpoints by the count.
        progress = self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
        progress.increment_ready()
        progress.increment_completed()

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """After the last step fit the score, if model or recipe say so.

        The validation of the last epoch, which sets anomalib's thresholds, comes after it.
        """
        assert self._steps is not None
        taken = self.current_epoch * self._steps.per_epoch + batch_idx + 1
        self._left = self.recipe.epochs * self._steps.per_epoch - taken
        if self._left == 0 and score_is_fitted(self.rlr.config, self.recipe):
            features = _DatasetFeatures(self, self.trainer.train_dataloader.dataset)
            fit_score(self.rlr, self.recipe, features, Processes())

    def on_train_end(self) -> None:
        """Tell that training was stopped before the end, where the score is fitted."""
        if self._left and score_is_fitted(self.rlr.config, self.recipe):
            _log.warning(
                "training was stopped %s steps before the end of the recipe, where the score is "
                "fitted",
                self._left,
            )

    def on_test_start(self) -> None:
        """Tell that scores have no scale yet."""
        self._tell_unscaled()

    def on_predict_start(self) -> None:
        """Tell that scores have no scale yet."""
        self._tell_unscaled()

    def _tell_unscaled(self) -> None:
        lowest = getattr(self.post_processor, "image_min", None)
        if lowest is not None and lowest.isnan():
            _log.warning(
                "the post-processor has no thresholds: scores stay as they are, labels and metrics "
                "of labels mean nothing; call engine.validate(model, datamodule=data) before"
            )

    def validation_step(self, batch: Batch, *_: Any, **__: Any) -> Batch:
        """Score a batch, for anomalib's thresholds."""
        return batch.update(**self.model(batch.image)._asdict())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the scores' settings and the optimizers' state, as plain values."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["rlr_config"] = self.rlr.config.to_json()
        if self._steps is not None:
            states = [optimizer.state_dict() for optimizer in self._steps.optimizers]
            checkpoint["rlr_optimizers"] = states

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take them up again."""
        super().on_load_checkpoint(checkpoint)
        config = RLRConfig.from_dict(json.loads(checkpoint["rlr_config"]))
        self.rlr.set_score(level_offsets=config.level_offsets, level_weights=config.level_weights)
        self._optimizer_states = checkpoint.get("rlr_optimizers")


class _DatasetFeatures:
    """Features of the images of one of anomalib's data sets, see `rlr_fast.training.features`."""

    def __init__(self, module: Rlr, dataset: AnomalibDataset) -> None:
        self._rlr, self._transform, self._dataset = module.rlr, module.transform, dataset
        self.failures: list[ImageFailure] = []  # anomalib reads all or raises

    def __len__(self) -> int:
        return len(self._dataset)

    def batches(self, rows: Sequence[Tensor], device: torch.device) -> Iterator[list[Tensor]]:
        """Yield the tokens [(B, N_j, C_j)], float32 on ``device``, of each group of rows (B,)."""
        for group in rows:
            images = torch.stack([self._dataset[int(i)].image for i in group])
            if self._transform is not None:
                images = self._transform(images)
            yield _features(self._rlr, images.to(device))


def _check_transform(transform: Transform | None, size: tuple[int, int]) -> None:
    """Refuse what makes other images than the model takes out of those that it takes.

    Raises:
        ValueError: Another size, or pixels beyond [0, 1].
    """
    if transform is None:
        return
    black_and_white = torch.stack([torch.zeros(3, *size), torch.ones(3, *size)])
    made = transform(black_and_white)
    if made.shape[-2:] != size:
        raise ValueError(
            f"pre_processor must make images of {size[0]} x {size[1]} pixels, the model's image "
            f"size, got {made.shape[-2]} x {made.shape[-1]}"
        )
    low, high = float(made.min()), float(made.max())
    if low < -1e-3 or high > 1 + 1e-3:
        raise ValueError(
            "pre_processor must leave pixels in [0, 1], because the model normalizes by itself; "
            f"it makes {low:.3g} to {high:.3g} of them"
        )


def _features(rlr: RLRModel, images: Tensor) -> list[Tensor]:
    """Return the tokens of images in [0, 1] as `rlr_fast.training.features` has them."""
    pixels = (255 * images).round().to(torch.uint8)
    return [t.to(torch.bfloat16).float() for t in rlr.tokens(pixels)]
