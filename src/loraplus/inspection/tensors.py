"""Reads weights from a folder, one tensor at a time: safetensors, sharded or not, or PEFT's older .bin files."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from loraplus.errors import InputError
from loraplus.tasks.output import read_json

_FLOATING = frozenset({"F64", "F32", "F16", "BF16"})


def load_pickle(path: Path) -> Any:
    """What torch wrote, tensors mapped rather than read; nothing in the file is executed.

    Raises:
        InputError: damaged, or holds more than tensors and plain values.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError):
        raise InputError(f"cannot read {path}: damaged, or no file of tensors that torch wrote") from None


class TensorFiles:
    """The tensors of one or more files by name: shapes at once, values when asked for.

    Args:
        paths: safetensors files, or one .bin file.

    Raises:
        InputError: a file is damaged or cut off.
    """

    def __init__(self, paths: list[Path]) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._where: dict[str, Path] = {}
        self._floating: set[str] = set()
        self._loaded: dict[str, torch.Tensor] = {}
        for path in paths:
            self._read_pickle(path) if path.suffix == ".bin" else self._read_header(path)

    def get(self, name: str) -> torch.Tensor:
        """The values, in double precision."""
        tensor = self._loaded.get(name)
        if tensor is None:
            with safe_open(self._where[name], framework="pt") as file:
                tensor = file.get_tensor(name)
        return tensor.double()

    def is_floating(self, name: str) -> bool:
        """Whether the values are plain numbers; those of quantized weights are not."""
        return name in self._floating

    def numel(self, name: str) -> int:
        """Number of entries."""
        return math.prod(self.shapes[name])

    def _read_header(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  (no mapping)
                    view = file.get_slice(name)
                    self.shapes[name] = tuple(view.get_shape())
                    self._where[name] = path
                    if view.get_dtype() in _FLOATING:
                        self._floating.add(name)
        except (OSError, SafetensorError) as error:
            raise InputError(f"cannot read {path}: damaged or cut off ({error})") from None

    def _read_pickle(self, path: Path) -> None:
        content = load_pickle(path)
        if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
            raise InputError(f"{path} holds something else than named tensors")
        for name, tensor in content.items():
            self.shapes[name] = tuple(tensor.shape)
            self._loaded[name] = tensor
            if tensor.is_floating_point():
                self._floating.add(name)


def model_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder; empty if there are none.

    Raises:
        InputError: the index cannot be read, or names a file that is not there.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        return []
    content = read_json(index)
    try:
        names = sorted(set(content["weight_map"].values()))
    except (TypeError, KeyError, AttributeError):
        raise InputError(f"{index} does not say in which file which weight is") from None
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise InputError(f"{folder} lacks {missing[0]}, which its index names")
    return [folder / name for name in names]
