"""Fits how much of a token's distance its reconstruction lets expect, after training."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from rlr_fast.models.rlr import RLRModel
from rlr_fast.models.uncertainty import Uncertainty
from rlr_fast.training.distributed import Processes
from rlr_fast.training.features import Features

_IMAGES = 16
# Tokens of a level that the fit sees, drawn from all images alike, and how it sees them: fewer
# tokens are not seen more often, for they would be learned by heart.
_SAMPLE = 2**17
_STEPS, _PASSES, _BATCH, _LR = 2000, 16, 1024, 3e-3
# Smallest deviation of a channel, over the root mean square of all: what bfloat16 resolves.
_RESOLUTION = 2**-7
# Share of the normal tokens whose expectation counts whole.
_LIMIT = 0.999


def fit_uncertainty(
    model: RLRModel, features: Features, processes: Processes, seed: int = 0
) -> None:
    """Fit a trained model's `Uncertainty` to normal images, where it has one.

    The logarithm of the distance is fitted in the mean square. The main process fits, and all get
    its result.

    Args:
        model: The trained model.
        features: Its training features, this process's share.
        processes: Those that share the images.
        seed: Of the tokens that are drawn, and of the fit.
    """
    if not model.uncertainty:
        return
    sampled = _sample(model, features, processes, seed)
    levels = cast("list[Uncertainty]", list(model.uncertainty))

    def fit() -> list[dict[str, Tensor]]:
        assert sampled is not None
        generator = torch.Generator().manual_seed(seed)
        for level, tokens in zip(levels, sampled, strict=True):
            _fit(level, *tokens, generator)
        return [{k: v.cpu() for k, v in level.state_dict().items()} for level in levels]

    for level, state in zip(levels, processes.broadcast(fit), strict=True):
        level.load_state_dict(state)


@torch.no_grad()
def _sample(
    model: RLRModel, features: Features, processes: Processes, seed: int
) -> list[tuple[Tensor, Tensor]] | None:
    """Return per level reconstructed tokens (n, C) and their distances (n,), in the main process.

    All images give equally many, at random places.
    """
    images = sum(processes.all_gather(len(features)))
    generator = torch.Generator().manual_seed(seed)
    model.eval().prepare_for_inference()
    with processes.together():
        parts: list[list[tuple[Tensor, Tensor]]] = [[] for _ in model.levels]
        rows = torch.arange(len(features)).split(_IMAGES)
        for tokens in features.batches(rows, model.device):
            for part, (rebuilt, distances) in zip(parts, model.compare(tokens), strict=True):
                count = min(distances.shape[1], math.ceil(_SAMPLE / images))
                places = torch.rand(distances.shape, generator=generator).topk(count).indices
                chosen = places.to(distances.device)
                part.append(
                    (
                        torch.take_along_dim(rebuilt, chosen[..., None], 1).flatten(0, 1).cpu(),
                        torch.take_along_dim(distances, chosen, 1).flatten().cpu(),
                    )
                )
    shares = processes.gather(parts)
    if shares is None:
        return None
    sampled = []
    for level in zip(*shares, strict=True):
        batches = [batch for part in level for batch in part]
        rebuilt = torch.cat([seen for seen, _ in batches]).float()
        sampled.append((rebuilt, torch.cat([distances for _, distances in batches]).float()))
    return sampled


def _fit(
    uncertainty: Uncertainty, rebuilt: Tensor, distances: Tensor, generator: torch.Generator
) -> None:
    device = uncertainty.limit.device
    mean, std = rebuilt.mean(0), rebuilt.std(0)
    std = std.maximum(_RESOLUTION * rebuilt.square().mean().sqrt())
    std = torch.where(std > 0, std, torch.ones_like(std))
    seen = ((rebuilt - mean) / std).to(device)
    wanted = distances.clamp_min(torch.finfo(distances.dtype).tiny).log()
    wanted = (wanted - wanted.mean()).to(device)
    linear = [layer for layer in uncertainty.network if isinstance(layer, nn.Linear)]
    for layer in linear[:-1]:
        weight = nn.init.kaiming_uniform_(torch.empty(layer.weight.shape), generator=generator)
        layer.weight.copy_(weight)
        layer.bias.zero_()
    linear[-1].weight.zero_()
    linear[-1].bias.zero_()
    batch = min(_BATCH, len(seen))
    steps = min(_STEPS, _PASSES * len(seen) // batch)
    optimizer = torch.optim.AdamW(uncertainty.requires_grad_().parameters(), lr=_LR, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LR, steps)
    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        for _ in range(steps):
            rows = torch.randint(len(seen), (batch,), generator=generator).to(device)
            loss = (uncertainty.expected(seen[rows]) - wanted[rows]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    uncertainty.requires_grad_(False)
    expected = torch.cat([uncertainty.expected(part) for part in seen.split(2**16)])
    uncertainty.limit.copy_(expected.cpu().double().quantile(_LIMIT).clamp_min(0))
    # From now on the network takes tokens as they are.
    linear[0].bias.sub_(linear[0].weight @ (mean / std).to(device))
    linear[0].weight.div_(std.to(device))
