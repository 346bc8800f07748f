"""The portable path of both operators: PyTorch's fused attention over tiles, in linear memory.

All scores are PyTorch's own fused attention, with an additive mask where a window is cut out:

- **LCA** (`lca`): the grid is cut into tiles of a few positions. A tile's queries see only its
  *halo*, the tile and ``window // 2`` positions around it.
- **MLKA** (`mlka`): chunks of queries against every key. On a CPU only the band of rows that a
  chunk's windows touch needs a mask; the other rows are a call without one, and both are joined by
  their log-sum-exp.

Masks (`masks`) are the sum or product of two tables, one an axis, which is quick to build. Small
ones are kept for the next step. A larger one lives only as long as its call and is built again in
the backward pass: memory is linear in N in both passes.
"""

from rlr_fast.ops.tiled.lca import local_cross_attention
from rlr_fast.ops.tiled.mlka import masked_learnable_key_attention

__all__ = ["local_cross_attention", "masked_learnable_key_attention"]
