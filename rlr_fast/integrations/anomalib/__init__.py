"""RLR as a model of anomalib, and a data module of several classes for it.

Needs anomalib 2.7 or later (``pip install 'rlr_fast[anomalib]'``).
"""

from rlr_fast.integrations.anomalib.data import MultiCategory, MultiCategoryDataset
from rlr_fast.integrations.anomalib.model import Inference, Rlr

__all__ = ["Inference", "MultiCategory", "MultiCategoryDataset", "Rlr"]
