"""The page of one training run: losses, facts of the data, and samples of a language model or scores of labels."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loraplus.errors import InputError
from loraplus.files.commands import SCORES_FILE
from loraplus.files.output import saved_config
from loraplus.files.single import read_json, write_atomically
from loraplus.report import plots
from loraplus.report.page import template
from loraplus.report.scored import scored_parts
from loraplus.tasks.command_line import command_of_settings
from loraplus.tasks.train import CURVES_FILE, METRICS_FILE, SAMPLES_FILE

REPORT_FILE = "report.html"
_TEMPLATE = "training.html.jinja"


def write_report(folder: str | Path) -> Path:
    """Writes report.html from the files that `train` left in a folder.

    Args:
        folder: output of a finished run.

    Returns:
        The page's path: one HTML file that loads nothing from elsewhere; text from data is escaped.

    Raises:
        InputError: the folder holds no finished run, or one of an earlier version on texts with labels.
    """
    folder = Path(folder)
    metrics, config = read_json(folder / METRICS_FILE), saved_config(folder)
    scores = read_json(folder / SCORES_FILE) if (folder / SCORES_FILE).exists() else None
    if config is None or not isinstance(metrics, dict) or ("eval_perplexity" not in metrics and scores is None):
        raise InputError(f"{folder} holds no run with --task sft or lm, and no {SCORES_FILE} of another task")
    samples = read_json(folder / SAMPLES_FILE) if (folder / SAMPLES_FILE).exists() else []
    try:
        with (folder / CURVES_FILE).open(encoding="utf-8", newline="") as file:
            curves = [_numbers(row) for row in csv.DictReader(file)]
        page = template(_TEMPLATE).render(
            config=config,
            metrics=metrics,
            data=metrics["data"],
            samples=samples,
            base=metrics.get("base", {}),  # earlier versions did not ask it
            scored=None if scores is None else scored_parts(scores, metrics, curves),
            command=command_of_settings("train", config),
            curves=plots.training(curves, metrics["seconds_per_step"]),
            curves_in_time=plots.training(curves, metrics["seconds_per_step"], "seconds"),
        )
    except Exception as error:  # a page of facts that are not there, or of another kind, fails wherever they are used
        raise InputError(f"the files of the run in {folder} are damaged ({type(error).__name__}: {error})") from None
    return write_atomically(folder / REPORT_FILE, page)


def _numbers(row: Mapping[str, str]) -> dict[str, Any]:
    return {name: float(value) if value else None for name, value in row.items()}
