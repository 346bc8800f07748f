"""The peers by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.peers.methods import Method, NearestNeighbors, PaDiM, PatchCore
from benchmarks.peers.transformers import Dinomaly, InpFormer, Training
from rlr_fast.models.backbone import Backbone


@dataclass(frozen=True)
class Peer:
    """A method by name.

    Attributes:
        label: What it is, in a line.
        make: Makes it, on a backbone; takes the `Training`, too, where it is trained.
        is_trained: By gradient steps, on a ViT.
    """

    label: str
    make: Callable[..., Method]
    is_trained: bool = False


def make_peer(name: str, backbone: Backbone, training: Training) -> Method:
    """Make a peer.

    Raises:
        ValueError: It cannot work on the backbone, or so few steps.
        ModuleNotFoundError: It needs anomalib.
    """
    peer = PEERS[name]
    return peer.make(backbone, training) if peer.is_trained else peer.make(backbone)


PEERS: dict[str, Peer] = {
    "padim": Peer("PaDiM, one Gaussian a place for all classes", PaDiM),
    "patchcore-0.4": Peer("PatchCore, coreset of 0.4 %", lambda b: PatchCore(b, 0.004)),
    "patchcore-1": Peer("PatchCore, coreset of 1 %", lambda b: PatchCore(b, 0.01)),
    "patchcore-10": Peer("PatchCore, coreset of 10 %", lambda b: PatchCore(b, 0.1)),
    "nearest": Peer("nearest training token, cosine, all tokens", NearestNeighbors),
    "dinomaly": Peer("Dinomaly, trained on all classes", Dinomaly, is_trained=True),
    "inp-former": Peer("INP-Former, trained on all classes", InpFormer, is_trained=True),
}
