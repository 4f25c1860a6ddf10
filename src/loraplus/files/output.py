"""The folder that a command writes to: what may be replaced, what must match on resuming, and whole files only."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from loraplus.errors import InputError
from loraplus.files.checkpoints import checkpoints
from loraplus.files.commands import (
    CONFIG_FILE,
    LATER_SETTINGS,
    NOT_COMPARED,
    PLOTS_FOLDER,
    TRAIN,
    command_of,
    names_of_all,
)
from loraplus.files.manifest import is_sealed
from loraplus.files.parsing import LONGEST_YAML, parse_yaml
from loraplus.files.single import check_takes_files, read_json, write_json, write_yaml
from loraplus.files.whole import TEMPORARY, locked, remove_leftovers

_EARLIER_TEMPORARY = re.compile(r"\.(.+)\.\d+\.tmp")


def check_output(
    path: str | os.PathLike[str],
    config: Mapping[str, Any],
    *,
    overwrite: bool,
    resume: bool,
    ignore: Sequence[str] = NOT_COMPARED,
) -> None:
    """Says whether a run may write to a folder, and touches nothing.

    Args:
        path: The folder.
        config: Configuration of the run, as it will be saved.
        overwrite: Earlier output may be replaced.
        resume: Go on with earlier output; its configuration must be the same.
        ignore: Keys that may differ on resuming.

    Raises:
        InputError: the folder holds something and neither flag is given, belongs to another configuration or to
            somebody else, or cannot be written.
    """
    folder = Path(path)
    if overwrite and resume:
        raise InputError("--overwrite and --resume exclude each other: start again, or go on")
    check_unicode(config)
    check_writable(folder)
    if is_empty(folder):
        return
    saved = saved_config(folder)
    if saved is None and _is_finished_or_begun(folder):
        if resume:
            raise InputError(f"--resume: {folder / CONFIG_FILE} is damaged or gone; --overwrite starts the run again")
        if overwrite:
            return
    if resume:
        if saved is None:
            raise InputError(f"--resume: {folder} holds no {CONFIG_FILE} of a loraplus run to go on with")
        _check_same(folder, saved, config, ignore)
    elif overwrite:
        if saved is None:
            raise not_ours(folder, f"{CONFIG_FILE} of a loraplus run")
    else:
        raise InputError(
            f"{folder} is not empty: --resume goes on with the run in it, --overwrite replaces it, "
            "or choose another --output"
        )


def prepare_output(
    path: str | os.PathLike[str],
    config: Mapping[str, Any],
    *,
    overwrite: bool,
    resume: bool,
    ignore: Sequence[str] = NOT_COMPARED,
) -> Path:
    """Checks as `check_output` does, then creates or clears the folder and saves the configuration in it.

    Call it once all other input has been found good: until then earlier output stays as it is.

    Returns:
        The folder.

    Raises:
        InputError: see `check_output`.
    """
    check_output(path, config, overwrite=overwrite, resume=resume, ignore=ignore)
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_earlier_temporaries(folder)
        if overwrite:
            _remove_written(folder)
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}") from None
    if not (resume and saved_config(folder) is not None):
        write_yaml(folder / CONFIG_FILE, config)
    return folder


@contextlib.contextmanager
def hold_output(path: str | os.PathLike[str], *, wait: bool = False) -> Iterator[None]:
    """Keeps other loraplus commands out of a folder, which is made if need be. Ends with the process at the latest.

    Args:
        path: The folder.
        wait: Until it is free, instead of failing.

    Raises:
        InputError: another process holds it, or the folder cannot be created.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}") from None
    with locked(folder, wait=wait) as is_ours:
        if not is_ours:
            raise InputError(f"another loraplus command is writing to {folder}; wait for it to end")
        for place in (folder, folder / PLOTS_FOLDER):
            remove_leftovers(place)
        yield


