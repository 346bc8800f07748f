"""A model as a checkpoint folder: how it is saved, loaded, and named on the hub."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import ModelHubMixin
from torch import Tensor, nn

from rlr_fast.config import RLRConfig
from rlr_fast.files import write_atomically, write_tensors
from rlr_fast.functional import DTYPES, Backend
from rlr_fast.models.backbone import Backbone
from rlr_fast.models.checkpoint import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    CheckpointError,
    fetch_checkpoint,
    load_config,
    read_weights,
    sealed,
)

Model = TypeVar("Model", bound="Pretrained")

# What `push_to_hub` says of a model without its run; `rlr-fast publish` knows more.
_CARD = """---
{{ card_data }}
---

Finds defects in images: a model of RLR (ECCV 2024, *Learning Unified Reference Representation for
Unsupervised Multi-class Anomaly Detection*), trained with the package rlr_fast on normal images.

```python
from rlr_fast import RLRModel

model = RLRModel.from_pretrained("OWNER/NAME")  # as on top of this page
```

What it was trained on, how good it is and its thresholds are in the card that `rlr-fast publish`
makes of a run.
"""


class Pretrained(
    nn.Module,
    ModelHubMixin,
    library_name="rlr_fast",
    tags=["anomaly-detection", "image-segmentation"],
    pipeline_tag="image-segmentation",
    model_card_template=_CARD,
):
    """A model whose checkpoint folder has ``config.json`` and ``model.safetensors``.

    The weights are all tensors but those of the frozen backbone.

    Attributes:
        config: What the model is built from.
        backbone: Frozen feature network.
    """

    config: RLRConfig
    backbone: Backbone

    def checkpoint_state(self) -> dict[str, Tensor]:
        """Return the tensors that a checkpoint keeps: everything but the frozen backbone."""
        return {k: v for k, v in self.state_dict().items() if not k.startswith("backbone.")}

    def load_checkpoint_state(self, state: dict[str, Tensor]) -> None:
        """Load what `checkpoint_state` gave.

        Raises:
            CheckpointError: The tensors are not this model's, or not finite.
        """
        for name, tensor in state.items():
            known = tensor.dtype in DTYPES or not (
                tensor.is_floating_point() or tensor.is_complex()
            )
            if not known:
                raise CheckpointError(f"{name} is of {tensor.dtype}, which no weights are of")
            if not tensor.isfinite().all():
                raise CheckpointError(f"the weights must be finite, and {name} is not")
        ours = {name: tensor.shape for name, tensor in self.checkpoint_state().items()}
        wrong = sorted(ours.keys() ^ state.keys())
        wrong += [
            f"{name} is {tuple(state[name].shape)}, not {tuple(shape)}"
            for name, shape in ours.items()
            if name in state and state[name].shape != shape
        ]
        if wrong:
            raise CheckpointError(
                f"the weights do not fit the configuration: {', '.join(wrong[:5])}"
            )
        self.load_state_dict(state, strict=False)

    def checkpoint_metadata(self) -> dict[str, str]:
        """Return what the weights file says of itself."""
        return {"backbone_fingerprint": self.backbone.fingerprint}

    def check_backbone(self, metadata: dict[str, str] | None, source: object) -> None:
        """Refuse weights that were trained on another backbone's features.

        Raises:
            CheckpointError: The fingerprints differ.
        """
        trained_on = (metadata or {}).get("backbone_fingerprint", "")
        if trained_on != self.backbone.fingerprint:
            raise CheckpointError(
                f"{source} was trained on other weights of {self.config.backbone!r} "
                f"(fingerprint {trained_on[:12] or 'missing'}, here "
                f"{self.backbone.fingerprint[:12]} from {self.config.backbone_weights!r})"
            )

    def _save_pretrained(self, save_directory: Path) -> None:
        state = self.checkpoint_state()
        write_atomically(save_directory / CONFIG_FILE, self.config.to_json())
        write_tensors(
            save_directory / WEIGHTS_FILE, state, sealed(state, self.checkpoint_metadata())
        )

    @classmethod
    def from_pretrained(
        cls: type[Model], pretrained_model_name_or_path: str | Path, **options: Any
    ) -> Model:
        """Load a checkpoint from a folder, or by its name on the hub; returned in eval mode.

        Args:
            pretrained_model_name_or_path: Folder of a run, or name of a repository, OWNER/NAME or
                OWNER/NAME@REVISION.
            options: ``backend`` of the attention; ``backbone_weights``, where to take the
                backbone's weights from now; and the hub's ``revision``, ``token``, ``cache_dir``,
                ``force_download``, ``local_files_only``.

        Raises:
            CheckpointError: A file is missing or damaged, or was trained on other backbone weights.
            BackboneWeightsError: The backbone's weights cannot be had.
            BackendError: The backend has no operator for the width of a head.
            TypeError: There is no such option.
        """
        hub = ("revision", "token", "cache_dir", "force_download", "local_files_only")
        given = {name: options.pop(name) for name in hub if name in options}
        unknown = sorted(options.keys() - {"backend", "backbone_weights"})
        if unknown:
            raise TypeError(f"from_pretrained has no option {', '.join(unknown)}")
        folder = fetch_checkpoint(pretrained_model_name_or_path, **given)
        load_config(folder / CONFIG_FILE)  # the mixin would meet a broken one with a traceback
        model: Model = super().from_pretrained(folder, **options)
        return model

    @classmethod
    def _from_pretrained(
        cls: type[Model],
        *,
        model_id: str,
        backend: Backend = "auto",
        backbone_weights: str | None = None,
        **unused: Any,
    ) -> Model:
        folder = Path(model_id)  # of `from_pretrained`
        config = load_config(folder / CONFIG_FILE)
        if backbone_weights is not None:
            config = dataclasses.replace(config, backbone_weights=backbone_weights)
        state, metadata = read_weights(folder / WEIGHTS_FILE)
        model = cls(config, backend=backend)
        model.check_backbone(metadata, model_id)
        try:
            model.load_checkpoint_state(state)
        except CheckpointError as error:
            raise CheckpointError(f"{model_id}: {error}") from error
        return model.eval()
