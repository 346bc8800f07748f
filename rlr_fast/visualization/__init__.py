"""Pictures: score maps, sample sheets, sheets of reconstructions, loss curves, a page of them.

May import `data`, `models` and what lies below them: training draws its curve, evaluation its
sheets and prediction its maps, so the drawing lies below those who draw.

Nothing here uses pyplot: no window, no global state, safe in a server and in threads.
"""

from __future__ import annotations

from rlr_fast.visualization.comparisons import ComparisonRow, RunView, comparison_sheet
from rlr_fast.visualization.curves import loss_curve
from rlr_fast.visualization.heat_maps import Scale, prediction_picture
from rlr_fast.visualization.principal import PrincipalColors
from rlr_fast.visualization.sheets import SheetRow, sample_sheet

__all__ = [
    "ComparisonRow",
    "PrincipalColors",
    "RunView",
    "Scale",
    "SheetRow",
    "comparison_sheet",
    "loss_curve",
    "prediction_picture",
    "sample_sheet",
]
