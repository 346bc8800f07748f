"""MLKA: attention to the keys outside a window, with keys that the batch shares.

    output_i = Σ_j softmax_j(q_i · k_j) v_j     over the keys j outside the window of token i

query (B, h, N, d); key (h, N, d) as `prepare_key` leaves it (centered, in log2 units); value
(B, h, N, d), or (h, N, d). A row whose window covers the grid has no key: output 0 and no gradient.
Backward, with P the weights and lse their log2-sum-exp2:

    dV = Pᵀ dO,   dS = P ∘ (dO Vᵀ - delta),   delta_i = dO_i · O_i,   dQ = ln2 · dS K,
    dK = ln2 · Σ_batch dSᵀ Q

Tokens are taken in raster order. The windows of a block of queries lie in one range of keys, the
only one that tests for them; the keys before and after it are one loop that skips it. A block of
keys meets its queries in the same way.

- forward: a program owns a block of queries of one image and head.
- backward: a program owns a block of keys of one head and a chunk of the batch. dV is finished per
  image; dK stays in registers over the chunk, and the few chunks are summed in order. dQ is stored
  where one program holds all keys. Else it is a sum over programs: float32 atomics, or,
  deterministically, a second kernel that owns queries.

With INSIDE the same kernels attend to the keys inside the window: LCA, for windows too large for
`rlr_fast.kernels.lca` to hold.
"""

from __future__ import annotations

from rlr_fast.kernels.mlka.backward import launch_backward
from rlr_fast.kernels.mlka.forward import launch_forward
from rlr_fast.kernels.mlka.op import masked_learnable_key_attention

__all__ = ["launch_backward", "launch_forward", "masked_learnable_key_attention"]
