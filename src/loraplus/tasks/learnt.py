"""Whether anything was learnt: a model's answers against the same answers shuffled among the examples.

The permutation test asks how often answers that are shuffled among the examples fit as well as those that were given.
Answers that do not depend on the text, such as always the most frequent class, fit as well as any of their shuffles: p
is 1 then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

LEVEL = 0.05
"""How often a model that learnt nothing may count as one that did."""
ADVICE = "train longer (--epochs, --max-steps), try another --lr or --lr-head, and see whether the labels fit (--check)"
_SHUFFLES = 999
_MOST_EXAMPLES = 2000


def same(answers: np.ndarray, truth: np.ndarray) -> float:
    """How many are equal: classes (examples,), or labels of texts (examples, labels)."""
    return float(np.count_nonzero(answers == truth))


def product(answers: np.ndarray, truth: np.ndarray) -> float:
    """Σ of products of numbers (examples,): shuffles of one side change a correlation by this sum alone."""
    return float(np.dot(answers, truth))


def chance_p(
    answers: np.ndarray, truth: np.ndarray, fit: Callable[[np.ndarray, np.ndarray], float] = same, seed: int = 0
) -> float:
    """One-sided p of the permutation test: (1 + shuffles that fit as well) / (1 + shuffles).

    Args:
        answers: of a model, (examples,) or (examples, labels).
        truth: likewise.
        fit: of the two; more is better.
        seed: of the shuffles.

    Example:
        >>> always = np.zeros(10, int)
        >>> chance_p(always, np.asarray([0, 1] * 5))
        1.0
        >>> chance_p(np.arange(10) % 2, np.asarray([0, 1] * 5)) < LEVEL
        True

    Source: Good, Permutation, Parametric and Bootstrap Tests of Hypotheses (2005), section 3.
    """
    if len(truth) > _MOST_EXAMPLES:
        some = np.linspace(0, len(truth) - 1, _MOST_EXAMPLES).astype(int)
        answers, truth = answers[some], truth[some]
    draw, given = np.random.default_rng(seed), fit(answers, truth)
    close = 1e-9 * abs(given)  # sums in another order
    as_well = sum(fit(answers, truth[draw.permutation(len(truth))]) >= given - close for _ in range(_SHUFFLES))
    return (1 + as_well) / (1 + _SHUFFLES)


def learnt_record(p: float, over: str = "validation examples") -> dict[str, Any]:
    """What metrics.json says of a run, and scores of a model.

    Args:
        p: of the permutation test.
        over: what was asked.

    Example:
        >>> learnt_record(0.4)["learnt"]
        False
    """
    return {"learnt": p < LEVEL, "test": f"permutation test over {over}", "p_value": p, "level": LEVEL}
