"""Reports how far long work on data has come. Work of a few seconds is not reported."""

from __future__ import annotations

import logging
import time

_LOG = logging.getLogger(__name__)
_FIRST, _BETWEEN = 3.0, 10.0


class ProgressLog:
    """Logs "what: 200,000 of 1,000,000" at level INFO, at most every ten seconds; the command line shows it.

    Args:
        what: is done, such as "tokenising".
        total: of which `advance` counts, if it is known.
    """

    def __init__(self, what: str, total: int | None = None) -> None:
        self._what, self._total, self._done = what, total, 0
        self._next = time.monotonic() + _FIRST

    def advance(self, count: int = 1) -> None:
        """Counts so many more as done."""
        self._done += count
        if time.monotonic() >= self._next and self._done != self._total:
            self._next = time.monotonic() + _BETWEEN
            of = "" if self._total is None else f" of {self._total:,}"
            _LOG.info("%s: %s%s", self._what, f"{self._done:,}", of)
