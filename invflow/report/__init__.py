"""Reports: what a run is, how it was trained and how accurately it runs backwards, as one HTML page."""

from __future__ import annotations

from .write import REPORT, report_on, write_report

__all__ = ["REPORT", "report_on", "write_report"]
