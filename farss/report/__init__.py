"""Artifacts -> figures and one HTML page. Knows no model and no network: any machine can draw a report, at any time."""

from farss.report.folder import Comparison, Run, read_comparison, read_run
from farss.report.page import write_report
from farss.report.tables import comparison_csv, comparison_markdown

__all__ = [
    "Comparison",
    "Run",
    "comparison_csv",
    "comparison_markdown",
    "read_comparison",
    "read_run",
    "write_report",
]
