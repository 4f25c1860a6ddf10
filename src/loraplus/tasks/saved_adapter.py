"""What stands in an adapter's folder, read without torch, so that a wrong one is refused at once."""

from __future__ import annotations

from typing import Any

from loraplus.errors import InputError
from loraplus.files.paths import is_file, is_folder, user_path
from loraplus.files.single import read_json

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


def adapter_settings(adapter: str) -> dict[str, Any]:
    """What PEFT wrote about an adapter.

    Raises:
        InputError: no such folder, no adapter in it, or a damaged one.
    """
    folder = user_path(adapter)
    if not is_folder(folder):
        raise InputError(f"there is no adapter folder {adapter}")
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not is_file(folder / name):
            raise InputError(f"{adapter} is not an adapter that PEFT or `loraplus train` wrote: it has no {name}")
    settings = read_json(folder / CONFIG_FILE)
    if not isinstance(settings, dict) or not isinstance(settings.get("base_model_name_or_path"), str):
        raise InputError(f"{folder / CONFIG_FILE} does not name a base model; the adapter is damaged")
    return settings
