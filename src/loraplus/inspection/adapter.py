"""An adapter in PEFT's format: its configuration, the role of every tensor by name, and its pairs of factors."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from loraplus.adapters.layouts import recognise
from loraplus.adapters.partners import partner_names
from loraplus.errors import InputError
from loraplus.files.single import read_json
from loraplus.inspection.tensors import TensorFiles
from loraplus.parts import Role
from loraplus.tasks.sandbox import check_patterns

CONFIG_FILE = "adapter_config.json"
WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_NAMED_IN_MESSAGE = 3
_LARGEST_RANK = 2**31
_PREFIX = "base_model.model."
_ADAPTER_NAME = re.compile(
    r"(?<=\.)(lora_(?:embedding_)?[AB]|lora_magnitude_vector|lora_diag|trainable_tokens_delta)\.[^.]+(?=\.weight$|\.bias$|$)"
)
_EMBEDDING = re.compile(r"embed|lm_head|(?:^|\.)(?:wte|wpe)(?:\.|$)")
_PAIRS = ((Role.A, Role.B), (Role.EMBEDDING_A, Role.EMBEDDING_B))
_OWNER = nn.Module()  # there are names alone here, without that of the adapter: PEFT leaves it out of what it saves


@dataclass(frozen=True)
class Pair:
    """The two factors of one adapted layer, by the names of their tensors."""

    name: str  # of the layer in the base model
    a: str
    b: str
    rank: int
    alpha: float
    scaling: float
    is_embedding: bool
    magnitude: str | None  # DoRA
    diagonal: str | None  # KaSA: B diag(d) A


class Adapter:
    """What a folder's adapter_config.json and weights say.

    Args:
        folder: in PEFT's format.

    Attributes:
        config: content of adapter_config.json.
        tensors: the weights.
        roles: {tensor: role}; None for what is saved but was not trained.
        pairs: one an adapted layer, in the order of the file, numbers in layer names counted as such.

    Raises:
        InputError: a file is missing or damaged, the adapter is none of LoRA's kind, or holds what no layout explains.
    """

    def __init__(self, folder: Path) -> None:
        self.config = _read_config(folder / CONFIG_FILE)
        path = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
        if path is None:
            raise InputError(f"{folder} has an {CONFIG_FILE} but no weights ({WEIGHT_FILES[0]})")
        self.tensors = TensorFiles([path])
        self.roles = self._find_roles(path)
        self.pairs = self._find_pairs(path)

    def trained(self) -> dict[str, Role]:
        """{tensor that was trained: role}."""
        return {name: role for name, role in self.roles.items() if role is not None}

    def _find_roles(self, path: Path) -> dict[str, Role | None]:
        roles, unknown = {}, []
        for name in self.tensors.shapes:
            try:
                roles[name] = role_of(name, self.config, self.tensors.shapes)
            except KeyError:
                unknown.append(name)
        if unknown:
            more = f" and {len(unknown) - _NAMED_IN_MESSAGE} more" if len(unknown) > _NAMED_IN_MESSAGE else ""
            raise InputError(
                f"{path} holds what no LoRA layout explains: {', '.join(unknown[:_NAMED_IN_MESSAGE])}{more}; "
                f"the {CONFIG_FILE} beside it is another adapter's, or another program wrote it"
            )
        return roles

    def _find_pairs(self, path: Path) -> list[Pair]:
        tensor_of: dict[tuple[str, Role], str] = {}
        for name, role in self.trained().items():
            if role in (Role.A, Role.B, Role.EMBEDDING_A, Role.EMBEDDING_B, Role.MAGNITUDE):
                tensor_of[layer_of(name), role] = name
            elif ".lora_diag" in name:
                tensor_of[layer_of(name), Role.OTHER] = name
        pairs = []
        check_patterns(
            str(path.with_name(CONFIG_FILE)),
            [self.config["rank_pattern"], self.config["alpha_pattern"]],
            dict.fromkeys(layer for layer, _ in tensor_of),
        )
        for first, second in _PAIRS:
            for layer in {layer: None for layer, role in tensor_of if role in (first, second)}:
                for role in (first, second):
                    if (layer, role) not in tensor_of:
                        raise InputError(f"{path} has no {role} for {layer}; the adapter is not whole")
                pairs.append(self._pair(layer, first, second, tensor_of, path))
        if not pairs:
            raise InputError(f"{path} holds no LoRA factor")
        return sorted(pairs, key=lambda pair: _natural_order(pair.name))

    def _pair(
        self, layer: str, first: Role, second: Role, tensor_of: Mapping[tuple[str, Role], str], path: Path
    ) -> Pair:
        key = layer.removesuffix(".base_layer.out_proj")  # inside torch's attention, which PEFT adapts as one
        rank = _by_pattern(self.config["rank_pattern"], key, self.config["r"])
        alpha = _by_pattern(self.config["alpha_pattern"], key, self.config["lora_alpha"])
        a = tensor_of[layer, first]
        for name in (a, tensor_of[layer, second]):
            if len(self.tensors.shapes[name]) < 2 or not self.tensors.numel(name):
                raise InputError(
                    f"{path}: {name} is flattened or sharded away (FSDP, ZeRO-3); save the adapter gathered"
                )
        diagonal = tensor_of.get((layer, Role.OTHER))
        if diagonal is not None and self.tensors.numel(diagonal) != self.tensors.shapes[a][0]:
            raise InputError(f"{path}: {diagonal} has not one number for each rank of {layer}")
        rows = self.tensors.shapes[a][0]
        if rows != rank and not self.config.get("target_parameters"):  # those stack the factors of experts
            raise InputError(
                f"{path}: {layer} has rank {rows}, but {CONFIG_FILE} says {rank}; they do not belong together"
            )
        scaling = alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)
        magnitude, is_embedding = tensor_of.get((layer, Role.MAGNITUDE)), first is Role.EMBEDDING_A
        return Pair(layer, a, tensor_of[layer, second], rank, alpha, scaling, is_embedding, magnitude, diagonal)


def role_of(name: str, config: Mapping[str, Any], names: Container[str]) -> Role | None:
    """The role of a saved tensor; None if it is saved without having been trained (an embedding of another size).

    Args:
        name: of the tensor.
        config: content of adapter_config.json.
        names: of all tensors of the file: what is called like a factor and has no partner may be a layer saved in full.

    Raises:
        KeyError: no layout explains the name.

    Example:
        >>> names = [f"base_model.model.layers.0.q_proj.lora_{factor}.weight" for factor in "AB"]
        >>> role_of(names[1], {}, names), role_of(names[1], {"modules_to_save": ["lora_B"]}, names[1:])
        (<Role.B: 'lora_B'>, <Role.HEAD: 'head'>)
    """
    role = recognise(name, _OWNER)
    path, _, last = name.removeprefix(_PREFIX).rpartition(".")
    if role is None or not any(partner in names for partner in partner_names(name, _OWNER)):
        for module in config.get("modules_to_save") or ():
            if f".{module}." in f".{path}.":
                return Role.EMBEDDING if _EMBEDDING.search(path) else Role.HEAD
    if role is not None:
        return role
    if config.get("bias", "none") != "none" and last == "bias":
        return Role.NORM_BIAS
    if last in ("weight", "bias") and (path.endswith(".base_layer") or _EMBEDDING.search(path)):
        return None
    raise KeyError(name)


def layer_of(name: str) -> str:
    """The adapted layer that a factor belongs to, as the base model calls it.

    Example:
        >>> layer_of("base_model.model.h.0.attn.c_attn.lora_A.weight")
        'h.0.attn.c_attn'
    """
    parts = name.removeprefix(_PREFIX).split(".")
    end = max(index for index, part in enumerate(parts) if part.startswith("lora_"))
    return ".".join(parts[:end])


def saved_name(name: str) -> str:
    """What PEFT calls a parameter in its files: the name without that of the adapter.

    Example:
        >>> saved_name("base_model.model.q.lora_A.default.weight")
        'base_model.model.q.lora_A.weight'
    """
    whole = re.sub(r"\.modules_to_save\.[^.]+(?=\.)", "", name)
    name = whole if whole != name else _ADAPTER_NAME.sub(r"\1", name)
    return name.removesuffix(".weight") if name.endswith(".lora_magnitude_vector.weight") else name


def _natural_order(name: str) -> list[tuple[bool, int, str]]:
    # Of two numbers the longer is the larger; a name may hold more digits than an int is made from.
    return [(part.isdecimal(), len(part) if part.isdecimal() else 0, part) for part in name.split(".")]


def _by_pattern(patterns: Mapping[str, Any], layer: str, otherwise: object) -> Any:
    """As PEFT looks up rank_pattern and alpha_pattern."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return value
    return otherwise


