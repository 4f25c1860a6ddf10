"""One offline page that shows what a comparison found, or how far it is."""

from loraplus.report.page import render

__all__ = ["render"]
