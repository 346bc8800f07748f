"""A page of scored images, for a browser: counts at a movable threshold, curves and a gallery.

May import what `visualization` may. `writer` gathers rows and writes the page, `thumbnails` makes
its small pictures, and `page` puts it together from the files beside it: `page.html`, `style.css`,
and the scripts, which load nothing from anywhere.
"""

from __future__ import annotations

from rlr_fast.visualization.report.writer import (
    REPORT_FILE,
    REPORT_FOLDER,
    ReportImage,
    ReportWriter,
    check_report,
)

__all__ = ["REPORT_FILE", "REPORT_FOLDER", "ReportImage", "ReportWriter", "check_report"]