def data_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between the facts of two loads of the data, in words; empty if nothing does.

    Facts that an earlier version did not note are not compared.
    """
    now = json.loads(json.dumps(dict(now)))
    return "; ".join(f"{key} was {before[key]}, now {now.get(key)}" for key in before if before[key] != now.get(key))


def note_data(path: str | os.PathLike[str], facts: Mapping[str, Any]) -> None:
    """Writes the facts of the data a run is started on; on resuming, makes sure that they are the same.

    Raises:
        InputError: the data is not what the run was started on.
    """
    if not Path(path).exists():
        write_json(path, facts)
        return
    try:
        before = read_json(path)
    except InputError:
        before = None
    if not isinstance(before, Mapping):
        raise InputError(
            f"{path} is damaged; if the data is what the run was started on, remove it, and --resume goes on"
        )
    if changes := data_changes(before, facts):
        raise InputError(f"--resume: the data has changed since this run was started: {changes}")


def check_unicode(config: Mapping[str, Any]) -> None:
    """Refuses settings that are not UTF-8 text, since they could not be written to a file.

    Raises:
        InputError: names the setting.
    """
    for key, value in config.items():
        try:
            usable = b"\0" not in str(value).encode()
        except UnicodeEncodeError:
            usable = False
        if not usable:
            raise InputError(f"--{key.replace('_', '-')}: {value} is not UTF-8 text; rename it")


def check_writable(folder: Path) -> None:
    """Makes sure that files can be written to a folder, or that the folder can be made.

    Raises:
        InputError: it does not, or the disk is full.
    """
    try:
        nearest = folder
        while not os.path.lexists(nearest) and nearest != nearest.parent:
            nearest = nearest.parent
        if nearest.is_symlink() and not nearest.exists():
            raise InputError(f"cannot write to {folder}: {nearest} is a link to nothing")
        if not nearest.is_dir():
            raise InputError(f"cannot write to {folder}: {nearest} is not a folder")
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise InputError(f"cannot write to {folder}: permission denied in {nearest}")
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}") from None
    check_takes_files(nearest, folder)


def not_ours(folder: Path, sign: str) -> InputError:
    """The error of `--overwrite` for a folder whose files may be the user's: none says that loraplus wrote it."""
    return InputError(
        f"--overwrite: {folder} holds files but no {sign}, so it is not replaced; choose another --output"
    )


def is_empty(folder: Path) -> bool:
    """Whether a folder is not there, or holds nothing but what killed commands left."""
    if not folder.exists():
        return True
    names = [entry.name for entry in folder.iterdir()]
    return all(TEMPORARY.fullmatch(name) or _is_earlier_temporary(name) for name in names)


def _is_finished_or_begun(folder: Path) -> bool:
    """Whether a folder without a configuration is that of a training run all the same."""
    return is_sealed(folder) or any(is_sealed(checkpoint) for checkpoint in checkpoints(folder))


def saved_config(folder: Path) -> dict[str, Any] | None:
    """The configuration of the loraplus run in a folder, or None if there was no such run."""
    try:
        with (folder / CONFIG_FILE).open(encoding="utf-8") as file:
            data = parse_yaml(file.read(LONGEST_YAML + 1))
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) and command_of(data) else None


def _check_same(folder: Path, saved: Mapping[str, Any], config: Mapping[str, Any], ignore: Sequence[str]) -> None:
    now = yaml.safe_load(yaml.safe_dump(dict(config), sort_keys=False))
    saved = {key: value for key, value in LATER_SETTINGS.items() if key in now} | dict(saved)
    keys = [key for key in dict.fromkeys([*now, *saved]) if key not in ignore]
    differing = [key for key in keys if saved.get(key) != now.get(key) or (key in saved) != (key in now)]
    if differing:
        changes = "; ".join(
            f"{key} was {saved.get(key, 'not a setting')!s}, now {now.get(key, 'not a setting')!s}" for key in differing
        )
        again = " ".join(f"--{key.replace('_', '-')} {saved[key]}" for key in ("lr", "lr_ratio") if key in differing)
        hint = f"; to go on with its rates add {again}" if again and saved.get("lr") else ""
        raise InputError(f"--resume: {folder} was started with another configuration: {changes}{hint}")


def _remove_written(folder: Path) -> None:
    """All but the configuration: while it is there, an interrupted clearing can be repeated."""
    config = saved_config(folder) or {}
    for entry in (command_of(config) or TRAIN).written(folder, config):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink(missing_ok=True)


def _remove_earlier_temporaries(folder: Path) -> None:
    """Removes files that killed commands of earlier versions left. Those versions did not lock them."""
    for entry in list(folder.iterdir()):
        if _is_earlier_temporary(entry.name) and (entry.is_file() or entry.is_symlink()):
            entry.unlink(missing_ok=True)


def _is_earlier_temporary(name: str) -> bool:
    match = _EARLIER_TEMPORARY.fullmatch(name)
    return match is not None and match[1] in names_of_all()
