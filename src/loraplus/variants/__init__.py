"""Other methods for the same pair of factors, one file each, as optimizers and rates to be held against LoRA+.

A method with steps of its own is a `PairOptimizer` with one function; one with a rate of its own is a function of the
model. docs/variants.md has their equations and what was measured. Nothing is imported before it is used.
"""

from __future__ import annotations

import difflib
import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loraplus.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class Variant:
    """A method beside LoRA+.

    Args:
        name: in `create_optimizer`, and as an arm of `loraplus compare`.
        title: in tables.
        lr: the rate that its authors or their code give; None if the method computes one.
        home: module of this package and name in it: a `PairOptimizer`, or a function of the model that gives the rate.
    """

    name: str
    title: str
    lr: float | None
    home: tuple[str, str]

    def load(self) -> Any:
        """The class or function."""
        module, name = self.home
        return getattr(importlib.import_module(f"{__name__}.{module}"), name)


ALL: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant("lora-rite", "LoRA-RITE", 1e-3, ("lora_rite", "LoraRite")),
        Variant("riemannian", "Riemannian preconditioning", 3e-4, ("riemannian", "Riemannian")),
        Variant("muon", "Muon on the factors", 1e-3, ("muon", "Muon")),
        Variant("mua", "μA", None, ("maximal_update", "tied_rate")),
        Variant("tinker", "Tinker's formula", None, ("width_rate", "width_rate")),
    )
}


def create_optimizer(
    model: nn.Module, name: str, *, lr: float | None = None, lr_ratio: float = 1.0, **options: object
) -> torch.optim.Optimizer:
    """The optimizer of a method, over the trainable parameters.

    Args:
        model: a PEFT model.
        name: of `ALL`.
        lr: η_A. Default: the method's own.
        lr_ratio: λ = η_B / η_A; the methods have one rate.
        **options: of the method, and of `loraplus.create_optimizer` (weight_decay, lr_head, betas, …).

    Returns:
        An ordinary optimizer with named groups, which `loraplus.explain` and `verify` read.

    Raises:
        InputError: there is no such method.
        The errors of `loraplus.create_optimizer`.

    Example:
        >>> optimizer = loraplus.variants.create_optimizer(model, "lora-rite", lr=1e-3)  # doctest: +SKIP
    """
    import loraplus

    if name not in ALL:
        (near,) = difflib.get_close_matches(str(name), ALL, n=1, cutoff=0.0)
        raise InputError(f"there is no variant {name!r}; the nearest is {near!r}, all are {', '.join(ALL)}")
    variant = ALL[name]
    made = variant.load()
    if variant.lr is None:
        lr = made(model) if lr is None else lr
        return loraplus.create_optimizer(model, lr=lr, lr_ratio=lr_ratio, **options)
    return loraplus.create_optimizer(model, made, lr=variant.lr if lr is None else lr, lr_ratio=lr_ratio, **options)


def __getattr__(name: str) -> Any:
    """The classes of the methods, `variants.Muon`, once they are asked for."""
    variant = next((each for each in ALL.values() if each.home[1] == name and each.lr is not None), None)
    if variant is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return variant.load()
