"""What a folder must hold: the size and the hash of each of its files, checked before any of them is used."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from loraplus.whole import write_whole

MANIFEST_FILE = "loraplus_manifest.json"
_FORMAT_VERSION = 1
_LARGEST = 2**24


def seal(folder: Path, files: Iterable[Path] | None = None) -> None:
    """Writes down the size and the SHA-256 of a folder's files.

    Args:
        folder: that holds them.
        files: which; default all of them, those in its folders, too.

    Raises:
        OSError: a file cannot be read, or the manifest not written.
    """
    if files is None:
        files = (path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST_FILE)
    listed = {path.relative_to(folder).as_posix(): _facts(path) for path in sorted(files)}
    content = {"format_version": _FORMAT_VERSION, "files": listed}
    write_whole(folder / MANIFEST_FILE, (json.dumps(content, indent=1) + "\n").encode())


def is_sealed(folder: Path) -> bool:
    """Whether a folder has a manifest."""
    return (folder / MANIFEST_FILE).is_file()


def lost_files(folder: Path) -> list[str]:
    """Names of the files of a sealed folder that are missing, or empty and were not."""
    listed = (_read(folder) or {}).items()
    return [name for name, facts in listed if not (folder / name).is_file() or _emptied(folder / name, facts)]


def _emptied(path: Path, facts: dict[str, Any]) -> bool:
    return path.stat().st_size == 0 < facts["size"]


def fault(folder: Path) -> str | None:
    """What is wrong with a sealed folder, in words, or None; files that are not in the manifest do not count.

    Example:
        >>> import tempfile
        >>> place = Path(tempfile.mkdtemp())
        >>> _ = (place / "a.txt").write_text("whole")
        >>> seal(place)
        >>> fault(place)
        >>> _ = (place / "a.txt").write_text("whale")
        >>> fault(place)
        'a.txt was changed'
    """
    listed = _read(folder)
    if listed is None:
        return f"{MANIFEST_FILE} was changed"
    for name, facts in listed.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        try:
            if path.stat().st_size != facts["size"]:
                return f"{name} was changed to {path.stat().st_size} bytes from {facts['size']}"
            if _facts(path) != facts:
                return f"{name} was changed"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


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
