"""Sends a run's figures to TensorBoard, trackio or Weights & Biases, through Trainer's own reporting."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraplus.errors import InputError
from loraplus.files.commands import LOGS_FOLDER

if TYPE_CHECKING:
    from transformers import TrainerCallback

TENSORBOARD = "tensorboard"
REPORTERS = (TENSORBOARD, "trackio", "wandb")
PROJECT = "loraplus"
_NONE = "none"


def reporters(report_to: str) -> list[str]:
    """The names in --report-to.

    Raises:
        InputError: there is none of that name, or its package is not installed.
    """
    names = [name.strip().lower() for name in report_to.split(",")]
    if names == [_NONE]:
        return []
    for name in names:
        if name not in REPORTERS:
            raise InputError(f"--report-to: there is no {name!r}; give {', '.join(REPORTERS)}, or none alone")
        if importlib.util.find_spec(name) is None:
            raise InputError(f"--report-to {name} needs the package {name}, which is not installed: pip install {name}")
    return list(dict.fromkeys(names))


def reporting(report_to: str, output: str, run: str) -> tuple[dict[str, Any], list[TrainerCallback]]:
    """(training arguments, callbacks) that send a run's figures.

    Args:
        report_to: where to, comma-separated.
        output: folder of the command; TensorBoard's files go to `logs/<run>` in it.
        run: what the run is called.
    """
    names = reporters(report_to)
    callbacks: list[TrainerCallback] = []
    if TENSORBOARD in names:
        from transformers.integrations.integration_utils import TensorBoardCallback

        names.remove(TENSORBOARD)  # Trainer's would write beside the checkpoints, which a study does not keep
        board = TensorBoardCallback()
        board.logging_dir = str(Path(output) / LOGS_FOLDER / run)
        callbacks.append(board)
    return {"report_to": names, "run_name": run, "project": PROJECT}, callbacks
