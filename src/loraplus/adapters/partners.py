"""The other factor of a pair: what makes a factor of a parameter that is called like one.

A base layer may be called `lora_B` too, and a name is no evidence. B A takes two, so a factor is one beside its partner
only: `lora_B` beside `lora_A`, under the same adapter, in the same layer, and of a size that makes a product possible.
Whether the partner trains does not matter (LoRA-FA freezes A).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from loraplus.adapters.layouts import PAIRS, without_adapter

PARTNERS: dict[str, tuple[str, ...]] = {"lora_magnitude_vector": ("lora_A", "lora_embedding_A")}
PARTNERS |= {a: (b,) for a, b in PAIRS} | {b: (a,) for a, b in PAIRS}


def partner_names(name: str, owner: nn.Module, holder: nn.Module | None = None) -> Iterator[str]:
    """The names that the other factor of a pair may have. A factor's bias has its partners; DoRA's magnitude has A.

    Args:
        name: of a factor, without what wrappers add.
        owner: the module that holds it.
        holder: the module that holds the owner.

    Example:
        >>> list(partner_names("q.lora_B.default.weight", nn.Linear(2, 8), nn.ModuleDict()))
        ['q.lora_A.default.weight', 'q.lora_A.default']
    """
    short = without_adapter(name, owner, holder)
    forms = [(name, "")]
    if short != name:
        parts = name.split(".")
        forms.insert(0, (short, f".{parts[-1] if isinstance(owner, nn.ParameterDict) else parts[-2]}"))
    for form, key in forms:
        place, _, own = f".{form.removesuffix('.weight').removesuffix('.bias')}".rpartition(".")
        if own.isdecimal():  # one of several, in a list
            key = f".{own}{key}"
            place, _, own = place.rpartition(".")
        for partner in PARTNERS.get(own, ()):
            yield from (f"{place}.{partner}{key}{ending}".removeprefix(".") for ending in (".weight", ""))


def has_pair(layer: nn.Module) -> bool:
    """Whether a layer itself has both factors of a pair."""
    parts: dict[str, Any] = {**layer._modules, **layer._parameters}

    def of(name: str) -> tuple[nn.Module, Any]:
        member = parts[name]
        return (member, getattr(member, "weight", None)) if isinstance(member, nn.Module) else (layer, member)

    return any(fit(of(a), of(b)) for a, b in PAIRS if parts.get(a) is not None and parts.get(b) is not None)


def pair_within(layer: nn.Module | None) -> tuple[str, str] | None:
    """What A and B are called in a linear layer that has them right beside its own weight, whatever they are called.

    A takes the layer's inputs to r numbers and B takes these to its outputs, with r below both: a product of low rank,
    of the layer's own size. None where there is no such pair, or more than one.

    Example:
        >>> layer = nn.Linear(8, 6)
        >>> layer.first, layer.second = nn.Linear(8, 2, bias=False), nn.Linear(2, 6, bias=False)
        >>> pair_within(layer)
        ('first', 'second')
    """
    inputs, outputs = (0, 0) if layer is None else (_width(layer, "in"), _width(layer, "out"))
    if layer is None or not inputs or not outputs:
        return None
    widths = {name: (_width(part, "in"), _width(part, "out")) for name, part in layer.named_children()}
    found = [
        (a, b)
        for a, (taken, rank) in widths.items()
        for b, (given, made) in widths.items()
        if taken == inputs and rank == given and made == outputs and 0 < rank < min(inputs, outputs)
    ]
    return found[0] if len(found) == 1 else None


def fit(a: tuple[nn.Module, Any], b: tuple[nn.Module, Any]) -> bool:
    """Whether a product of two can be: what A gives is what B takes.

    Args:
        a: the module that holds A, and A, (rank, inputs) as a rule; None where nobody knows its shape.
        b: the same of B, (outputs, rank) as a rule.

    Example:
        >>> fit((nn.Linear(8, 2), None), (nn.Linear(2, 6), None)), fit((nn.Linear(8, 4), None), (nn.Linear(2, 6), None))
        (True, False)
    """
    if a[0] is not b[0]:  # modules of their own, not parameters of the layer that they adapt
        given, taken = _width(a[0], "out"), _width(b[0], "in")
        if given and taken:
            return given == taken
    of_a, of_b = whole_shape(a[1]), whole_shape(b[1])
    if of_a is None or of_b is None:
        return True
    if min(len(of_a), len(of_b)) < 2:
        return False
    enabled = getattr(a[0], "enable_lora", None)  # loralib's and litgpt's layer of several: A's of all in one
    blocks = sum(map(bool, enabled)) if isinstance(enabled, (list, tuple)) else 1
    # Which dimension is the rank differs: x A B of a user's own, LyCORIS' Tucker form, tables of embeddings.
    return of_a[0] == blocks * of_b[1] or not {*of_a[-2:]}.isdisjoint(of_b[-2:])


def _width(module: nn.Module, way: str) -> int:
    """Inputs or outputs of a linear layer or convolution: known even where its weight is flattened or packed."""
    megatron = f"{way}put_size"  # of the whole layer, whose weight is a part of it on each rank
    width = next((w for n in (f"{way}_features", f"{way}_channels", megatron) if (w := getattr(module, n, None))), 0)
    return width if isinstance(width, int) else 0


def whole_shape(tensor: object) -> tuple[int, ...] | None:
    """The shape of a whole matrix, sharded or not; None if this is flattened, packed, or not made yet."""
    if not isinstance(tensor, torch.Tensor) or is_lazy(tensor) or not tensor.is_floating_point():
        return None
    if (whole := getattr(tensor, "ds_shape", None)) is not None:  # ZeRO-3's
        return tuple(whole)
    flattened = getattr(tensor, "_fsdp_flattened", False)  # FSDP1's own mark
    return None if flattened or not tensor.numel() else tuple(tensor.shape)
