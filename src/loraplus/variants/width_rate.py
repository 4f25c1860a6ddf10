"""Tinker's formula: one rate for A and B that follows from the width alone."""

from __future__ import annotations

from torch import nn

from loraplus.steps.movement import adapted_layers

BASE, FACTOR, WIDTH = 5e-5, 10.0, 2000.0
POWER = 0.781
"""Of Llama models, the family whose power the formula's authors give for models at large."""


def width_rate(model: nn.Module, power: float = POWER) -> float:
    """One rate for A and B that falls with a power of the width.

    η = 5e-5 · 10 · (2000 / n)^p

    10 is what LoRA's rate is above that of training all weights, in its authors' experience.

    Args:
        model: a PEFT model; n is the smallest width of the inputs of its adapted layers, which is the hidden size.
        power: p, fitted by the authors for each family of models.

    Raises:
        NoLoraFactorsError: no layer has a trainable A or B.

    Example:
        >>> optimizer = loraplus.create_optimizer(model, lr=width_rate(model), lr_ratio=1)  # doctest: +SKIP

    Source: the hyperparameter page of Tinker's cookbook (Thinking Machines Lab).
    """
    width = min(layer.weights[0][0].numel() for layer in adapted_layers(model))
    return BASE * FACTOR * (WIDTH / width) ** power
