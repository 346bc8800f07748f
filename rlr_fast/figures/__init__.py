"""Pictures: score maps, sample sheets, loss curves.

Nothing here uses pyplot: no window, no global state, safe in a server and in threads.
"""

from __future__ import annotations

from rlr_fast.figures.curves import loss_curve
from rlr_fast.figures.heat_maps import Scale, heat_map, overlay, prediction_picture
from rlr_fast.figures.sheets import SheetRow, sample_sheet

__all__ = [
    "Scale",
    "SheetRow",
    "heat_map",
    "loss_curve",
    "overlay",
    "prediction_picture",
    "sample_sheet",
]
