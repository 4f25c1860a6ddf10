"""Writes a run as another project's configuration: whole, beside what is there already, and with what it cannot say."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from loraplus.errors import InputError
from loraplus.export import frameworks, peft_benchmark, torchtitan
from loraplus.export.run import Run, read_run
from loraplus.files.paths import is_folder
from loraplus.files.single import check_takes_files
from loraplus.files.whole import temporary_path, write_whole

TARGETS: dict[str, Callable[[Run], dict[str, str]]] = {
    "peft-benchmark": peft_benchmark.export,
    "axolotl": frameworks.axolotl,
    "llamafactory": frameworks.llamafactory,
    "trl": frameworks.trl,
    "torchtitan": torchtitan.export,
}


def export_run(path: str, target: str, output: str | None = None) -> tuple[Path, list[str]]:
    """Writes the settings of a run as another project's configuration.

    Args:
        path: folder that `loraplus train` wrote.
        target: a key of `TARGETS`.
        output: file, or with peft-benchmark folder, that is not there yet. Default: the name that the project uses, in
            the present folder.

    Returns:
        (what was written, what could not be said there, one line each).

    Raises:
        InputError: no such target, no finished run, or the output is there already or cannot be written.
    """
    if target not in TARGETS:
        raise InputError(f"--to {target}: there are {', '.join(TARGETS)}")
    run = read_run(path)
    files = TARGETS[target](run)
    folder = len(files) > 1
    place = Path(output or (f"{run.name}-{target}" if folder else next(iter(files))))
    _check_free(place)
    if folder:
        _write_folder(place, files)
    else:
        write_whole(place, next(iter(files.values())).encode())
    return place, run.notes


def _check_free(place: Path) -> None:
    if os.path.lexists(place):
        raise InputError(f"{place} is there already; name another --output")
    if not is_folder(place.parent):
        raise InputError(f"there is no folder {place.parent} to write {place.name} to")
    check_takes_files(place.parent, place)


def _write_folder(place: Path, files: dict[str, str]) -> None:
    """All files, or no folder."""
    whole = temporary_path(place)
    try:
        whole.mkdir()
        for name, text in files.items():
            write_whole(whole / name, text.encode())
        whole.rename(place)
    except OSError as error:
        shutil.rmtree(whole, ignore_errors=True)
        raise InputError(f"cannot write to {place}: {error.strerror}") from None
