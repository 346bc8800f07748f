"""How much of a token's distance its reconstruction lets expect, without any defect."""

from __future__ import annotations

import torch
from torch import Tensor, nn

WIDTH = 128


class Uncertainty(nn.Module):
    """What the distances of one level are multiplied by: less where more of them is normal.

    Some normal tokens are hard to rebuild, such as edges and random texture, and the reconstruction
    shows which. A network of two hidden layers says from it the logarithm e of the distance that
    is expected, over the typical one (Mao et al., MICCAI 2020, divide by a predicted variance
    likewise). A distance is multiplied by ``exp(-power min(max(0, e), limit))``, where the limit
    is the highest e that normal tokens reach. Until the network is fitted on normal images
    (`rlr_fast.training.uncertainty`), that is 1.

    Args:
        channels: C of the tokens as they are compared.
        power: From 0, which changes nothing, to 1, which divides by all that is expected.
    """

    def __init__(self, channels: int, power: float) -> None:
        super().__init__()
        self.power = power
        self.network = nn.Sequential(
            nn.Linear(channels, WIDTH),
            nn.ReLU(),
            nn.Linear(WIDTH, WIDTH),
            nn.ReLU(),
            nn.Linear(WIDTH, 1),
        )
        for parameter in self.network[-1].parameters():
            nn.init.zeros_(parameter)
        self.requires_grad_(False)
        # A defect's reconstruction is none that was fitted.
        self.register_buffer("limit", torch.zeros(()))
        self.limit: Tensor

    def expected(self, rebuilt: Tensor) -> Tensor:
        """Return e (...) of reconstructed tokens (..., C), not limited."""
        log_ratio: Tensor = self.network(rebuilt)
        return log_ratio.squeeze(-1)

    def forward(self, rebuilt: Tensor) -> Tensor:
        """Return the factors (...) in (0, 1] of reconstructed tokens (..., C)."""
        with torch.autocast(rebuilt.device.type, enabled=False):  # as what is compared
            expected = self.expected(rebuilt.to(self.limit.dtype))
            return torch.exp(-self.power * torch.minimum(expected.clamp_min(0), self.limit))
