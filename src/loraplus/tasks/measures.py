"""What the models of a task are judged by."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from loraplus.tasks.config import CLASSIFICATION, MULTI_LABEL, REGRESSION

LOSS, ACCURACY, PERPLEXITY = "loss", "accuracy", "perplexity"
MEASURES = {
    CLASSIFICATION: (LOSS, ACCURACY),
    REGRESSION: (LOSS,),
    MULTI_LABEL: (LOSS, ACCURACY),
    "sft": (LOSS, PERPLEXITY),
    "lm": (LOSS, PERPLEXITY),
}
"""The tasks, each with its measures."""


def measures_of(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """The measures of a saved configuration; earlier versions knew one task and did not note it."""
    return MEASURES[settings.get("task", CLASSIFICATION)]


def perplexity(loss: float) -> float:
    """exp(loss) of a mean loss a token; infinite where a float cannot hold it.

    Example:
        >>> perplexity(0.0)
        1.0
    """
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
