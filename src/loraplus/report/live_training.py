"""The page of a training run under way, written when training begins and after evaluations."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from loraplus.report import plots
from loraplus.report.live import LiveFile, running_page
from loraplus.report.training import REPORT_FILE
from loraplus.tasks.command_line import command_of_settings
from loraplus.tasks.train import curve_rows


class LiveTraining(TrainerCallback):
    """Writes report.html into the output folder of a run; the report of the finished run takes its place.

    Args:
        settings: of the run, `output` among them.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings, self._file = dict(settings), LiveFile(Path(settings["output"]) / REPORT_FILE)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._file.write(lambda: self._page(state))

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._file.write(lambda: self._page(state))

    def _page(self, state: Any) -> str:
        names = sorted({name for row in state.log_history for name in row if _is_measure(name)})
        names.sort(key=lambda name: name != "eval_loss")
        rows = [row for row in curve_rows(state.log_history, names) if row.get("eval_loss") is not None]
        return running_page(
            f"Step {state.global_step:,} of {state.max_steps:,}",
            about=f"{self._settings['task']} on {self._settings['data']} · {self._settings['model']}",
            command=command_of_settings("train", self._settings),
            charts=[plots.training(curve_rows(state.log_history, names))] if rows else [],
            table={
                "title": "Evaluations",
                "columns": ["step", *(name.removeprefix("eval_").replace("_", " ") for name in names)],
                "rows": [[row["step"], *(row.get(name) for name in names)] for row in rows],
            },
        )


def _is_measure(name: str) -> bool:
    """Whether an entry of the log is a figure of the model, and not how long it took."""
    return name.startswith("eval_") and not name.endswith(("_runtime", "_per_second", "_chance_p"))
