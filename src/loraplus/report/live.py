"""The page of something under way: what there is so far. It loads itself again until the report is there."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from loraplus.errors import InputError
from loraplus.files.single import write_atomically
from loraplus.report import plots
from loraplus.report.page import template
from loraplus.study.arms import ALL
from loraplus.study.runner import Event
from loraplus.study.wording import counted
from loraplus.tasks.command_line import command_of_settings
from loraplus.tasks.measures import measures_of

_LOG = logging.getLogger(__name__)
_TEMPLATE = "running.html.jinja"
SECONDS_BETWEEN_PAGES = 2.0


def running_page(headline: str, **parts: Any) -> str:
    """A page that loads itself again every five seconds.

    Args:
        headline: how far it is.
        **parts: `about`, `command`, `charts`; and `records` with `titles`, `measures` and `of_lengths`, or a
            `table`.
    """
    return template(_TEMPLATE).render(headline=headline, time=time.strftime("%H:%M:%S"), **parts)


class LiveFile:
    """A page that is written now and then. One that cannot be written is told once, and ends nothing.

    Args:
        path: of the page.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._written = -SECONDS_BETWEEN_PAGES
        self._is_told = False

    def write(self, page: Callable[[], str]) -> bool:
        """Writes what `page` gives, unless that was done less than two seconds ago; whether it was written."""
        if time.monotonic() - self._written < SECONDS_BETWEEN_PAGES:
            return False
        try:
            write_atomically(self._path, page())
        except InputError as error:
            if not self._is_told:
                _LOG.warning("the page of this run is not written: %s", error)
            self._is_told = True
        self._written = time.monotonic()
        return True


class LivePage:
    """Called with every event of a study; writes its page whenever runs have finished, and passes the event on.

    Args:
        path: of the page.
        page: the page at an event.
        progress: called with every event, too.
    """

    def __init__(
        self, path: Path, page: Callable[[Event], str], progress: Callable[[Event], None] | None = None
    ) -> None:
        self._file, self._page, self._progress = LiveFile(path), page, progress
        self._is_new = True

    def __call__(self, event: Event) -> None:
        if self._progress:
            self._progress(event)
        self._is_new |= event.kind in ("planned", "finished")
        if self._is_new and self._file.write(lambda: self._page(event)):
            self._is_new = False


def study_page(command: str, settings: Mapping[str, Any]) -> Callable[[Event], str]:
    """The page of a comparison or a search at each event.

    Args:
        command: its name.
        settings: that it was started with.
    """

    def page(event: Event) -> str:
        records = list(event.records.values())
        charts = [*plots.rates_by_length(records, {}), plots.curves(records)] if records else []
        return running_page(
            f"{event.done:g} of {counted(event.planned, 'run')} done",
            about=f"{settings['data']} · {settings['model']}",
            command=command_of_settings(command, dict(settings)),
            charts=[chart for chart in charts if chart.series],
            records=records,
            titles={arm: info.title for arm, info in ALL.items()},
            measures=measures_of(settings),
            of_lengths=any(record.trial.steps for record in records),
        )

    return page
