"""What the page of a run says of the model's scores: before and after, each class, what was confused with what."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from loraplus.report.page import number, percent
from loraplus.tasks.config import CLASSIFICATION, MULTI_LABEL, REGRESSION
from loraplus.tasks.learnt import ADVICE
from loraplus.tasks.scores import FIGURES

_HEADLINE = {CLASSIFICATION: "accuracy", MULTI_LABEL: "micro_f1", REGRESSION: "r2"}
_MOST_CLASSES_IN_A_MATRIX = 20  # on a page; more are shown as the pairs that are confused most


def scored_parts(
    scores: Mapping[str, Any], metrics: Mapping[str, Any], curves: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The parts of the page, as text and tables.

    Args:
        scores: content of scores.json.
        metrics: content of metrics.json.
        curves: rows of curves.csv, as numbers.
    """
    shown = [name for name in FIGURES if name in scores]
    measure = _HEADLINE[scores["task"]]
    return {
        "task": scores["task"],
        "examples": scores["examples"],
        "headline": f"{FIGURES[measure]} {_written(measure)(scores[measure])}",
        "nothing": None if scores["learnt"]["learnt"] else ADVICE,
        "p_value": scores["learnt"]["p_value"],
        "majority_share": scores.get("majority_share"),
        "before_and_after": [
            (FIGURES[name], _written(name)(metrics.get("base", {}).get(f"eval_{name}")), _written(name)(scores[name]))
            for name in shown
        ],
        "each": scores.get("per_class") or scores.get("per_label") or [],
        "matrix": _matrix(scores),
        "confused": scores.get("confused", []),
        "errors": _errors(scores),
        "mistakes": [_mistake(row) for row in scores["mistakes"]],
        "evaluations": _evaluations(curves, shown),
    }


def _written(measure: str) -> Callable[[float | None], str]:
    """How a figure is written."""
    if measure in ("mse", "mae"):
        return lambda value: "–" if value is None else f"{value:.4g}"
    return percent if measure == "accuracy" else lambda value: number(value, 4 if measure == "loss" else 3)


def _errors(scores: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(of which texts, how far their numbers are off), in words."""
    if "absolute_error" not in scores:
        return []
    sizes = scores["absolute_error"]
    return [
        ("half of the texts", f"are off by {sizes['median']:.4g} or less"),
        ("nine in ten", f"by {sizes['percentile_90']:.4g} or less"),
        ("the worst", f"by {sizes['largest']:.4g}"),
        ("on average", f"the answer is {scores['mean_error']:+.4g} from the truth"),
    ]


def _mistake(row: Mapping[str, Any]) -> dict[str, str]:
    """One mistake, with numbers as text."""
    if "error" in row:
        said = {name: f"{row[name]:.4g}" for name in ("truth", "prediction")}
        return {"text": row["text"], **said, "how": f"{row['error']:+.4g}"}
    said = {name: row[name] or "none" for name in ("truth", "prediction")}
    return {"text": row["text"], **said, "label": row.get("label", ""), "how": percent(row["probability"])}


def _matrix(scores: Mapping[str, Any]) -> list[tuple[str, list[tuple[int, float]]]]:
    """(true class, (count, part of the row) of each predicted class); empty if there is none, or too large a one."""
    rows = scores.get("confusion_matrix")
    if not rows or len(rows) > _MOST_CLASSES_IN_A_MATRIX:
        return []
    return [
        (label, [(count, count / max(1, sum(row))) for count in row])
        for label, row in zip(scores["labels"], rows, strict=True)
    ]


def _evaluations(curves: Sequence[Mapping[str, Any]], shown: Sequence[str]) -> dict[str, Any]:
    """The figures at every evaluation: {"titles", "rows"}."""
    names = [name for name in shown if any(row.get(f"eval_{name}") is not None for row in curves)]
    rows = [
        [f"{row['step']:g}", *(_written(name)(row.get(f"eval_{name}")) for name in names)]
        for row in curves
        if row.get("eval_loss") is not None
    ]
    return {"titles": ["step", *(FIGURES[name] for name in names)], "rows": rows}
