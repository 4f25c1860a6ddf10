"""Reads weights from a folder, one tensor at a time: safetensors, sharded or not, or PEFT's older .bin files."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from loraplus.errors import InputError
from loraplus.files.paths import is_file, is_inside
from loraplus.files.single import read_json
from loraplus.tasks.pickles import is_whole, load_pickle

_MOST_TENSORS, _LONGEST_NAME = 200_000, 500
_FLOATING = frozenset({"F64", "F32", "F16", "BF16"})


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
            if len(self.shapes) > _MOST_TENSORS or any(len(name) > _LONGEST_NAME for name in self.shapes):
                raise InputError(
                    f"{path} is damaged: it holds more than {_MOST_TENSORS:,} tensors, or names of more than "
                    f"{_LONGEST_NAME} characters"
                )

    def get(self, name: str) -> torch.Tensor:
        """The values, in double precision, of the shape in `shapes`: A (r, d_in), B (d_out, r)."""
        tensor = self._loaded.get(name)
        if tensor is not None:
            return tensor.double()
        try:
            with safe_open(self._where[name], framework="pt") as file:
                return file.get_tensor(name).double()
        except (OSError, SafetensorError, TypeError, KeyError, ValueError, RuntimeError) as error:
            raise InputError(f"cannot read {name} in {self._where[name]}: {type(error).__name__}: {error}") from None

    def is_floating(self, name: str) -> bool:
        """Whether the values are plain numbers; those of quantized weights are not."""
        return name in self._floating

    def numel(self, name: str) -> int:
        """Number of entries."""
        return math.prod(self.shapes[name])

    def _read_header(self, path: Path) -> None:
        if not is_file(path):
            raise InputError(f"cannot read {path}: no such file")
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  (no mapping)
                    view = file.get_slice(name)
                    self.shapes[name] = tuple(view.get_shape())
                    self._where[name] = path
                    if view.get_dtype() in _FLOATING:
                        self._floating.add(name)
        except (OSError, SafetensorError, ValueError, TypeError) as error:
            raise InputError(f"cannot read {path}: damaged or cut off ({error})") from None

    def _read_pickle(self, path: Path) -> None:
        content = load_pickle(path)
        if not isinstance(content, dict) or not all(
            isinstance(name, str) and isinstance(value, torch.Tensor) and value.layout == torch.strided
            for name, value in content.items()
        ):
            raise InputError(f"{path} holds something else than named tensors")
        if not all(map(is_whole, content.values())):
            raise InputError(f"{path} holds tensors of more numbers than there are in it; it is damaged")
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
        if not all(map(is_inside, names)):
            raise ValueError
    except (TypeError, KeyError, AttributeError, ValueError):
        raise InputError(f"{index} does not say in which file of its folder which weight is") from None
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise InputError(f"{folder} lacks {missing[0]}, which its index names")
    return [folder / name for name in names]
