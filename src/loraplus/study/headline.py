"""What a comparison found, in a few words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loraplus.study.arms import ALL, REFERENCE
from loraplus.tasks.measures import ACCURACY, perplexity

NOTHING_LEARNT = "Nothing was learnt"
NO_DIFFERENCE = "No difference found"
NO_VERDICT = "No verdict with so few seeds"
_MOST = 2


def headline(summary: Mapping[str, Any]) -> str:
    """A headline from the content of summary.json: what was found, or that nothing was.

    Example:
        >>> pair = {"found": True, "accuracy_difference": {"mean": 0.021}}
        >>> headline({"arms": {"lora": {}, "loraplus": {}}, "paired": pair})
        'LoRA+ ahead by 2.1 points'
    """
    arms = [arm for arm in summary["arms"] if arm != REFERENCE]
    nothing = (summary.get("learning") or {}).get("nothing", ())
    pairs = {"loraplus": summary["paired"], **summary.get("paired_with_lora", {})}
    told = {arm: pairs[arm] for arm in ALL if arm in arms and arm in pairs and arm not in nothing}
    if not told and nothing:
        return NOTHING_LEARNT
    differing = [_ahead(ALL[arm].title, pair) for arm, pair in told.items() if pair.get("found")]
    if len(differing) > _MOST:
        differing[_MOST:] = [f"{len(differing) - _MOST} more"]
    if differing:
        return "; ".join(differing)
    return NO_DIFFERENCE if any(pair.get("found") is False for pair in told.values()) else NO_VERDICT


def _ahead(title: str, pair: Mapping[str, Any]) -> str:
    if ACCURACY + "_difference" in pair:
        mean = 100 * pair["accuracy_difference"]["mean"]
        return f"{title} {'ahead' if mean > 0 else 'behind'} by {abs(mean):.1f} points"
    factor = perplexity(pair["loss_difference"]["mean"])
    digits = 1 if abs(factor - 1) >= 0.001 else 3
    change = f"perplexity {100 * abs(factor - 1):.{digits}f}% {'lower' if factor < 1 else 'higher'}"
    return f"{title} {'ahead' if factor < 1 else 'behind'}: {change}"
