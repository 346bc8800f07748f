"""The graph that a file holds: uint8 images to score maps, scores and, calibrated, decisions."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.nn.utils.rnn import pad_sequence

from rlr_fast import __version__
from rlr_fast.config import Backend
from rlr_fast.export.resize import LanczosResize
from rlr_fast.inference.decisions import Decider, Rule
from rlr_fast.models.environment import package_version
from rlr_fast.models.reconstructor import Reconstructor
from rlr_fast.models.rlr import RLRModel
from rlr_fast.training.calibration import scoring_identity

# Tokens of a level up to which a graph may compute the definition of attention, with all scores.
# It has the fewest nodes, and runtimes recognize nothing in it that they would then replace. On
# larger grids scores are what takes time and memory: there it has the tiles of the portable path.
DENSE_TOKENS = 1024


class ExportGraph(nn.Module):
    """A model from images to named outputs, on a CPU in float32.

    Args:
        model: A trained model; it is copied.
        decider: Rules that decide the images; None leaves decisions out.
        classes: Those whose rules are the columns of the decisions, before the pooled one.
        input_size: (H, W) of the images, which the graph resizes; None for the model's image size.
        attention: Backend of attention up to `DENSE_TOKENS`; above it is ``tiled``.

    Raises:
        ValueError: The model is compiled, or of another dtype than float32.
    """

    def __init__(
        self,
        model: RLRModel,
        decider: Decider | None,
        classes: Sequence[str],
        *,
        input_size: tuple[int, int] | None = None,
        attention: Backend = "dense",
    ) -> None:
        super().__init__()
        if model.compiled_batch is not None:
            raise ValueError("model must be eager to be exported, got a compiled one")
        dtypes = {parameter.dtype for parameter in model.parameters()} - {torch.float32}
        if dtypes:
            raise ValueError(f"model must be of float32 to be exported, got {dtypes.pop()}")
        self.model = copy.deepcopy(model).to("cpu").eval()
        levels = cast("list[Reconstructor]", list(self.model.levels))
        tokens = max(level.reference.shape[-2] for level in levels)
        self.model.set_backend(attention if tokens <= DENSE_TOKENS else "tiled")
        size = model.config.image_size
        self.input_size = input_size or size
        self.resize = None if self.input_size == size else LanczosResize(self.input_size, size)
        self.decides = decider is not None
        if decider is not None:
            rules = columns(decider, classes)
            # In the unit of the model's scores, and rounded as the threshold, which is one of them.
            scores = [torch.tensor([s * r.unit for s in r.scores.image]) for r in rules]
            self.calibration = nn.Buffer(pad_sequence(scores, True, padding_value=-torch.inf))
            self.images = nn.Buffer(torch.tensor([float(len(row)) for row in scores]))
            self.ones = nn.Buffer(torch.ones(self.calibration.shape[1]))
            self.threshold = nn.Buffer(torch.tensor([rule.threshold for rule in rules]))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return ``score_map`` (B, H, W), ``score`` (B,), and decisions of K classes and the pool.

        Decisions are ``p_value`` and ``anomalous``, both (B, K + 1), see `columns`.

        Args:
            images: (B, H, W, 3) RGB, uint8, of ``input_size``.
        """
        images = images.permute(0, 3, 1, 2)
        if self.resize is not None:
            images = self.resize(images).to(torch.uint8)
        output = self.model(images)
        outputs = {"score_map": output.score_map[:, 0], "score": output.score}
        if self.decides:
            score = output.score[:, None]
            # A product, for OpenVINO 2026.4 divides a sum of comparisons wrongly.
            at_least = (self.calibration >= score[:, :, None]).float() @ self.ones
            outputs["p_value"] = (1 + at_least) / (1 + self.images)
            outputs["anomalous"] = score > self.threshold
        return outputs

    @property
    def output_names(self) -> list[str]:
        """The names of the outputs, in their order."""
        return ["score_map", "score", *(["p_value", "anomalous"] if self.decides else [])]

    def trace(self) -> ExportedProgram:
        """Return the program of the graph, for any batch size."""
        images = torch.zeros(2, *self.input_size, 3, dtype=torch.uint8)
        with torch.no_grad():
            self.model.prepare_for_inference()
            program = torch.export.export(self, (images,), dynamic_shapes=({0: Dim("batch")},))
        for module in program.graph_module.modules():
            for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
                node.meta.pop("stack_trace", None)  # files would hold the paths of this machine
        return program


def columns(decider: Decider, classes: Sequence[str]) -> list[Rule]:
    """Return the rules that are the columns of decisions: of each class, and of all pooled.

    Raises:
        ValueError: A rule cannot decide; the message says what would help.
    """
    reason = decider.undecided([*classes, None])
    if reason is not None:
        raise ValueError(reason)
    return [rule for rule in map(decider.rule, [*classes, None]) if rule is not None]


def describe(
    model: RLRModel,
    decider: Decider | None,
    classes: Sequence[str],
    input_size: tuple[int, int] | None = None,
) -> str:
    """Return what a file says of itself, as JSON text.

    ``input_size`` is what the file takes, ``tile`` what an image shows of a picture, in its pixels
    (null: all of it), ``overlap`` what neighboring tiles share at least. ``classes`` are those of
    the run, ``alpha`` and ``thresholds`` the decisions' (null and empty without decisions), a
    threshold per column. ``model`` is all that decides a score.
    """
    thresholds = []
    if decider is not None:
        rules = columns(decider, classes)
        thresholds = [
            {"class": name, "score": rule.threshold, "pixel": rule.pixel_threshold}
            for name, rule in zip([*classes, None], rules, strict=True)
        ]
    config = model.config
    about: dict[str, Any] = {
        "rlr_fast": __version__,
        "torch": package_version("torch"),
        "image_size": list(config.image_size),
        "input_size": list(input_size or config.image_size),
        "tile": config.tiles and list(config.tiles.size),
        "overlap": config.tiles and list(config.tiles.overlap),
        "images": "uint8 RGB (B, H, W, 3), resized by Pillow's Lanczos filter to input_size",
        "classes": list(classes),
        "alpha": None if decider is None else decider.alpha,
        "thresholds": thresholds,
        "backbone_fingerprint": model.backbone.fingerprint,
        "model": scoring_identity(model),
    }
    return json.dumps(about)
