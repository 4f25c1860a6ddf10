"""`loraplus compare`: LoRA against LoRA+ and other methods on the user's task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from loraplus.cli.app import app
from loraplus.cli.flag_groups import examples
from loraplus.cli.next_step import after_compare, show_next
from loraplus.cli.options import config_command
from loraplus.cli.terminal import Console, plain_table
from loraplus.study.arms import ALL, REFERENCE, chosen
from loraplus.study.headline import headline
from loraplus.study.wording import counted
from loraplus.tasks.config import CompareConfig
from loraplus.tasks.measures import ACCURACY, LOSS, measures_of

_NAMES = {
    "arms": ", ".join(name for name in ALL if name != REFERENCE),
    "arms_at_ratio": ", ".join(arm.name for arm in ALL.values() if arm.has_ratio and not arm.tunes_ratio),
}


@config_command(
    app,
    "compare",
    CompareConfig,
    check=lambda config, typed: chosen(config.arms),
    names=_NAMES,
    examples=examples(
        "loraplus compare --model MODEL --data reviews.csv --output runs/compared",
        "loraplus compare --model MODEL --data reviews.csv --output runs/all --arms lora,loraplus,auto --tuning-runs 4",
    ),
)
def run(config: CompareConfig, *, overwrite: bool, resume: bool, json: bool, plain: bool) -> None:
    """Compare LoRA with LoRA+ (and others: --arms) on your task: tuned with equal budgets, tested on fresh seeds."""
    from loraplus.cli.console import quiet_libraries
    from loraplus.cli.progress import run_study

    quiet_libraries()
    from loraplus.compare import REPORT_FILE, compare

    console = Console(stderr=json, plain=plain)
    summary = run_study(compare, config, console, overwrite=overwrite, resume=resume, json=json, plain=plain)
    console.widened().print(results_table(summary))
    if line := _beside_accuracy(summary):
        console.say(line)
    console.print(Text(headline(summary), style="bold"))
    console.say(summary["verdict"])
    for arm, row in summary["arms"].items():
        if row["best_at_edge"]:
            console.say(
                f"{ALL[arm].title}'s best rate is the outermost of those tried: a better one may lie beyond; give more "
                "--tuning-runs"
            )
    console.say(f"report: {Path(config.output) / REPORT_FILE}")
    if step := after_compare(config, summary):
        show_next(console, *step)


def results_table(summary: dict[str, Any]) -> Table:
    """One row for each arm, tuned and untuned; arms that set their own rates say that they took no tuning.

    Args:
        summary: As written to summary.json.
    """
    from loraplus.cli.progress import rate

    second = next(measure for measure in measures_of(summary["config"]) if measure != LOSS)
    table = plain_table("arm", "η_A", "η_B", "λ", f"test {second}", "test loss", "s/step", left=1)
    table.columns[0].no_wrap = True
    for group, suffix in (("arms", ""), ("untuned", " untuned")):
        for arm, info in ALL.items():
            row = summary.get(group, {}).get(arm)
            if not row:
                continue
            rates = row.get("best", row)
            lr, lr_ratio = rates["lr"], rates["lr_ratio"]
            if group == "untuned" and lr is None:
                continue
            test = row.get("test") or {}
            table.add_row(
                info.title + (suffix if info.tuned else f"\n{counted(row['tuning_runs'], 'tuning run')}"),
                "–" if lr is None else rate(lr),
                "–" if lr is None else rate(lr * lr_ratio),
                "–" if lr is None else f"{lr_ratio if info.tuned else float(f'{lr_ratio:.2g}'):g}",
                _interval(test.get(second), percent=second == ACCURACY),
                _interval(test.get("loss")),
                _number(row.get("seconds_per_step"), "{:.3g}"),
            )
    return table


def _beside_accuracy(summary: dict[str, Any]) -> str:
    """Macro-F1 of the tuned arms, and the accuracy of the most frequent class; empty where they are not known."""
    arms = {arm: of_arm for arm, of_arm in summary.get("learning", {}).get("arms", {}).items() if of_arm}
    scores = [f"{ALL[arm].title} {of_arm['macro_f1']:.3f}" for arm, of_arm in arms.items() if "macro_f1" in of_arm]
    shares = [of_arm["majority_share"] for of_arm in arms.values() if "majority_share" in of_arm]
    parts = [f"test macro-F1: {', '.join(scores)}"] if scores else []
    parts += [f"always the most frequent class: test accuracy {100 * shares[0]:.1f}%"] if shares else []
    return " · ".join(parts)


def _interval(value: dict[str, float | None] | None, percent: bool = False) -> str:
    value, scale = value or {}, 100 if percent else 1
    pattern, unit = ("{:.1f}", "%") if percent else ("{:.3f}", "")
    mean, low, high = (value.get(key) for key in ("mean", "low", "high"))
    if mean is None:
        return "–"
    shown = pattern.format(mean * scale) + unit
    if low is None or high is None:
        return shown
    return f"{shown} [{pattern.format(low * scale)}, {pattern.format(high * scale)}]"


def _number(value: float | None, pattern: str) -> str:
    return "–" if value is None or value != value else pattern.format(value)
