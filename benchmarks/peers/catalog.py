"""The peers by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.peers.methods import Method, NearestNeighbors, PaDiM, PatchCore
from rlr_fast.models.backbone import Backbone


@dataclass(frozen=True)
class Peer:
    """A method by name.

    Attributes:
        label: What it is, in a line.
        make: Makes it, on a backbone.
    """

    label: str
    make: Callable[[Backbone], Method]


PEERS: dict[str, Peer] = {
    "padim": Peer("PaDiM, one Gaussian a place for all classes", PaDiM),
    "patchcore-0.4": Peer("PatchCore, coreset of 0.4 %", lambda b: PatchCore(b, 0.004)),
    "patchcore-1": Peer("PatchCore, coreset of 1 %", lambda b: PatchCore(b, 0.01)),
    "patchcore-10": Peer("PatchCore, coreset of 10 %", lambda b: PatchCore(b, 0.1)),
    "nearest": Peer("nearest training token, cosine, all tokens", NearestNeighbors),
}
