"""What a folder must hold: the size and the hash of each of its files, checked before any of them is used."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from loraplus.files.whole import write_whole

MANIFEST_FILE = "loraplus_manifest.json"
_FORMAT_VERSION = 1
_LARGEST = 2**24


def seal(folder: Path, files: Iterable[Path]) -> None:
    """Writes a manifest: the size and the SHA-256 of files in a folder or below it.

    Raises:
        OSError: a file cannot be read, or the manifest not written.
    """
    listed = {path.relative_to(folder).as_posix(): _facts(path) for path in sorted(files)}
    content = {"format_version": _FORMAT_VERSION, "files": listed}
    write_whole(folder / MANIFEST_FILE, (json.dumps(content, indent=1) + "\n").encode())


def seal_again(folder: Path) -> None:
    """Writes the manifest of a sealed folder anew, for what its files are by now.

    Raises:
        OSError: as `seal`.
    """
    seal(folder, [path for name in _read(folder) or {} if (path := folder / name).is_file()])


def is_sealed(folder: Path) -> bool:
    """Whether a folder has a manifest."""
    return (folder / MANIFEST_FILE).is_file()


def is_as_listed(folder: Path, name: str) -> bool:
    """Whether a file is there and is what the folder's manifest says; False if that does not list it."""
    facts = (_read(folder) or {}).get(name)
    return facts is not None and _fault(folder / name, facts) is None


def faults(folder: Path, of: Callable[[str], bool] = lambda name: True) -> dict[str, str]:
    """What is wrong with the files of a sealed folder; those that are not in its manifest do not count.

    Args:
        folder: with a manifest.
        of: which names to look at.

    Returns:
        {name: "is missing", "is empty" or "was changed"}; empty if all is well.

    Example:
        >>> import tempfile
        >>> place = Path(tempfile.mkdtemp())
        >>> _ = (place / "a.txt").write_text("whole")
        >>> seal(place, [place / "a.txt"])
        >>> faults(place)
        {}
        >>> _ = (place / "a.txt").write_text("whale")
        >>> faults(place)
        {'a.txt': 'was changed'}
    """
    listed = _read(folder)
    if listed is None:
        return {MANIFEST_FILE: "is damaged"}
    fault_of = {name: _fault(folder / name, facts) for name, facts in listed.items() if of(name)}
    return {name: fault for name, fault in fault_of.items() if fault is not None}


def _fault(path: Path, facts: dict[str, Any]) -> str | None:
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    if size == 0 < facts["size"]:
        return "is empty"
    try:
        return None if size == facts["size"] and _facts(path) == facts else "was changed"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _facts(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": digest}


def _read(folder: Path) -> dict[str, dict[str, Any]] | None:
    """{name of a file: its facts}, None if that is not what the manifest says."""
    path = folder / MANIFEST_FILE
    try:
        if path.stat().st_size > _LARGEST:
            return None
        listed = json.loads(path.read_text(encoding="utf-8"))["files"]
        whole = listed and all(
            not PurePosixPath(name).is_absolute()
            and ".." not in PurePosixPath(name).parts
            and isinstance(facts["size"], int)
            and isinstance(facts["sha256"], str)
            for name, facts in listed.items()
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return listed if whole else None
