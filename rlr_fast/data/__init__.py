"""Data sets on disk: reading, decoding and checking them; files, and threads that write them.

May import `config`, `files` and `functional`, and does not know of models.
"""

from __future__ import annotations

from rlr_fast.data.check import ClassReport, Problem, Report, check_dataset, format_report
from rlr_fast.data.images import (
    ImageBatch,
    ImageFailure,
    UnreadableImageError,
    UnscoredImageError,
    iterate_images,
    load_image,
    load_sample_mask,
    open_image,
    read_image_size,
    resize_image,
)
from rlr_fast.data.layouts import (
    LAYOUTS,
    DataSet,
    Sample,
    list_images,
    pick_samples,
    read_dataset,
)

__all__ = [
    "LAYOUTS",
    "ClassReport",
    "DataSet",
    "ImageBatch",
    "ImageFailure",
    "Problem",
    "Report",
    "Sample",
    "UnreadableImageError",
    "UnscoredImageError",
    "check_dataset",
    "format_report",
    "iterate_images",
    "list_images",
    "load_image",
    "load_sample_mask",
    "open_image",
    "pick_samples",
    "read_dataset",
    "read_image_size",
    "resize_image",
]
