"""The page of a search for rates: what was found, what it cost, and every run, drawn and as a table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loraplus.errors import InputError
from loraplus.files.single import read_json, write_atomically
from loraplus.report import plots
from loraplus.report.page import template
from loraplus.report.training import REPORT_FILE
from loraplus.study.arms import ALL
from loraplus.study.records import Record, Trial
from loraplus.study.tune import RESULT_FILE
from loraplus.tasks.command_line import command_of_settings
from loraplus.tasks.measures import ACCURACY, PERPLEXITY, measures_of

_TEMPLATE = "tuned.html.jinja"
_ARM = "loraplus"


def write_search_report(folder: str | Path) -> Path:
    """Writes report.html from the tune.json in a folder.

    Args:
        folder: output of a finished search.

    Returns:
        The page's path: one HTML file that loads nothing from elsewhere; text from data is escaped.

    Raises:
        InputError: there is no tune.json, or a damaged one.
    """
    folder = Path(folder)
    result = read_json(folder / RESULT_FILE)
    try:
        records = [_record(row) for row in result["trials"]]
        best = {_ARM: {name: result["best"][name] for name in ("lr", "lr_ratio")}}
        measures = measures_of(result["config"])
        page = template(_TEMPLATE).render(
            result=result,
            records=records,
            charts=plots.rates_by_length(records, best),
            command=command_of_settings("tune", result["config"]),
            titles={arm: info.title for arm, info in ALL.items()},
            has_accuracy=ACCURACY in measures,
            is_language=PERPLEXITY in measures,
        )
    except Exception as error:  # a page of facts that are not there, or of another kind, fails wherever they are used
        raise InputError(f"{folder / RESULT_FILE} is damaged ({type(error).__name__}: {error})") from None
    return write_atomically(folder / REPORT_FILE, page)


def _record(row: Mapping[str, Any]) -> Record:
    """A row of tune.json as the run that it is of."""
    loss = math.inf if row["eval_loss"] is None else row["eval_loss"]
    trial = Trial("tuning", _ARM, row["lr"], row["lr_ratio"], row["seed"], row["steps"])
    return Record(
        trial, row["status"], row["steps"], loss, row.get("eval_accuracy"), row["seconds"] / max(1, row["steps"] or 1)
    )