def _is_number(value: object) -> bool:
    """Whether a value is a number that a float can hold."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max


def _read_config(path: Path) -> dict[str, Any]:
    config = read_json(path)
    if not isinstance(config, dict) or "peft_type" not in config:
        raise InputError(f"{path} is no configuration of a PEFT adapter: it does not say peft_type")
    if config["peft_type"] != "LORA":
        raise InputError(f"{path}: peft_type is {config['peft_type']}, and only LORA has two factors to look at")
    config = {"rank_pattern": {}, "alpha_pattern": {}, "r": 8, "lora_alpha": 8, **config}
    for key in ("rank_pattern", "alpha_pattern"):
        config[key] = {} if config[key] is None else config[key]
        if not isinstance(config[key], dict):
            raise InputError(f"{path}: {key} must map layers to numbers, got {config[key]!r}")
    for key in ("r", "lora_alpha"):
        pattern = config["rank_pattern" if key == "r" else "alpha_pattern"]
        for value in (config[key], *pattern.values()):
            if not _is_number(value) or (key == "r" and not (1 <= value <= _LARGEST_RANK and value == int(value))):
                raise InputError(
                    f"{path}: {key} must be a number{' of 1 or more' if key == 'r' else ''}, got {value!r}"
                )
    for pattern in (*config["rank_pattern"], *config["alpha_pattern"]):
        try:
            re.compile(pattern)
        except re.error:
            raise InputError(f"{path}: {pattern!r} in a pattern is no regular expression") from None
    for key in ("modules_to_save", "target_modules"):
        if not isinstance(config.get(key), (list, str, type(None))):
            raise InputError(f"{path}: {key} must be a list of names, got {config[key]!r}")
    if isinstance(config.get("modules_to_save"), str):
        config["modules_to_save"] = [config["modules_to_save"]]
    return config
