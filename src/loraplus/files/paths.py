"""Paths as users name them: `~` expanded, and one line for those that nobody can open."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from loraplus.errors import InputError

_WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json")
_HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?", re.ASCII)


def user_path(name: str | os.PathLike[str]) -> Path:
    """A path with `~` expanded.

    Raises:
        InputError: `~somebody` of a user that does not exist.
    """
    try:
        return Path(name).expanduser()
    except RuntimeError:
        raise InputError(f"{name}: there is no user of this name, or without a home folder") from None


def resolved(name: str | os.PathLike[str]) -> Path:
    """An absolute path, with `~` expanded and links followed; it need not exist.

    Raises:
        InputError: links that lead in a circle, or a name that no file can have.
    """
    try:
        return user_path(name).resolve()
    except (RuntimeError, OSError, ValueError):
        raise InputError(f"{name} leads to no place: a link to itself, or a name that no file can have") from None


def is_folder(path: Path) -> bool:
    """Whether a path is a folder whose files can be opened.

    Raises:
        InputError: nobody can tell, or it is one that this user may not look into.
    """
    if not stat.S_ISDIR(_mode(path)):
        return False
    if not os.access(path, os.R_OK | os.X_OK):
        raise InputError(f"cannot read {path}: permission denied")
    return True


def is_file(path: Path) -> bool:
    """Whether a path is an ordinary file that can be opened.

    Raises:
        InputError: nobody can tell, or it is one that this user may not read.
    """
    if not stat.S_ISREG(_mode(path)):
        return False
    if not os.access(path, os.R_OK):
        raise InputError(f"cannot read {path}: permission denied")
    return True


def _mode(path: Path) -> int:
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # the last: a zero byte in the name
        return 0
    except OSError as error:
        raise InputError(f"cannot read {path}: {str(error.strerror).lower()}") from None


def folder_unless_hub_name(name: str) -> Path | None:
    """The folder of a name. None if there is no such folder and the name may be a hub repository's.

    Raises:
        InputError: a file's, or that of a folder which is not there.
    """
    folder = user_path(name)
    if is_folder(folder):
        return folder
    if folder.exists():
        raise InputError(f"{name} is a file; name the folder that it is in")
    if name.startswith((".", "/", "~")) or name.count("/") != 1 or os.sep != "/":
        raise InputError(f"there is no folder {name}")
    return None


def is_inside(name: object) -> bool:
    """Whether a file name that stands in a file leads to a place below that file's folder.

    Example:
        >>> is_inside("model-00001.safetensors"), is_inside("../../etc/passwd")
        (True, False)
    """
    return isinstance(name, str) and "\0" not in name and not os.path.isabs(name) and ".." not in Path(name).parts


def resolve_model(model: str) -> str:
    """Turns a model folder into its absolute path, and leaves a hub name as it is.

    Raises:
        InputError: a path that does not exist, or a folder without a model's files.
    """
    path = user_path(model)
    if is_folder(path):
        if not is_file(path / "config.json"):
            raise InputError(f"model folder {model} has no config.json; it is not a transformers model")
        if not any(file for pattern in _WEIGHT_FILES for file in path.glob(pattern)):
            raise InputError(f"model folder {model} has no weights (model.safetensors or pytorch_model.bin)")
        return str(resolved(path))
    if os.path.lexists(path) or not _HUB_NAME.fullmatch(model):
        raise InputError(f"there is no model folder {model}")
    return model
