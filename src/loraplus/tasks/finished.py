"""Whether a run in a folder is finished: its metrics are there, and so is all of its adapter."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from loraplus.errors import InputError, LoraPlusWarning
from loraplus.files import manifest
from loraplus.files.checkpoints import can_be_read, newest_whole
from loraplus.files.commands import CARD_FILE
from loraplus.files.single import read_json
from loraplus.tasks.saved_adapter import CONFIG_FILE, WEIGHTS_FILE

METRICS_FILE = "metrics.json"
_ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE)


def finished_run(folder: Path) -> dict[str, Any] | None:
    """The metrics of the run in a folder; None if it is to go on.

    A finished run that has lost a file goes on from its last checkpoint, which writes its files anew.

    Raises:
        InputError: a file was changed since, or one is lost and there is no checkpoint.
    """
    path = folder / METRICS_FILE
    if not path.is_file():
        return None
    metrics = _metrics(path)
    faults = _faults(folder)
    if changed := [name for name, fault in faults.items() if fault not in ("is missing", "is empty", "is damaged")]:
        raise InputError(
            f"{folder / changed[0]} {faults[changed[0]]} since the run was finished; move it away, and --resume writes "
            "what was trained from the last checkpoint"
        )
    if metrics is None:
        faults = {METRICS_FILE: "is damaged", **faults}
    if not faults:
        return metrics
    name, fault = next(iter(faults.items()))
    checkpoint, _ = newest_whole(folder, ours=True)
    if checkpoint is None:
        raise InputError(
            f"{folder / name} {fault}, and there is no checkpoint to write it anew from; --overwrite trains again"
        )
    warnings.warn(f"{folder / name} {fault}; it is written anew from {checkpoint}", LoraPlusWarning, stacklevel=2)
    return None


def _metrics(path: Path) -> dict[str, Any] | None:
    try:
        metrics = read_json(path)
    except InputError:
        return None
    return metrics if isinstance(metrics, dict) and {"eval_loss", "steps", "groups"} <= metrics.keys() else None


def _faults(folder: Path) -> dict[str, str]:
    if manifest.is_sealed(folder):
        faults = manifest.faults(folder)
        if faults.get(CARD_FILE) == "was changed":  # a card is there to be written in
            del faults[CARD_FILE]
        return faults
    lost = [name for name in _ADAPTER_FILES if not (folder / name).is_file()]  # of an earlier version
    damaged = [name for name in _ADAPTER_FILES if name not in lost and not can_be_read(folder / name)]
    return {**dict.fromkeys(lost, "is missing"), **dict.fromkeys(damaged, "is damaged")}
