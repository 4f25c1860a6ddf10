"""Whether a run in a folder is finished: its metrics are there, and so is all of its adapter."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from safetensors import safe_open

from loraplus import manifest
from loraplus.errors import InputError, LoraPlusWarning
from loraplus.integrations.whole_checkpoints import newest_whole
from loraplus.tasks.output import read_json

METRICS_FILE = "metrics.json"
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def finished_run(folder: Path) -> dict[str, Any] | None:
    """The metrics of the run in a folder; None if it is to go on.

    A finished run that has lost a file goes on from its last checkpoint, which writes the file anew.

    Raises:
        InputError: a file was changed since, or one is lost and there is no checkpoint.
    """
    path = folder / METRICS_FILE
    if not path.is_file():
        return None
    metrics = _metrics(path)
    lost = f"{path} is damaged" if metrics is None else _lost_file(folder)
    if lost is None:
        return metrics
    checkpoint, _ = newest_whole(folder)
    if checkpoint is None:
        raise InputError(f"{lost}, and there is no checkpoint to write it anew from; --overwrite trains again")
    warnings.warn(f"{lost}; it is written anew from {checkpoint}", LoraPlusWarning, stacklevel=2)
    return None


def _metrics(path: Path) -> dict[str, Any] | None:
    try:
        metrics = read_json(path)
    except InputError:
        return None
    return metrics if isinstance(metrics, dict) and {"eval_loss", "steps", "groups"} <= metrics.keys() else None


def _lost_file(folder: Path) -> str | None:
    if not manifest.is_sealed(folder):  # of an earlier version
        lost = [folder / name for name in _ADAPTER_FILES if not _is_whole(folder / name)]
        return f"{lost[0]} is missing or damaged" if lost else None
    fault = manifest.fault(folder)
    if fault is None:
        return None
    if lost := manifest.lost_files(folder):
        return f"{folder / lost[0]} is missing or empty"
    raise InputError(
        f"{folder}: {fault} since the run was finished; remove that file, and --resume writes it anew from the last "
        "checkpoint"
    )


def _is_whole(path: Path) -> bool:
    try:
        if path.suffix == ".json":
            return isinstance(read_json(path), dict)
        with safe_open(path, framework="pt") as file:
            return bool(list(file.keys()))
    except Exception:  # safetensors has several errors for a damaged file
        return False
