"""Which of a run's checkpoints are whole: those that a manifest vouches for, and older ones whose files can be read."""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from loraplus import manifest
from loraplus.errors import CheckpointError, DamagedCheckpointError, LoraPlusWarning
from loraplus.integrations.checkpoints import RATES_FILE, SEALED

STATE_FILE = "trainer_state.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_PARTS = (STATE_FILE, "optimizer.pt", "scheduler.pt")  # and a model
_SHARDED = ("global_step*", "pytorch_model_fsdp*", "optimizer_*", "*.index.json")  # DeepSpeed's, FSDP's, large models
_MODEL_FILES = ("adapter_model.safetensors", "adapter_model.bin", "model.safetensors", "pytorch_model.bin")
_OF_A_CHECKPOINT = (manifest.MANIFEST_FILE, RATES_FILE, *_PARTS, *_MODEL_FILES, "adapter_config.json", "config.json")
_NAMED_IN_MESSAGE = 2


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the one of the last step first."""
    found = [entry for entry in folder.iterdir() if _NAME.fullmatch(entry.name) and entry.is_dir()]
    return sorted(found, key=step_of_checkpoint, reverse=True)


def step_of_checkpoint(checkpoint: Path) -> int:
    """The step that a checkpoint's name says."""
    found = _NAME.fullmatch(checkpoint.name)
    return int(found[1]) if found else -1


def checkpoint_fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in words, or None if it is whole."""
    if manifest.is_sealed(checkpoint):
        return manifest.fault(checkpoint)
    return f"{manifest.MANIFEST_FILE} is missing" if was_whole(checkpoint) else _unsealed_fault(checkpoint)


def newest_whole(folder: Path) -> tuple[Path | None, dict[Path, str]]:
    """The checkpoint to go on from, and those after it with what is wrong with them.

    Returns:
        (None, …) if none is whole.
    """
    passed: dict[Path, str] = {}
    for checkpoint in checkpoints(folder):
        fault = checkpoint_fault(checkpoint)
        if fault is None:
            return checkpoint, passed
        passed[checkpoint] = fault
    return None, passed


def checkpoint_to_resume(folder: Path, anew: str) -> Path | None:
    """As `newest_whole`; warns of those that are passed over.

    Args:
        folder: of a run.
        anew: how to start the run again.

    Returns:
        None if there is none, or only such as were never written to their end; the run starts at step 0.

    Raises:
        DamagedCheckpointError: every one is damaged. They are not replaced unasked, since parts of them may be of use.
    """
    checkpoint, passed = newest_whole(folder)
    if not passed:
        return checkpoint
    named = [f"{path} is passed over: {fault}" for path, fault in list(passed.items())[:_NAMED_IN_MESSAGE]]
    more = f"; and {len(passed) - len(named)} more" if len(passed) > len(named) else ""
    if checkpoint is None and any(was_whole(path) for path in passed):
        raise DamagedCheckpointError(f"no checkpoint can be used: {'; '.join(named)}{more}; {anew}")
    on = f"going on from {checkpoint}" if checkpoint else "no other is there, so the run starts again at step 0"
    warnings.warn(f"{'; '.join(named)}{more}; {on}", LoraPlusWarning, stacklevel=2)
    return checkpoint


def was_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end, whatever became of it."""
    return manifest.is_sealed(checkpoint) or _says_sealed(checkpoint)


def check_checkpoint(checkpoint: Path) -> None:
    """Makes sure that a checkpoint is whole before anything of it is loaded.

    Raises:
        DamagedCheckpointError: says what is wrong, and which other one can be used.
    """
    fault = checkpoint_fault(checkpoint)
    if fault is None:
        return
    other, _ = newest_whole(checkpoint.parent)
    way = f"resume from {other}" if other else "no whole one stands beside it, so start the run again"
    raise DamagedCheckpointError(f"{checkpoint} cannot be used: {fault}; {way}")


def check_place(target: Path) -> None:
    """Makes sure that what stands in a checkpoint's place is a checkpoint, or nothing.

    Raises:
        CheckpointError: it is somebody's file or folder.
    """
    if os.path.lexists(target) and _NAME.fullmatch(target.name) and not is_checkpoint(target):
        raise CheckpointError(f"{target} is not a checkpoint, and one may be written there; move it away")


def is_checkpoint(path: Path) -> bool:
    """Whether a folder holds files of a checkpoint, whole or not, or nothing at all."""
    if not path.is_dir() or not _NAME.fullmatch(path.name):
        return False
    names = {entry.name for entry in path.iterdir()}
    return not names or not names.isdisjoint(_OF_A_CHECKPOINT) or _has_any(path, ("rng_state*.pth", *_SHARDED))


def rotate(folder: Path, limit: int | None, keep: Iterable[Path]) -> None:
    """Deletes the oldest checkpoints.

    Args:
        folder: of the run.
        limit: how many may stay; None or 0 for all.
        keep: that stay in any case: the last, the best.
    """
    if not limit:
        return
    kept = {path.resolve() for path in keep}
    by_age = sorted(checkpoints(folder), key=lambda path: (path.stat().st_mtime, step_of_checkpoint(path)))
    others = [path for path in by_age if path.resolve() not in kept and is_checkpoint(path)]
    for path in others[: max(0, len(by_age) - max(limit, len(kept)))]:
        shutil.rmtree(path, ignore_errors=True)


def _says_sealed(checkpoint: Path) -> bool:
    record = _json(checkpoint / RATES_FILE)
    return isinstance(record, dict) and bool(record.get(SEALED))


def _unsealed_fault(checkpoint: Path) -> str | None:
    """Of a checkpoint without a manifest: an earlier version's, or half of one."""
    sharded = _has_any(checkpoint, _SHARDED)
    if not sharded and not any((checkpoint / name).is_file() for name in _MODEL_FILES):
        return "it holds no model; its writing was cut short"
    for name in (STATE_FILE,) if sharded else _PARTS:
        if not (checkpoint / name).is_file():
            return f"it holds no {name}; its writing was cut short"
    state = _json(checkpoint / STATE_FILE)
    if not isinstance(state, dict) or state.get("global_step") != step_of_checkpoint(checkpoint):
        return f"{STATE_FILE} is damaged"
    return next((f"{path.name} is damaged" for path in sorted(checkpoint.iterdir()) if not _can_be_read(path)), None)


def _can_be_read(path: Path) -> bool:
    """Whether a file is what its name says; nothing of a pickle is loaded."""
    try:
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, framework="pt") as file:
                return bool(list(file.keys()))
        if path.suffix in (".pt", ".pth", ".bin"):  # torch's archives hold a checksum of every part
            with zipfile.ZipFile(path) as archive:
                return archive.testzip() is None
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
    except Exception:  # each library has many errors for a damaged file
        return False
    return True


def _has_any(folder: Path, patterns: Iterable[str]) -> bool:
    return any(next(folder.glob(pattern), None) is not None for pattern in patterns)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
