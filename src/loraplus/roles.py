"""Which part a trainable parameter plays: A, B, a head, a bias, …

The role follows from the place of the parameter in its adapter layer (`layouts`), beside the other factor of its pair
(`partners`), never from its number of dimensions, so sharding, flattening and 1-D parameters cannot move a parameter to
another rate.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

from torch import nn

from loraplus.adapters.adapter_types import cause
from loraplus.adapters.layouts import (
    recognise,
    register_layout,
    registered,
    saved_in_full,
    unregister_layout,
)
from loraplus.adapters.memory import overlapping
from loraplus.adapters.structure import WRAPPERS, Structure
from loraplus.errors import (
    FlattenedParametersError,
    NoLoraFactorsError,
    NoTrainableParametersError,
    UnknownAdapterParameterError,
)
from loraplus.parts import EMBEDDINGS, FACTORS, Role

__all__ = [
    "FACTORS",
    "Role",
    "TrainableParameter",
    "clean_name",
    "register_layout",
    "trainable_parameters",
    "unregister_layout",
]

_TAKE_TWO = FACTORS | {Role.MAGNITUDE, Role.NORM_BIAS}  # what there is beside a pair only
_FLAT = "_flat_param"  # FSDP1's one parameter for all of a module's, with use_orig_params=False


class TrainableParameter(NamedTuple):
    """A parameter that requires gradients, under the name it has without any wrapper."""

    name: str
    parameter: nn.Parameter
    role: Role
    decays: bool | None  # None: FSDP1 has flattened a weight, which decays, and a bias, which does not, into one
    shares: str | None = None  # the first parameter on the same memory, if this is another

    @property
    def rate_name(self) -> str:
        """The name that decides its rate: that of the first parameter on the same memory, since they have one rate."""
        return self.shares or self.name


def clean_name(name: str) -> str:
    """Removes what DDP, FSDP, activation checkpointing and torch.compile add to a parameter's name.

    Example:
        >>> clean_name("module._orig_mod.layer.lora_A.default.weight")
        'layer.lora_A.default.weight'
    """
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    while parts[0] == "module" and len(parts) > 1:
        parts = parts[1:]
    return ".".join(parts)


# transformers' Trainer keeps weight decay off these; ratio 1 must be plain AdamW there, so the rule is the same.
_NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")
_NORM_MODULE = re.compile(r"norm", re.IGNORECASE)


class _Reading:
    """One reading of a model: the roles of its parameters, and what they cannot be read from."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.structure = Structure(model)
        self.unknown: list[str] = []
        self.factor_owners: list[nn.Module] = []
        self.in_a_layout: set[int] = set()  # ids of the parameters whose role a layout gave

    def role(self, name: str, parameter: nn.Parameter, owner: nn.Module) -> Role:
        role = self.recognised(name, parameter, owner)
        if role in (Role.A, Role.B):
            role = self.structure.wrapped.get(id(owner), role)
        if role in FACTORS:
            self.factor_owners.append(owner)
        if role is not None:
            self.in_a_layout.add(id(parameter))
            return role
        if self.structure.is_factor(name, parameter, owner):
            self.unknown.append(f"{name} (of {type(owner).__name__})")
        if isinstance(owner, nn.Embedding):
            return Role.EMBEDDING
        if name.rpartition(".")[2] == "bias" or _NORM_MODULE.search(type(owner).__name__):
            return Role.NORM_BIAS
        return Role.OTHER

    def recognised(self, name: str, parameter: nn.Parameter, owner: nn.Module) -> Role | None:
        """The role that its layout gives a parameter; a factor without the other one is called so by chance."""
        role = registered(name, owner)
        if role is not None:
            return role
        role = recognise(name, owner, self.structure.holder(owner))
        if role is None:
            return self.structure.role_within_layer(name, owner)
        if role in _TAKE_TWO and not self.structure.has_partner(name, parameter, owner, role):
            return saved_in_full(name, owner)
        return role

    def unflatten(self, name: str, flat: Any) -> tuple[str, Role, bool | None]:
        """Name, role and weight decay of an FSDP1 FlatParameter, from the list that it keeps of its parts."""
        prefix = name.removesuffix(_FLAT)
        roles: dict[Role, str] = {}
        decays: set[bool] = set()
        for info, whole_name in zip(flat._param_infos, flat._fqns, strict=True):
            whole = clean_name(prefix + whole_name)
            roles.setdefault(self.role(whole, flat, info.module), whole)
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

    def entries(self) -> Iterator[tuple[TrainableParameter, nn.Module]]:
        """Every trainable parameter once, in named_parameters() order, and the module that owns it."""
        for full_name, parameter in self.model.named_parameters():  # tied ones come once, under their first name
            if not parameter.requires_grad:
                continue
            path = full_name.rpartition(".")[0]
            owner = self.structure.owners[path]
            if full_name.endswith(_FLAT) and hasattr(parameter, "_fqns"):
                name, role, decays = self.unflatten(full_name, parameter)
            else:
                name = clean_name(full_name)
                role = self.role(name, parameter, owner)
                decays = path not in self.structure.in_layer_norm and not _NO_DECAY.search(full_name.lower())
            yield TrainableParameter(name, parameter, role, decays), owner


