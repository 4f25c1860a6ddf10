"""Reads an adapter's settings without torch, so that a wrong folder is refused at once."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from loraplus.errors import InputError
from loraplus.files.paths import is_file, is_folder, resolve_model, user_path
from loraplus.files.single import read_json

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
MERGE_FILE = "merge.json"
_MODEL_FILE = "config.json"


def adapter_settings(adapter: str) -> dict[str, Any]:
    """What PEFT wrote about an adapter.

    Raises:
        InputError: no such folder, no adapter in it, or a damaged one.
    """
    folder = user_path(adapter)
    if not is_folder(folder):
        raise InputError(f"there is no adapter folder {adapter}")
    if is_file(folder / _MODEL_FILE) and not is_file(folder / CONFIG_FILE):
        raise InputError(f"{adapter} is a whole model, not an adapter{_how_to_use(adapter)}")
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not is_file(folder / name):
            raise InputError(f"{adapter} is not an adapter that PEFT or `loraplus train` wrote: it has no {name}")
    settings = read_json(folder / CONFIG_FILE)
    if not isinstance(settings, dict) or not isinstance(settings.get("base_model_name_or_path"), str):
        raise InputError(f"{folder / CONFIG_FILE} does not name a base model; the adapter is damaged")
    return settings


def _how_to_use(folder: str) -> str:
    """What takes a whole model, and of a merged one the adapter that is in it."""
    merged: Any = read_json(user_path(folder) / MERGE_FILE) if is_file(user_path(folder) / MERGE_FILE) else None
    if not isinstance(merged, dict) or not isinstance(merged.get("adapter"), str):
        return "; name the folder that `loraplus train` or PEFT wrote"
    if merged.get("task") == "CAUSAL_LM":
        return f" (merged from {merged['adapter']}): try it with loraplus generate --model {shlex.quote(folder)}"
    return f": name the one that was merged into it, --adapter {shlex.quote(merged['adapter'])}"


def base_of(adapter: str | None, model: str | None) -> str:
    """The model to load: the one that is named, else the one that an adapter names.

    Args:
        adapter: folder, or None for the model alone.
        model: folder or hub name. Default: the base model that the adapter names.

    Raises:
        InputError: neither is given, the adapter is none, or a model's folder is missing or holds something else.
    """
    if adapter is None and model is None:
        raise InputError("nothing to load: name an adapter, a model, or both")
    settings = {} if adapter is None else adapter_settings(adapter)
    name = model or str(settings["base_model_name_or_path"])
    if is_file(user_path(name) / CONFIG_FILE) and not is_file(user_path(name) / _MODEL_FILE):
        raise InputError(f"{name} is an adapter, not a model; name it with --adapter")
    with loading_base_of(adapter) if adapter else nullcontext():
        resolve_model(name)
    return name


@contextmanager
def loading_base_of(adapter: str) -> Iterator[None]:
    """Adds to the error of a base model that cannot be loaded which adapter needs it, and how to name another.

    Raises:
        InputError: as the block, with that.
    """
    try:
        yield
    except InputError as error:
        raise InputError(f"{adapter}: {error}; name the base model that it was trained on with --model") from None
