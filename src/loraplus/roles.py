"""Which part a trainable parameter plays: A, B, a head, a bias, …

The role follows from the place of the parameter in its adapter layer (`layouts`), never from its number of dimensions,
so sharding, flattening and 1-D parameters cannot move a parameter to another rate.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from loraplus.errors import (
    FlattenedParametersError,
    NoLoraFactorsError,
    NoTrainableParametersError,
    UnknownAdapterParameterError,
)
from loraplus.layouts import FACTORS, Role, recognise, register_layout, unregister_layout

__all__ = [
    "FACTORS",
    "Role",
    "TrainableParameter",
    "clean_name",
    "register_layout",
    "trainable_parameters",
    "unregister_layout",
]

_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_FLAT = "_flat_param"  # FSDP1's one parameter for all of a module's, with use_orig_params=False


class TrainableParameter(NamedTuple):
    """A parameter that requires gradients, under the name it has without any wrapper."""

    name: str
    parameter: nn.Parameter
    role: Role
    decays: bool | None  # None: FSDP1 has flattened a weight, which decays, and a bias, which does not, into one


def clean_name(name: str) -> str:
    """Removes what DDP, FSDP, activation checkpointing and torch.compile add to a parameter's name.

    Example:
        >>> clean_name("module._orig_mod.layer.lora_A.default.weight")
        'layer.lora_A.default.weight'
    """
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while parts[0] == "module" and len(parts) > 1:
        parts = parts[1:]
    return ".".join(parts)


# transformers' Trainer keeps weight decay off these; ratio 1 must be plain AdamW there, so the rule is the same.
_NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")
_NORM_MODULE = re.compile(r"norm", re.IGNORECASE)
_LOOKS_LIKE_FACTOR = re.compile(r"lora|lycoris|hada_|lokr_|oft_blocks", re.IGNORECASE)


def _role(name: str, owner: nn.Module) -> Role:
    role = recognise(name, owner)
    if role is not None:
        return role
    # The last two or three components hold a factor's name in every layout; earlier ones are the user's own modules.
    if any(_LOOKS_LIKE_FACTOR.search(part) for part in name.split(".")[-3:]):
        raise UnknownAdapterParameterError(
            f"{name} looks like an adapter factor, but no known layout says whether it is A or B; "
            "freeze it, or teach its layout with loraplus.roles.register_layout"
        )
    if isinstance(owner, nn.Embedding):
        return Role.EMBEDDING
    if name.rpartition(".")[2] == "bias" or _NORM_MODULE.search(type(owner).__name__):
        return Role.NORM_BIAS
    return Role.OTHER


def _unflatten(name: str, flat: Any) -> tuple[str, Role, bool | None]:
    """Name, role and weight decay of an FSDP1 FlatParameter, from the list that it keeps of its parts."""
    prefix = name.removesuffix(_FLAT)
    roles: dict[Role, str] = {}
    decays: set[bool] = set()
    for info, part in zip(flat._param_infos, flat._fqns, strict=True):
        whole = clean_name(prefix + part)
        roles.setdefault(_role(whole, info.module), whole)
        decays.add(not isinstance(info.module, nn.LayerNorm) and not _NO_DECAY.search(whole.lower()))
    if len(roles) > 1:
        raise FlattenedParametersError(
            "FSDP has put parameters of several roles into one flat parameter, which can have one rate only: "
            f"{', '.join(f'{whole} ({role})' for role, whole in roles.items())}; wrap with "
            "FullyShardedDataParallel(..., use_orig_params=True), use fully_shard (FSDP2), or wrap every trainable "
            "layer by itself (peft.utils.other.fsdp_auto_wrap_policy)"
        )
    (role, whole), *_ = roles.items()
    return whole, role, None if len(decays) > 1 else decays.pop()


def _walk(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Module, bool]]:
    """Yields (full name, parameter, owner, inside a LayerNorm) once per parameter, in named_parameters() order."""
    inside_layer_norm: set[str] = set()
    owners = {}
    for path, module in model.named_modules(remove_duplicate=False):
        parent = path.rpartition(".")[0]
        if isinstance(module, nn.LayerNorm) or (path and parent in inside_layer_norm):
            inside_layer_norm.add(path)
        owners[path] = module
    for name, parameter in model.named_parameters():  # tied parameters come once, under their first name
        path = name.rpartition(".")[0]
        yield name, parameter, owners[path], path in inside_layer_norm


def trainable_parameters(model: nn.Module) -> list[TrainableParameter]:
    """Lists every trainable parameter of `model` once, with its role and whether weight decay applies to it.

    Args:
        model: any module; wrapped ones (DDP, torch.compile, …) keep their unwrapped names.

    Returns:
        One entry per trainable parameter, in the order of `model.named_parameters()`.

    Raises:
        NoTrainableParametersError: every parameter is frozen.
        NoLoraFactorsError: something trains, but no LoRA factor.
        UnknownAdapterParameterError: a parameter looks like a factor and no layout recognises it.
        FlattenedParametersError: FSDP1 has flattened parameters of several roles into one.
    """
    found = []
    for full_name, parameter, owner, in_layer_norm in _walk(model):
        if parameter.requires_grad:
            if full_name.endswith(_FLAT) and hasattr(parameter, "_fqns"):
                name, role, decays = _unflatten(full_name, parameter)
            else:
                name = clean_name(full_name)
                role = _role(name, owner)
                decays = not in_layer_norm and not _NO_DECAY.search(full_name.lower())
            found.append(TrainableParameter(name, parameter, role, decays))
    if not found:
        raise NoTrainableParametersError(
            f"{type(model).__name__} has no trainable parameter; is the adapter active, and was it loaded with "
            "is_trainable=True?"
        )
    if not any(entry.role in FACTORS for entry in found):
        raise NoLoraFactorsError(
            f"{type(model).__name__} has {len(found)} trainable parameters but no LoRA factor (first: "
            f"{found[0].name}); add an adapter, for example peft.get_peft_model(model, LoraConfig(...))"
        )
    return found
