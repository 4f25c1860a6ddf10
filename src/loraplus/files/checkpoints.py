"""Tells which of a run's checkpoints are whole, by their manifests, or by their files where they have none."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import shutil
import warnings
import zipfile
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from loraplus.errors import CheckpointError, DamagedCheckpointError, LoraPlusWarning
from loraplus.files import manifest
from loraplus.files.whole import temporary_path

RATES_FILE = "loraplus.json"
AUTO_FILE = "loraplus_auto.pt"
SEALED = "sealed"
"""A key of loraplus.json. It says that the checkpoint had a manifest, so a missing manifest counts as damage."""
STATE_FILE = "trainer_state.json"
NAME = re.compile(r"checkpoint-(\d+)")
_STATES = ("optimizer.pt", "scheduler.pt")
_MODEL_FILES = ("adapter_model.safetensors", "adapter_model.bin", "model.safetensors", "pytorch_model.bin")
_SHARDED = ("global_step*", "pytorch_model_fsdp*", "optimizer_*", "*.index.json")  # DeepSpeed's, FSDP's, large models
_RANDOM = "rng_state*.pth"
_BEGUN = "checkpoint-is-incomplete.txt"  # Trainer's own note, of a checkpoint that it saves when it is told to end
_MARKS = (manifest.MANIFEST_FILE, RATES_FILE, STATE_FILE, *_STATES, *_MODEL_FILES, _RANDOM, *_SHARDED, _BEGUN)
_READ = (RATES_FILE, AUTO_FILE, "adapter_config.json", *_STATES, "scaler.pt", *_MODEL_FILES, _RANDOM)
_NAMED_IN_MESSAGE = 2


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, whole or not, the one of the last step first."""
    return sorted(filter(is_checkpoint, folder.iterdir()), key=step_of_checkpoint, reverse=True)


def step_of_checkpoint(checkpoint: Path) -> int:
    """The step that a checkpoint's name says; −1 if it says none."""
    match = NAME.fullmatch(checkpoint.name)
    return int(match[1]) if match else -1


def is_checkpoint(path: Path) -> bool:
    """Whether a folder has a checkpoint's name, and either holds a checkpoint's files or is empty."""
    if not NAME.fullmatch(path.name) or not path.is_dir():
        return False
    try:
        return next(path.iterdir(), None) is None or _has_any(path, _MARKS)
    except OSError:  # no permission: it is called so
        return True


def check_places(folder: Path) -> None:
    """Makes sure that no file stands where a checkpoint may have to be written.

    Raises:
        CheckpointError: names it.
    """
    for path in folder.iterdir() if folder.is_dir() else ():
        if NAME.fullmatch(path.name) and not path.is_dir():
            raise CheckpointError(f"{path} is not a folder, and a checkpoint may be written there; move it away")


def checkpoint_fault(checkpoint: Path, *, ours: bool = False) -> str | None:
    """What is wrong with a checkpoint, in words, or None if it is whole.

    Args:
        checkpoint: a folder.
        ours: nobody else wrote it, so that it must hold its rates.
    """
    try:
        if manifest.is_sealed(checkpoint):
            fault = _first(manifest.faults(checkpoint))
        elif _says_sealed(checkpoint):
            fault = f"{manifest.MANIFEST_FILE} is missing"
        else:
            fault = _unsealed_fault(checkpoint)
        if fault is None and ours and not (checkpoint / RATES_FILE).is_file():
            fault = f"{RATES_FILE} is missing"
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    return fault


def model_fault(checkpoint: Path) -> str | None:
    """What is wrong with the weights in a checkpoint, or None. For loading weights alone nothing else matters."""
    try:
        if manifest.is_sealed(checkpoint):
            return _first(manifest.faults(checkpoint, lambda name: name.startswith(("adapter_", "model", "pytorch_"))))
        broken = [path.name for path in checkpoint.iterdir() if path.name in _MODEL_FILES and not can_be_read(path)]
        return f"{broken[0]} is damaged" if broken else None
    except OSError as error:
        return f"it cannot be read ({error.strerror})"


def holds_optimizer(checkpoint: Path) -> bool:
    """Whether a checkpoint has the optimizer's state, whoever wrote it."""
    return _has_any(checkpoint, (_STATES[0], *_SHARDED[:3]))


def newest_whole(folder: Path, *, ours: bool = False) -> tuple[Path | None, dict[Path, str]]:
    """The newest whole checkpoint, and what is wrong with each later one.

    Returns:
        (None, …) if none is whole.
    """
    passed: dict[Path, str] = {}
    for checkpoint in checkpoints(folder) if folder.is_dir() else ():
        fault = checkpoint_fault(checkpoint, ours=ours)
        if fault is None:
            return checkpoint, passed
        passed[checkpoint] = fault
    return None, passed


