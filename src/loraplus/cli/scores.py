"""Shows the scores of a model on labelled texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loraplus.cli.terminal import Console, plain_table
from loraplus.study.wording import counted
from loraplus.tasks.learnt import ADVICE
from loraplus.tasks.scores import figures

_MOST_CLASSES, _MOST_IN_A_MATRIX = 30, 8


def show_scores(console: Console, scored: Mapping[str, Any]) -> None:
    """The figures in a line, and what is to be known with them.

    Args:
        console: to show it on.
        scored: from `scores`.
    """
    shown = " · ".join(f"{name} {value:.4f}" for name, value in figures(scored).items())
    console.say(f"{shown} on {scored['examples']:,} labelled texts")
    if "majority_share" in scored:
        console.say(f"always the class that is most frequent in training: accuracy {scored['majority_share']:.4f}")
    if "absolute_error" in scored:
        sizes = scored["absolute_error"]
        console.say(
            f"off by {sizes['median']:.4g} or less on half of the texts, {sizes['percentile_90']:.4g} or less on nine "
            f"in ten, {sizes['largest']:.4g} at most"
        )
    if not scored["learnt"]["learnt"]:
        console.say(
            f"the answers fit no better than shuffled ones (permutation test, p = {scored['learnt']['p_value']:.2g}): "
            f"nothing shows that anything was learnt; {ADVICE}"
        )


def show_losses(console: Console, measured: Mapping[str, Any]) -> None:
    """Loss and perplexity of a language model and of its base, and over what they were measured.

    Args:
        console: to show it on.
        measured: the scores of `loraplus evaluate`.
    """
    from loraplus.tasks.seen import longer_ones

    without = f"; {counted(measured['examples_dropped'], 'example')} left out" if measured["examples_dropped"] else ""
    long = f"; {longer_ones(measured)}" if measured["longer_than_context"] else ""
    base = measured["base"]
    console.say(f"{measured['columns']}: {measured['format']}")
    console.say(
        f"loss on {measured['loss_on']}: {measured['target_tokens']:,} tokens of "
        f"{counted(measured['examples'], 'example')}, each up to {measured['max_length']} tokens{long}{without}"
    )
    console.say(
        f"loss {measured['loss']:.4f} a token · perplexity {measured['perplexity']:.4f}; base model {base['loss']:.4f} "
        f"and {base['perplexity']:.4f}"
    )


def show_each(console: Console, scored: Mapping[str, Any]) -> None:
    """A table of the classes or labels, and of classes what they were taken for."""
    rows = scored.get("per_class") or scored.get("per_label") or []
    if rows:
        table = plain_table("label", "precision", "recall", "F1", "support", "predicted", left=1)
        for row in rows[:_MOST_CLASSES]:
            parts = (f"{row[name]:.3f}" for name in ("precision", "recall", "f1"))
            table.add_row(row["label"], *parts, str(row["support"]), str(row["predicted"]))
        console.widened().print(table)
    if len(rows) > _MOST_CLASSES:
        console.say(f"and {len(rows) - _MOST_CLASSES} more (--json or --output)")
    matrix = scored.get("confusion_matrix")
    if matrix and len(matrix) <= _MOST_IN_A_MATRIX:
        table = plain_table("true class", *(f"said {label}" for label in scored["labels"]), left=1)
        for label, counts in zip(scored["labels"], matrix, strict=True):
            table.add_row(label, *map(str, counts))
        console.print(table)
    elif pairs := scored.get("confused"):
        shown = ", ".join(f"{pair['truth']} for {pair['prediction']} {pair['count']}×" for pair in pairs[:5])
        console.say(f"confused most (true class for what was said): {shown}")
