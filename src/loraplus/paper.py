"""The grouping of the paper's authors, parameter by parameter, for results that must be comparable with theirs.

docs/differences.md says where `param_groups` differs and why.
"""

from __future__ import annotations

import sys
from operator import attrgetter
from typing import Any

from torch import nn

from loraplus.errors import InvalidRateError
from loraplus.rates import Rates
from loraplus.roles import trainable_parameters

LR_EMBEDDING = 1e-6
"""The authors' rate of embedding factors, which hardly trains them."""


def paper_groups(
    model: nn.Module, lr: float, lr_ratio: float, weight_decay: float = 0.0, lr_embedding: float = LR_EMBEDDING
) -> list[dict[str, Any]]:
    """The authors' four groups, empty ones included.

    lr_ratio·lr for every parameter whose name has "lora_B" or that has one dimension, whatever it is; `lr_embedding`
    for adapters of embeddings; lr for the rest. No decay for those at B's rate that are biases or inside a LayerNorm.

    Args:
        model: a model with LoRA factors.
        lr: η_A.
        lr_ratio: λ = η_B / η_A.
        weight_decay: of all other groups.
        lr_embedding: rate of both factors of an adapted embedding.

    Returns:
        Groups named "groupA", "embedding", "groupB" and "groupB_no_decay", as in the authors' code.

    Raises:
        InvalidRateError: a rate or decay that cannot be used.
        NoTrainableParametersError, NoLoraFactorsError, UnknownAdapterParameterError: see `trainable_parameters`.

    Source: github.com/nikhil-ghosh-berkeley/loraplus, `create_loraplus_optimizer`; PEFT's is the same rule.
    """
    rates = Rates(lr, lr_ratio, lr_embedding)
    if weight_decay < 0:
        raise InvalidRateError(f"weight_decay must be ≥ 0, got {weight_decay!r}")
    trainable_parameters(model)  # its errors: theirs trains a model without LoRA in silence
    decay = {name for name in _outside_layer_norms(model) if "bias" not in name}
    fast = rates.lr_a * rates.lr_ratio
    groups: dict[str, dict[str, Any]] = {
        name: {"params": [], "lr": group_lr, "weight_decay": group_decay, "name": name}
        for name, group_lr, group_decay in (
            ("groupA", rates.lr_a, weight_decay),
            ("embedding", rates.lr_embedding, weight_decay),
            ("groupB", fast, weight_decay),
            ("groupB_no_decay", fast, 0.0),
        )
    }
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if _is_adapted_embedding(model, name):
            group = "embedding"
        elif "lora_B" in name or parameter.ndim == 1:
            group = "groupB" if name in decay else "groupB_no_decay"
        else:
            group = "groupA"
        groups[group]["params"].append(parameter)
    return list(groups.values())


def _outside_layer_norms(module: nn.Module) -> list[str]:
    """Names of parameters that no LayerNorm holds; transformers' get_parameter_names."""
    names = list(module._parameters)
    for name, child in module.named_children():
        if not isinstance(child, nn.LayerNorm):
            names += [f"{name}.{inner}" for inner in _outside_layer_norms(child)]
    return names


def _is_adapted_embedding(model: nn.Module, name: str) -> bool:
    layers = sys.modules.get("peft.tuners.lora.layer")  # not imported: then the model has none of PEFT's layers
    owner = name.rpartition(".")[0].rpartition(".")[0]
    return layers is not None and owner != "" and isinstance(attrgetter(owner)(model), layers.Embedding)
