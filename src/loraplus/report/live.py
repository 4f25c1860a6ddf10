"""The page of a comparison under way: what has finished so far. It loads itself again until the report is there."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from loraplus.files.single import write_atomically
from loraplus.report import plots
from loraplus.report.page import template
from loraplus.study.arms import ALL
from loraplus.study.records import Record
from loraplus.study.runner import Event
from loraplus.tasks.command_line import command_of_settings
from loraplus.tasks.measures import ACCURACY, measures_of

_TEMPLATE = "running.html.jinja"
SECONDS_BETWEEN_PAGES = 2.0


class LivePage:
    """Called with every event of a study; writes the page whenever runs have finished, and passes the event on.

    Args:
        path: of the page.
        settings: of the comparison.
        records: gives those of all finished runs.
        progress: called with every event, too.
    """

    def __init__(
        self,
        path: Path,
        settings: dict[str, Any],
        records: Callable[[], Iterable[Record]],
        progress: Callable[[Event], None] | None = None,
    ) -> None:
        self._path, self._settings, self._records, self._progress = path, settings, records, progress
        self._written = -SECONDS_BETWEEN_PAGES
        self._is_new = True

    def __call__(self, event: Event) -> None:
        if self._progress:
            self._progress(event)
        self._is_new |= event.kind in ("planned", "finished")
        if self._is_new and time.monotonic() - self._written >= SECONDS_BETWEEN_PAGES:
            self._is_new, self._written = False, time.monotonic()
            write_atomically(self._path, self._page(event))

    def _page(self, event: Event) -> str:
        records = list(self._records())
        return template(_TEMPLATE).render(
            done=event.done,
            planned=event.planned,
            config=self._settings,
            command=command_of_settings("compare", self._settings),
            time=time.strftime("%H:%M:%S"),
            records=records,
            titles={arm: info.title for arm, info in ALL.items()},
            has_accuracy=ACCURACY in measures_of(self._settings),
            curves=plots.curves(records),
            rates=plots.rates(records, {}),
        )
