"""Figures that one page takes from another are those that stand there."""

from __future__ import annotations

import json
import math
import re
from collections import Counter

from pages.blocks import DOCS, ROOT


def read(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def best_points() -> list[tuple[float, int]]:
    """η_A and λ of each grid's best point, from the table of the automatic rates."""
    rows = re.findall(
        r"^\| \S+ \| (?:tuned|untouched) \| [\d.]+ \| ([\d.]+), (\d+) \|", read("auto-rates.md"), re.MULTILINE
    )
    return [(float(lr), int(ratio)) for lr, ratio in rows]


def test_the_best_rates_are_counted_right():
    points = best_points()
    assert len(points) == 14
    means = Counter(f"{lr * math.sqrt(ratio):.1g}" for lr, ratio in points)
    ratios = Counter(ratio for _, ratio in points)
    page = read("choosing.md")
    assert dict(means) == {"0.001": 1, "0.003": 10, "0.01": 3}
    assert dict(ratios) == {1: 5, 4: 8, 64: 1}
    for row in ("| 0.001 | 1 |", "| 0.0032 | 10 |", "| 0.01 | 3 |", "| 1 | 5 |", "| 4 | 8 |", "| 64 | 1 "):
        assert row in page


def test_what_the_readme_sums_up_stands_on_the_page_of_claims():
    readme, claims = (ROOT / "README.md").read_text(encoding="utf-8"), read("claims.md")
    for figure in ("13 of 14 settings", "2.0% in the median", "0.993", "[0.984, 1.003]"):
        assert figure in readme and figure in claims, figure
    assert "about 1% above the best of a grid" in readme and "about 1% above the best of a grid" in claims


def test_the_demo_is_quoted_as_it_came_out():
    summary = json.loads((DOCS / "demo" / "summary.json").read_text(encoding="utf-8"))
    assert f"> {summary['verdict']}" in read("demo.md")
    for arm in (*summary["arms"].values(), *summary["untuned"].values()):
        if isinstance(arm, dict) and arm.get("test"):
            accuracy = arm["test"]["accuracy"]
            assert "{mean:.1%} [{low:.1f}, {high:.1f}]".format(
                mean=accuracy["mean"], low=100 * accuracy["low"], high=100 * accuracy["high"]
            ) in read("demo.md")


def test_differences_of_the_demo_are_quoted_as_they_came_out():
    summary = json.loads((DOCS / "demo" / "summary.json").read_text(encoding="utf-8"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for part, pages in (("paired", (readme, read("report.md"))), ("untuned", (readme, read("claims.md")))):
        points = {name: 100 * value for name, value in summary[part]["accuracy_difference"].items()}
        interval = f"[{points['low']:.1f}, {points['high']:.1f}]".replace("-", "−")
        for page in pages:
            assert f"{abs(points['mean']):.1f} points" in page and interval in page, (part, interval)
