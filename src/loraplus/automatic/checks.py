"""What automatic rates refuse: factors that cannot be read, and optimizers whose steps do not scale with a rate."""

from __future__ import annotations

import torch
from torch import nn

from loraplus.automatic.owned_groups import OwnedGroups
from loraplus.automatic.proposal import scales_with_rate, size_like_adams
from loraplus.errors import NoLoraFactorsError, TrainerSetupError
from loraplus.steps.movement import adapted_layers

AS_NUMBERS = "give lr and lr_ratio as numbers (--lr 3e-4 on the command line)"


def check_layers(model: nn.Module) -> None:
    """Refuses factors that cannot be read."""
    try:
        layers = adapted_layers(model)
    except NoLoraFactorsError as error:
        raise NoLoraFactorsError(f"automatic rates: {error}; {AS_NUMBERS}") from None
    for entry in layers:
        for weight in entry.weights:
            if weight.dim() < 2 or not weight.numel():
                raise TrainerSetupError(
                    f"AutoRates cannot read the factors of {entry.name}: they are flattened or sharded away (FSDP1, "
                    f"ZeRO-3); use DDP or FSDP2, or {AS_NUMBERS}"
                )
    if all(entry.experts for entry in layers):
        raise TrainerSetupError(
            f"AutoRates cannot measure any of {len(layers)} adapted layers, which are banks of experts (first: "
            f"{layers[0].name}): their inputs are not seen; {AS_NUMBERS}"
        )


def check_steps(optimizer: torch.optim.Optimizer, groups: OwnedGroups) -> float | None:
    """Refuses an optimizer that cannot be asked what it would do; tells the size that its steps need to be given."""
    if getattr(optimizer, "takes_model", False):  # what is tried below is a matrix without its partner
        if getattr(optimizer, "like_adam", False):
            return None
        name = type(optimizer).__name__
        raise TrainerSetupError(f"AutoRates does not know how far steps of {name} lead; use AdamW, or {AS_NUMBERS}")
    parameters = groups.examples()
    if not all(scales_with_rate(optimizer, parameter) for parameter in parameters):
        raise TrainerSetupError(
            f"AutoRates cannot set the rates of {type(optimizer).__name__}: its steps do not simply scale with lr; use "
            f"AdamW, Adam, SGD, Lion or the like, or {AS_NUMBERS}"
        )
    sizes = [size_like_adams(optimizer, parameter) for parameter in parameters]
    return None if None in sizes else min(size for size in sizes if size is not None)
