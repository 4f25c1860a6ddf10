"""One offline page that shows what a comparison found."""

from loraplus.report.page import render

__all__ = ["render"]
