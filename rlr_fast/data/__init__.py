"""Data sets on disk: reading, decoding and checking them; files, and threads that write them.

May import `models`, for where the program runs, and what lies below it.
"""

from __future__ import annotations

from rlr_fast.data.check import ClassReport, Problem, Report, check_dataset, format_report
from rlr_fast.data.images import (
    ImageBatch,
    ImageFailure,
    UnreadableImageError,
    iterate_images,
    iterate_pictures,
    load_image,
    load_mask,
    load_sample_mask,
    open_image,
    read_image_size,
    resize_image,
)
from rlr_fast.data.layouts import (
    LAYOUTS,
    DataSet,
    Sample,
    describe_images,
    detect_layout,
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
    "check_dataset",
    "describe_images",
    "detect_layout",
    "format_report",
    "iterate_images",
    "iterate_pictures",
    "list_images",
    "load_image",
    "load_mask",
    "load_sample_mask",
    "open_image",
    "pick_samples",
    "read_dataset",
    "read_image_size",
    "resize_image",
]
