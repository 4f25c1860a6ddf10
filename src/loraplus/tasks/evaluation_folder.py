"""The folder of an evaluation: scores.json and its tables as CSV, whole or not there."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loraplus.errors import InputError
from loraplus.files.commands import SCORES_FILE
from loraplus.files.output import check_writable, is_empty, not_ours
from loraplus.files.paths import resolved
from loraplus.files.replacing import put_back, replace_folder
from loraplus.files.scratch import folder_beside
from loraplus.files.single import read_json, write_csv, write_json
from loraplus.files.whole import follow_umask

_CORNER = "true class ↓ predicted →"


def check_output(output: str, *, overwrite: bool) -> Path:
    """The folder that an evaluation is to be written to, checked before the work begins.

    Raises:
        InputError: it cannot be written, or holds something that is not to be replaced.
    """
    target = resolved(output)  # a link stays one
    if Path.cwd().is_relative_to(target):
        raise InputError("--output is or holds the folder that this runs in, which cannot be replaced; name another")
    if target.exists() and not target.is_dir():
        raise InputError(f"--output {output} is a file; name a folder, or a file that ends in .json")
    check_writable(target)
    put_back(target)
    if not is_empty(target):
        if not overwrite:
            raise InputError(
                f"{output} is not empty: --overwrite replaces an earlier evaluation, or name another --output"
            )
        if not _written(target):
            raise not_ours(target, f"{SCORES_FILE} of an earlier evaluation")
    return target


def write_evaluation(target: Path, record: Mapping[str, Any]) -> None:
    """Writes scores.json and its tables as CSV; the folder appears under its name when it is whole.

    Args:
        target: from `check_output`.
        record: the scores, and of what.

    Raises:
        InputError: it cannot be written.
    """
    tables: dict[str, Sequence[Mapping[str, Any]]] = {
        f"{name}.csv": record[name] for name in ("per_class", "per_label", "mistakes") if record.get(name)
    }
    if record.get("confusion_matrix"):
        rows = zip(record["labels"], record["confusion_matrix"], strict=True)
        tables["confusion_matrix.csv"] = [
            {_CORNER: label, **dict(zip(record["labels"], row, strict=True))} for label, row in rows
        ]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with folder_beside(target) as partial:
            for name, rows in tables.items():
                write_csv(partial / name, rows)
            write_json(partial / SCORES_FILE, {**record, "files": sorted([SCORES_FILE, *tables])})
            follow_umask(partial)
            replace_folder(partial, target, _written(target))
    except OSError as error:
        raise InputError(f"cannot write {target}: {os.strerror(error.errno) if error.errno else error}") from None


def _written(folder: Path) -> set[str]:
    """What an earlier evaluation wrote to a folder; empty if there was none."""
    try:
        record = read_json(folder / SCORES_FILE)
    except InputError:
        return set()
    files = record.get("files") if isinstance(record, dict) and "adapter" in record else None
    return {name for name in files if isinstance(name, str)} if isinstance(files, list) else set()
