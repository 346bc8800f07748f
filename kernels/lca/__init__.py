"""LCA: attention to the keys inside a window, with keys and values that the batch shares.

    output_i = Σ_j softmax_j(q_i · k_j) v_j     over the keys j in the clipped window of token i

query (B, h, N, d); key (h, N, d) as `prepare_key` leaves it (centered, in log2 units); value
(h, N, d). No row is empty. Backward, with P the weights:

    dS = P ∘ (dO Vᵀ - delta),   delta_i = Σ_j P_ij (dO Vᵀ)_ij,   dQ = ln2 · dS K,
    dK = ln2 · Σ_batch dSᵀ Q,   dV = Σ_batch Pᵀ dO

Keys and values have no batch, so the rows of a score tile are (image, position) pairs: a program
owns a few positions of one head, keeps the keys and values around them (the halo) in shared memory,
and walks over the batch. Few positions have a small halo, so that hardly a product is wasted. Which
position sees which key is the same for every image: it is added to the scores as one more matrix
product, one-hot(position) @ bias.

All keys of a row are at hand, so backward needs Q and dO alone: it recomputes the softmax. dK and
dV stay in registers over the batch; halos overlap, so their sums go to float32 atomics, or,
deterministically, to partial halos that a second kernel gathers in order.

Windows whose halo is too large to keep go to the raster kernels of `rlr_fast.kernels.mlka`.
"""

from __future__ import annotations

from rlr_fast.kernels.lca._halo import saves_nothing
from rlr_fast.kernels.lca.backward import launch_backward
from rlr_fast.kernels.lca.forward import launch_forward
from rlr_fast.kernels.lca.op import local_cross_attention

__all__ = ["launch_backward", "launch_forward", "local_cross_attention", "saves_nothing"]