_readings: ContextVar[dict[int, tuple[nn.Module, list[TrainableParameter]]] | None] = ContextVar(
    "readings", default=None
)


@contextmanager
def read_once() -> Iterator[None]:
    """Within this block, or a function that it decorates, a model is read once; whoever asks later gets that reading.

    Example:
        >>> with read_once():
        ...     optimizer = torch.optim.AdamW(loraplus.param_groups(model, lr=1e-3))  # doctest: +SKIP
        ...     table = loraplus.explain(model, optimizer)  # doctest: +SKIP
    """
    token = _readings.set({} if _readings.get() is None else _readings.get())
    try:
        yield
    finally:
        _readings.reset(token)


def trainable_parameters(model: nn.Module) -> list[TrainableParameter]:
    """Lists every trainable parameter of `model` once, with its role and whether weight decay applies to it.

    Parameters that share memory have one role: that of an embedding if one of them is an embedding's, else none of
    their own (`Role.OTHER`) where theirs differ.

    Args:
        model: any module; wrapped ones (DDP, torch.compile, …) keep their unwrapped names.

    Returns:
        One entry per trainable parameter, in the order of `model.named_parameters()`.

    Raises:
        NoTrainableParametersError: every parameter is frozen.
        NoLoraFactorsError: something trains, but no LoRA factor; says what kind of adapter the model has instead.
        UnknownAdapterParameterError: a parameter is an adapter's factor and no layout recognises it.
        FlattenedParametersError: FSDP1 has flattened parameters of several roles into one.
    """
    known = _readings.get()
    if known is None:
        return _read(model)
    if id(model) not in known:
        known[id(model)] = (model, _read(model))  # held, so that no other has its id
    return list(known[id(model)][1])


def _read(model: nn.Module) -> list[TrainableParameter]:
    reading = _Reading(model)
    read = list(reading.entries())
    if not read:
        raise NoTrainableParametersError(
            f"{type(model).__name__} has no trainable parameter; is the adapter active, and was it loaded with "
            "is_trainable=True?"
        )
    if not reading.factor_owners:
        other = cause(model)
        if other is None and reading.unknown:
            raise _unknown(reading.unknown[0])
        raise NoLoraFactorsError(
            f"{type(model).__name__} has {len(read)} trainable parameters but no LoRA factor (first: "
            f"{read[0][0].name}); {other or 'add an adapter, for example peft.get_peft_model(model, LoraConfig(...))'}"
        )
    if reading.unknown:
        raise _unknown(reading.unknown[0])
    heads = reading.structure.heads(reading.factor_owners)
    return _one_role_a_memory([_as_head(entry, owner, heads, reading.in_a_layout) for entry, owner in read])


def _unknown(name: str) -> UnknownAdapterParameterError:
    return UnknownAdapterParameterError(
        f"{name} is an adapter's factor, but no known layout says whether it is A or B; "
        "freeze it, or teach its layout with loraplus.roles.register_layout"
    )


def _as_head(entry: TrainableParameter, owner: nn.Module, heads: set[int], in_a_layout: set[int]) -> TrainableParameter:
    """A layer of the output whose weight trains is a head, whoever unfroze it.

    What a layout knows keeps its role: a scalar of an adapter on the output layer is the adapter's, not the layer's.
    """
    own = {name: p for name, p in owner.named_parameters(recurse=False) if id(p) not in in_a_layout}
    is_plain = entry.role in (Role.OTHER, Role.NORM_BIAS) and id(entry.parameter) not in in_a_layout
    weight_trains = any(parameter.requires_grad for name, parameter in own.items() if name != "bias")
    is_head = is_plain and weight_trains and id(owner) in heads and not _NORM_MODULE.search(type(owner).__name__)
    return entry._replace(role=Role.HEAD) if is_head else entry


def _one_role_a_memory(entries: list[TrainableParameter]) -> list[TrainableParameter]:
    for places in overlapping([entry.parameter for entry in entries]):
        first, *others = places
        roles = {entries[place].role for place in places}
        role = Role.OTHER if len(roles) > 1 else entries[first].role
        if len(roles) > 1 and roles & EMBEDDINGS:
            role = Role.EMBEDDING
        for place in places:
            entries[place] = entries[place]._replace(role=role, decays=entries[first].decays)
        for place in others:
            entries[place] = entries[place]._replace(shares=entries[first].name)
    return entries
