r"""Which part a trainable parameter plays: A, B, a head, a bias, …

A frozen layer y = W x is corrected by a low-rank product, y = W x + s·B A x. **A reads the layer's input, B writes
its output** (Hayou et al., arXiv 2402.12354, section 1); the factor that is zero in a fresh linear adapter is B.
The role follows from the place of the parameter in its adapter layer, never from its number of dimensions, so
sharding, flattening and 1-D parameters cannot move a parameter to another rate.

What stands between the factors is neither: KaSA's `lora_diag`, the r singular values in y = W x + s·B diag(d) A x, and
the priors of MonteCLoRA's sampler read no layer's input and write no layer's output, so the argument about the width
does not reach them, and they keep lr (`Role.OTHER`).

Each adapter layout is one recogniser; `register_layout` adds another.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import NamedTuple

from torch import nn

from loraplus.errors import (
    NoLoraFactorsError,
    NoTrainableParametersError,
    TrainerSetupError,
    UnknownAdapterParameterError,
)


class Role(StrEnum):
    """The part a trainable parameter plays; the value names its optimizer group and its log entry."""

    A = "lora_A"
    B = "lora_B"
    EMBEDDING_A = "lora_embedding_A"
    EMBEDDING_B = "lora_embedding_B"
    EMBEDDING = "embedding"  # whole embedding tables and trainable token rows
    MAGNITUDE = "magnitude"  # DoRA's magnitude vector
    HEAD = "head"  # modules trained in full beside the adapter (`modules_to_save`)
    NORM_BIAS = "norm_bias"
    OTHER = "other"


FACTORS = frozenset({Role.A, Role.B, Role.EMBEDDING_A, Role.EMBEDDING_B})

Recogniser = Callable[[str, nn.Module], "Role | None"]
"""Takes a parameter's clean name and the module that owns it; returns its role, or None if the layout is another."""

# FSDP1 with use_orig_params=False: one flat parameter for all that was wrapped together.
_FLAT = "_flat_param"
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


class TrainableParameter(NamedTuple):
    """A parameter that requires gradients, under the name it has without any wrapper."""

    name: str
    parameter: nn.Parameter
    role: Role
    decays: bool


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


# The adapter's own name follows the factor's (`lora_A.default.weight`) and cannot hold a dot. The anchors at both ends
# keep an adapter called "lora_B", or a base module of that name, from being taken for the factor.
_PEFT_PATTERNS: tuple[tuple[re.Pattern[str], Role], ...] = tuple(
    (re.compile(rf"(?:^|\.){pattern}$"), role)
    for pattern, role in (
        (rf"lora_A\.[^.]+(?:\.(?:weight|{_FLAT}))?", Role.A),
        (rf"lora_B\.[^.]+(?:\.(?:weight|{_FLAT}))?", Role.B),
        (r"lora_embedding_A\.[^.]+", Role.EMBEDDING_A),
        (r"lora_embedding_B\.[^.]+", Role.EMBEDDING_B),
        (r"lora_magnitude_vector\.[^.]+(?:\.weight)?", Role.MAGNITUDE),
        (r"lora_[AB]\.[^.]+\.bias", Role.NORM_BIAS),  # LoraConfig(lora_bias=True): an offset, not a factor
        (r"lora_diag\.[^.]+", Role.OTHER),  # KaSA
        (r"lora_monteclora_sampler\.[^.]+\.(?:std_prior|expert_weights_prior)", Role.OTHER),
        (r"trainable_tokens_delta\.[^.]+", Role.EMBEDDING),
    )
)
_MODULES_TO_SAVE = re.compile(r"(?:^|\.)modules_to_save\.[^.]+\.")


def recognise_peft(name: str, owner: nn.Module) -> Role | None:
    """PEFT's layout: factors in a ModuleDict or ParameterDict by adapter name, heads under `modules_to_save`."""
    for pattern, role in _PEFT_PATTERNS:
        if pattern.search(name):
            return role
    if _MODULES_TO_SAVE.search(name):
        return Role.EMBEDDING if isinstance(owner, nn.Embedding) else Role.HEAD
    return None


_layouts: dict[str, Recogniser] = {"peft": recognise_peft}


def register_layout(name: str, recognise: Recogniser) -> None:
    """Teaches loraplus another adapter layout. Later registrations are asked first.

    Args:
        name: what to call the layout; registering a name again replaces it.
        recognise: takes (clean parameter name, owning module), returns a `Role` or None.

    Example:
        >>> register_layout("down-up", lambda name, owner: Role.A if name.endswith("down.weight") else None)
        >>> unregister_layout("down-up")
    """
    _layouts.pop(name, None)
    _layouts[name] = recognise


def unregister_layout(name: str) -> None:
    """Forgets a registered layout."""
    _layouts.pop(name, None)


# transformers' Trainer keeps weight decay off these; ratio 1 must be plain AdamW there, so the rule is the same.
_NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")
_NORM_MODULE = re.compile(r"norm", re.IGNORECASE)
_LOOKS_LIKE_FACTOR = re.compile(r"lora", re.IGNORECASE)


def _role(name: str, owner: nn.Module) -> Role:
    for recognise in reversed(list(_layouts.values())):
        role = recognise(name, owner)
        if role is not None:
            return role
    if name.rpartition(".")[2] == _FLAT:
        raise TrainerSetupError(
            f"FSDP has flattened A and B into one parameter ({name}), which can have one rate only; wrap the model "
            "with use_orig_params=True, or each factor on its own (peft's fsdp_auto_wrap_policy), or use fully_shard"
        )
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
        TrainerSetupError: FSDP1 has flattened A and B into one parameter.
    """
    found = []
    for full_name, parameter, owner, in_layer_norm in _walk(model):
        if parameter.requires_grad:
            name = clean_name(full_name)
            decays = not in_layer_norm and not _NO_DECAY.search(full_name.lower())
            found.append(TrainableParameter(name, parameter, _role(name, owner), decays))
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
