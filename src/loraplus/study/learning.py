"""Whether the arms of a comparison learnt anything, seed by seed, on the test examples (`tasks/learnt.py`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from loraplus.study.arms import ALL, REFERENCE
from loraplus.study.records import Record
from loraplus.study.wording import in_seeds
from loraplus.tasks.learnt import LEVEL

TEST = "permutation test over test examples, Bonferroni over seeds"


def learning(runs: Sequence[Record]) -> dict[str, Any] | None:
    """What the runs of an arm learnt; None where they do not tell: of language models, and of earlier versions.

    A seed learnt something if its p is below the level divided by the number of seeds (Bonferroni). An arm that learns
    nothing then counts as one that does in one comparison of twenty.
    """
    values = [run.values for run in runs]
    if not values or not all("chance_p" in value for value in values):
        return None
    p_values = [value["chance_p"] for value in values]
    counts = {
        "seeds": len(p_values),
        "learnt": sum(p < LEVEL / len(p_values) for p in p_values),
        "p_values": p_values,
        "accuracy": fmean(fmean(run.test_correct) for run in runs),
    }
    names = ("macro_f1", "majority_share")
    return counts | {name: fmean(value[name] for value in values) for name in names if all(name in v for v in values)}


def nothing_learnt(by_arm: Mapping[str, Mapping[str, Any] | None]) -> list[str]:
    """The arms that learnt nothing on any seed, if LoRA is among them: there is nothing to compare these by."""
    arms = [arm for arm, of_arm in by_arm.items() if of_arm is not None and of_arm["learnt"] == 0]
    return arms if REFERENCE in arms and len(arms) > 1 else []


def nothing_sentence(by_arm: Mapping[str, Mapping[str, Any] | None], arms: Sequence[str]) -> str:
    """The sentence that some arms learnt nothing, how that shows, and what to try."""
    of_arms = {arm: of_arm for arm in arms if (of_arm := by_arm[arm])}
    shares = " and ".join(f"{ALL[arm].title} {100 * of_arm['accuracy']:.1f}%" for arm, of_arm in of_arms.items())
    first = next(iter(of_arms.values()))
    frequent = ""
    if "majority_share" in first:
        frequent = f", where always the most frequent class has {100 * first['majority_share']:.1f}%"
    return (
        f"Nothing was learnt: test accuracy is {shares}{frequent}, and the answers fit the labels no better than "
        f"shuffled ones (permutation test, {100 * LEVEL:.0f}% over {in_seeds(first['seeds'])}). So there is nothing to "
        "compare; train longer (--epochs, --max-steps), give more --tuning-runs or another --lr-head, and see whether "
        "the labels fit (--check)."
    )


def some_seeds_sentence(by_arm: Mapping[str, Mapping[str, Any] | None], but: Sequence[str]) -> str:
    """The arms, other than those in `but`, that learnt nothing on some seeds; empty if there are none."""
    parts = [
        f"{ALL[arm].title} on {of_arm['seeds'] - of_arm['learnt']} of {in_seeds(of_arm['seeds'])}"
        for arm, of_arm in by_arm.items()
        if of_arm is not None and of_arm["learnt"] < of_arm["seeds"] and arm not in but
    ]
    return f"Nothing that the permutation test shows was learnt by {' and '.join(parts)}." if parts else ""