def checkpoint_to_resume(folder: Path, anew: str, *, ours: bool = False) -> tuple[Path | None, Collection[Path]]:
    """As `newest_whole`; warns of those that are passed over.

    Args:
        folder: of a run.
        anew: how to start the run again.
        ours: as in `checkpoint_fault`.

    Returns:
        (None, …) if there is none, or only such as were never written to their end; the run starts at step 0.

    Raises:
        DamagedCheckpointError: every one is damaged. They are not replaced unasked, since parts of them may be of use.
    """
    checkpoint, passed = newest_whole(folder, ours=ours)
    if not passed:
        return checkpoint, passed
    named = [f"{path}: {fault}" for path, fault in list(passed.items())[:_NAMED_IN_MESSAGE]]
    told = "; ".join(named) + (f"; and {len(passed) - len(named)} more" if len(passed) > len(named) else "")
    if checkpoint is None and any(map(_was_whole, passed)):
        raise DamagedCheckpointError(f"no checkpoint can be used: {told}; {anew}")
    on = f"going on from {checkpoint}" if checkpoint else "no other is there, so the run starts again at step 0"
    warnings.warn(f"passed over: {told}; {on}", LoraPlusWarning, stacklevel=2)
    return checkpoint, passed


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


def names_written(checkpoint: Path) -> set[str]:
    """Names in a checkpoint's folder that belong to the checkpoint. All others are the user's, and stay."""
    patterns = (*_MARKS, *_READ, "tokenizer*")
    own = {entry.name for pattern in patterns for entry in checkpoint.glob(pattern)}
    return own | {"README.md", "training_args.bin", "chat_template.jinja"}


def rotate(folder: Path, limit: int | None, keep: Iterable[Path], worthless: Collection[Path] = ()) -> None:
    """Deletes the oldest checkpoints.

    Args:
        folder: of the run.
        limit: how many may stay; None or 0 for all.
        keep: that stay in any case: the last, the best.
        worthless: that go first.
    """
    if not limit:
        return
    kept = {path.resolve() for path in keep}
    there = checkpoints(folder)
    by_age = sorted(there, key=lambda path: (path not in worthless, path.stat().st_mtime, step_of_checkpoint(path)))
    others = [path for path in by_age if path.resolve() not in kept]
    for path in others[: max(0, len(by_age) - max(limit, len(kept)))]:
        leaving = temporary_path(path)  # so that none that is half deleted has a checkpoint's name
        with contextlib.suppress(OSError):
            path.rename(leaving)
            shutil.rmtree(leaving, ignore_errors=True)


def can_be_read(path: Path) -> bool:
    """Whether a file is what its name says; nothing of a pickle is loaded."""
    try:
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, framework="pt") as file:
                return bool(list(file.keys()))
        if path.suffix in (".pt", ".pth", ".bin"):  # torch's archives hold a checksum of every part
            with zipfile.ZipFile(path) as archive:
                return archive.testzip() is None
        return isinstance(json.loads(path.read_text(encoding="utf-8")), dict)
    except Exception:  # each library has many errors for a damaged file
        return False


def _unsealed_fault(checkpoint: Path) -> str | None:
    """Of a checkpoint without a manifest: an earlier version's, Trainer's own, or half of one."""
    sharded = _has_any(checkpoint, _SHARDED)
    if not (checkpoint / STATE_FILE).is_file():  # which Trainer writes last
        return f"it holds no {STATE_FILE}; its writing was cut short"
    if not sharded and not any((checkpoint / name).is_file() for name in _MODEL_FILES):
        return "it holds no model"
    missing = [name for name in _STATES if not (checkpoint / name).is_file()]
    if len(missing) == 1 and not sharded:  # both are with save_only_model
        return f"{missing[0]} is missing"
    state, step = _json(checkpoint / STATE_FILE), step_of_checkpoint(checkpoint)
    if not _is_trainer_state(state):
        return f"{STATE_FILE} is damaged"
    if step >= 0 and state["global_step"] != step:
        return f"{STATE_FILE} is of step {state['global_step']}"
    there = sorted({path for pattern in _READ for path in checkpoint.glob(pattern) if path.is_file()})
    return next((f"{path.name} is damaged" for path in there if not can_be_read(path)), None)


def _is_trainer_state(state: object) -> bool:
    from transformers.trainer_callback import TrainerState

    known = {field.name for field in dataclasses.fields(TrainerState)}
    if not isinstance(state, dict) or not state.keys() <= known or not isinstance(state.get("global_step"), int):
        return False
    callbacks = state.get("stateful_callbacks")
    return callbacks is None or (isinstance(callbacks, dict) and "TrainerControl" in callbacks)


def _was_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint was once written to its end, as far as one can tell."""
    try:
        return manifest.is_sealed(checkpoint) or _says_sealed(checkpoint) or (checkpoint / STATE_FILE).exists()
    except OSError:
        return True


def _says_sealed(checkpoint: Path) -> bool:
    record = _json(checkpoint / RATES_FILE)
    return isinstance(record, dict) and bool(record.get(SEALED))


def _first(faults: dict[str, str]) -> str | None:
    return next((f"{name} {fault}" for name, fault in faults.items()), None)


def _has_any(folder: Path, patterns: Iterable[str]) -> bool:
    return any(next(folder.glob(pattern), None) is not None for pattern in patterns)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
