"""The HTML report of evaluation runs: a single self-contained page."""

from dtta_fast.report.page import make_page
from dtta_fast.report.reading import Run, read_runs

__all__ = ["Run", "make_page", "read_runs"]
