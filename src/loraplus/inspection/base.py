"""The base weights of adapted layers: found by name in a model folder's safetensors, read one at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import torch

from loraplus.errors import InputError
from loraplus.inspection.adapter import Adapter, Pair
from loraplus.inspection.tensors import TensorFiles, model_files


class BaseWeights:
    """Finds the weight W that a pair of factors corrects.

    Args:
        folder: a model folder with safetensors.
        adapter: whose layers are looked for.

    Raises:
        InputError: no safetensors, a damaged file, a layer that the model does not have, or has in another size.
    """

    def __init__(self, folder: Path, adapter: Adapter) -> None:
        paths = model_files(folder) if folder.is_dir() else []
        if not paths:
            raise InputError(f"{folder} has no model.safetensors to read base weights from")
        self._tensors = TensorFiles(paths)
        self._by_tail = _by_tail(self._tensors.shapes)
        self._names: dict[str, str] = {}
        exact = not (adapter.config.get("use_qalora") or adapter.config.get("use_bdlora"))
        for pair in adapter.pairs:
            shape_a, shape_b = adapter.tensors.shapes[pair.a], adapter.tensors.shapes[pair.b]
            if shape_a[0] != pair.rank:  # factors of experts, stacked: no single W
                continue
            name = self._find(pair)
            if name is None:
                raise InputError(f"{folder} does not fit this adapter: it has no weight of {pair.name}")
            if exact and self._tensors.is_floating(name):
                self._check(folder, pair, name, shape_a, shape_b)
                self._names[pair.name] = name

    def norm(self, layer: str) -> float | None:
        """‖W‖_F; None for a quantized weight, or one that stands for several."""
        if layer not in self._names:
            return None
        return float(torch.linalg.vector_norm(self._tensors.get(self._names[layer])))

    def _find(self, pair: Pair) -> str | None:
        """The weight's name in the files, whose prefix may be missing (bert.encoder… is encoder…) or another one."""
        parts = pair.name.replace(".base_layer", "").split(".")
        first_number = next((index for index, part in enumerate(parts) if part.isdigit()), None)
        last_start = max(0, first_number - 1) if first_number is not None else min(1, len(parts) - 1)
        for ending in ("weight", "in_proj_weight"):
            for start in range(last_start + 1):
                tail = ".".join([*parts[start:], ending])
                names = self._by_tail.get(tail, [])
                if tail in names:
                    return tail
                if names:
                    return names[0] if len(names) == 1 else None
        return None

    def _check(self, folder: Path, pair: Pair, name: str, a: tuple[int, ...], b: tuple[int, ...]) -> None:
        shape = self._tensors.shapes[name]
        outputs, inputs = b[0], math.prod(a[1:])
        if len(shape) > 2:  # of a grouped convolution W holds a part of the inputs only
            groups = max(1, a[0] // b[1])
            fits = shape[0] == outputs and math.prod(shape[1:]) * groups == inputs
        else:
            fits = sorted(shape) == sorted((outputs, inputs))  # Conv1D and embeddings keep W the other way round
        if not fits:
            raise InputError(
                f"{folder} does not fit this adapter: {name} is {'×'.join(map(str, shape))}, the factors of "
                f"{pair.name} make {outputs}×{inputs}"
            )


def _by_tail(names: Iterable[str]) -> dict[str, list[str]]:
    """{what a name ends with after a dot, or all of it: the names}"""
    by_tail: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        for start in range(len(parts)):
            by_tail.setdefault(".".join(parts[start:]), []).append(name)
    return by_tail
