"""Fills the templates of pages: numbers as text, charts as SVG, all in one file that needs no network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined, Template

from loraplus.errors import visible
from loraplus.report import plots
from loraplus.report.chart import Cell
from loraplus.report.svg import draw
from loraplus.study.arms import ALL
from loraplus.study.headline import headline
from loraplus.study.pairs import deciding
from loraplus.study.records import ARMS, Record
from loraplus.study.wording import counted, p_value
from loraplus.tasks.command_line import command_of_settings
from loraplus.tasks.measures import ACCURACY, measures_of, perplexity

_TEMPLATE = "compare.html.jinja"
_MAIN = "loraplus"
_UNTUNED = f"{ALL[_MAIN].title}, untuned"


def render(summary: dict[str, Any], records: Sequence[Record]) -> str:
    """The report of a comparison as one HTML page.

    Args:
        summary: content of summary.json.
        records: of all runs.

    Returns:
        HTML; text that came from data is escaped, and nothing is loaded from elsewhere.
    """
    summary = {"untuned": None, "config": {}, "cost": {"seconds_per_step_ratio": None}, **summary}
    best = {arm: row["best"] for arm, row in summary["arms"].items() if ALL[arm].tuned}
    arms = [arm for arm in ALL if arm in summary["arms"]]
    measures, learning, pairs = measures_of(summary["config"]), summary.get("learning", {}), _pairs(summary)
    return template(_TEMPLATE).render(
        summary=summary,
        headline=headline(summary),
        command=command_of_settings("compare", summary["config"]),
        records=records,
        arms=arms,
        main=ARMS,
        others=[arm for arm in arms if arm not in ARMS],
        info=ALL,
        titles={arm: info.title for arm, info in ALL.items()},
        classes=_classes(summary["data"]),
        has_accuracy=ACCURACY in measures,
        nothing=learning.get("nothing", ()),
        nothing_untuned=bool(learning.get("nothing_untuned")),
        seeds=plots.differences(pairs, deciding(measures)) if pairs else None,
        curves=plots.curves(records),
        curves_in_time=plots.curves(records, "seconds"),
        rates=plots.rates(records, best),
    )


@cache  # a page of something under way is written again and again
def template(name: str, *packages: str) -> Template:
    """A page of these packages, or of this one. What is put into it is escaped.

    Filters turn numbers into text; `svg` draws a `Chart`.
    """
    loaders = [PackageLoader(package, ".") for package in (*packages, "loraplus.report")]
    pages = Environment(
        loader=ChoiceLoader(loaders), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
    )  # fmt: skip
    pages.filters |= {
        "rate": plots.rate_or_dash, "percent": percent, "number": number, "points": points, "signed": signed,
        "ratio": ratio, "factor": factor, "perplexity": perplexity, "decides": decides, "cell": cell, "svg": draw,
        "counted": counted, "p": p_value,
    }  # fmt: skip
    return pages.get_template(name)


def cell(value: Cell) -> str:
    """A number with four significant digits, text as it is, a dash where there is nothing.

    Example:
        >>> [cell(value) for value in (0.123456, 3, "Adam", None)]
        ['0.1235', '3', 'Adam', '–']
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _pairs(summary: dict[str, Any]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Every comparison with LoRA that has seeds, and something learnt: {title: (arm, its part of the summary)}."""
    learning = summary.get("learning", {})
    empty = {ALL[arm].title for arm in learning.get("nothing", ())}
    if learning.get("nothing_untuned"):
        empty.add(_UNTUNED)
    by_title = {
        ALL[_MAIN].title: (_MAIN, summary["paired"]),
        **{ALL[arm].title: (arm, pair) for arm, pair in summary.get("paired_with_lora", {}).items()},
        _UNTUNED: (_MAIN, summary["untuned"] or {}),
    }
    return {title: (arm, pair) for title, (arm, pair) in by_title.items() if pair.get("by_seed") and title not in empty}


def _classes(data: dict[str, Any]) -> list[str]:
    """The labels, each with the number of its training examples where that is known."""
    counts = {str(label): count for label, count in (data.get("train_class_counts") or {}).items()}
    return [
        f"{label} ({counts[str(label)]})" if str(label) in counts else str(label) for label in data.get("labels", ())
    ]


def ratio(value: float | None) -> str:
    """λ with at most three digits."""
    return "–" if value is None else f"{float(f'{value:.3g}'):g}"


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def number(value: float | None, digits: int = 3) -> str:
    """A number with fixed digits, a dash where there is none."""
    return f"{value:.{digits}f}" if value is not None and _finite(value) else "–"


def percent(value: float | None) -> str:
    """A part as a percentage."""
    return f"{100 * value:.1f}%" if value is not None and _finite(value) else "–"


def points(value: float | None) -> str:
    """A difference of parts in points, with its sign."""
    return f"{100 * value:+.1f}" if value is not None and _finite(value) else "–"


def signed(value: float | None) -> str:
    """A difference with three digits and its sign."""
    return f"{value:+.3f}" if value is not None and _finite(value) else "–"


def factor(difference: float | None) -> str:
    """What a difference in loss makes of perplexity: ×0.979."""
    return f"×{perplexity(difference):.3f}" if difference is not None and _finite(difference) else "–"


def decides(pair: Mapping[str, Any]) -> str:
    """The p that the verdict on a pair rests on; the untuned pair stands alone, so its own p needs no correction."""
    if pair["found"] is None:
        return "no verdict"
    return p_value(next(pair[name] for name in ("p_value_holm", "p_value", "loss_p_value") if name in pair))
