"""μA: one rate for A and B that follows from width, rank and scale."""

from __future__ import annotations

import math
from statistics import fmean

from torch import nn

from loraplus.rates import DEFAULT_LR
from loraplus.steps.movement import adapted_layers

# n, r and s = α/r where the rule gives DEFAULT_LR: BERT's width at the default rank and α.
REFERENCE_WIDTH, REFERENCE_RANK, REFERENCE_SCALING = 768, 8, 16.0 / 8


def tied_rate(model: nn.Module) -> float:
    r"""One rate for A and B by the maximal-update argument.

    A is random and B zero. In a step of Adam at rate η every entry moves by η: those of B by η, and A x, a sum over
    the n inputs, by n·η. So through B the step of A moves the output s·B A x by s·r·n·η², a sum over the rank r. For
    this to be the same in all models,

        η = c / √(n·r·s),      s = α/r, or α/√r for rsLoRA

    which does not depend on the rank for s = α/r with constant α, and falls as 1/√r for α = r. c is such that the rate
    is 3e-4, the usual one, at n = 768, r = 8 and α = 16.

    Args:
        model: a PEFT model; n·r·s is the geometric mean over its adapted layers (of different widths, say).

    Raises:
        NoLoraFactorsError: no layer has a trainable A and B.

    Example:
        >>> optimizer = loraplus.create_optimizer(model, lr=tied_rate(model), lr_ratio=1)  # doctest: +SKIP

    Source: derived here. The two regimes are those that the abstract of arXiv 2602.06204 (μA) states; the paper's own
    table of exponents could not be consulted, so its prescription may differ in what the abstract leaves open.
    """
    sizes = [layer.weights[0].numel() * layer.scaling for layer in adapted_layers(model)]  # A has n·r entries
    mean = math.exp(fmean(math.log(size) for size in sizes))
    return DEFAULT_LR * math.sqrt(REFERENCE_WIDTH * REFERENCE_RANK * REFERENCE_SCALING / mean)
