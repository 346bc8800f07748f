"""The scale of the features that a model reconstructs: fitted to its training set, once."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from rlr_fast.models.rlr import RLRModel
from rlr_fast.models.standardization import Components, Standardize
from rlr_fast.training.distributed import Processes
from rlr_fast.training.features import Features

_BATCH = 64


@torch.no_grad()
def fit_scales(model: RLRModel, features: Features, processes: Processes) -> None:
    """Fit what the configuration asks for of standardization and components, in float64.

    Args:
        model: Its levels' figures are set, to the same in all processes.
        features: Normal images' features, this process's share.
        processes: Those that share the images.
    """
    if model.config.standardize:
        _fit_standardization(model, features, processes)
    if any(model.config.components):
        _fit_components(model, features, processes)


def _with_float64(device: torch.device) -> torch.device:
    """Return the device, or the CPU for Apple's GPUs, which have no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def _fit_standardization(model: RLRModel, features: Features, processes: Processes) -> None:
    device, sum_device = model.device, _with_float64(model.device)
    modules = [cast(Standardize, module) for module in model.standardize]
    sums = [torch.zeros(2, len(m.mean), dtype=torch.float64, device=sum_device) for m in modules]
    with processes.together():
        for tokens in features.batches(torch.arange(len(features)).split(_BATCH), device):
            for total, level in zip(sums, tokens, strict=True):
                values = level.flatten(0, 1).to(sum_device).double()
                total += torch.stack((values.sum(0), values.square().sum(0)))
    shares = processes.all_gather((len(features), [total.cpu() for total in sums]))
    images = sum(count for count, _ in shares)
    for j, (module, (height, width)) in enumerate(zip(modules, model.backbone.grids, strict=True)):
        total = torch.stack([share[j] for _, share in shares]).sum(0)
        mean, mean_square = total / (images * height * width)
        std = (mean_square - mean.square()).clamp_min(0).sqrt()
        module.fit(mean.float(), std.float())


def _fit_components(model: RLRModel, features: Features, processes: Processes) -> None:
    device, sum_device = model.device, _with_float64(model.device)
    modules = {j: m for j, m in enumerate(model.components) if isinstance(m, Components)}
    sums = {
        j: torch.zeros(len(m.mean), len(m.mean) + 1, dtype=torch.float64, device=sum_device)
        for j, m in modules.items()
    }
    with processes.together():
        for tokens in features.batches(torch.arange(len(features)).split(_BATCH), device):
            for j, total in sums.items():
                values = model.standardize[j](tokens[j]).flatten(0, 1).to(sum_device).double()
                total += values.T @ F.pad(values, (0, 1), value=1)  # products, and sums
    shares = processes.all_gather((len(features), {j: t.cpu() for j, t in sums.items()}))
    images = sum(count for count, _ in shares)

    def fitted() -> dict[int, dict[str, Tensor]]:
        for j, module in modules.items():
            height, width = model.backbone.grids[j]
            total = torch.stack([share[j] for _, share in shares]).sum(0)
            moments = total / (images * height * width)
            mean = moments[:, -1]
            module.fit(mean, moments[:, :-1] - torch.outer(mean, mean))
        return {j: {k: v.cpu() for k, v in m.state_dict().items()} for j, m in modules.items()}

    # By one process: on another processor the same moments may have other eigenvectors.
    for j, state in processes.broadcast(fitted).items():
        modules[j].load_state_dict(state)
