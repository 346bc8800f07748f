"""A synthetic inspection data set, rendered on the spot in MVTec-AD's layout.

Ten products (five flat materials, five objects), eight kinds of defect with exact masks. Everything
is a pure function of the seed: no download, no font, no texture file.
"""

from __future__ import annotations

from rlr_fast.data.synthetic.make import CLASS_NAMES, make_dataset
from rlr_fast.data.synthetic.product import DEFECT_KINDS
from rlr_fast.data.synthetic.render import Sample, render_sample

__all__ = ["CLASS_NAMES", "DEFECT_KINDS", "Sample", "make_dataset", "render_sample"]
