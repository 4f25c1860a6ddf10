"""`loraplus tune`: finds η_A and λ within a budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from loraplus.cli.app import app
from loraplus.cli.options import config_command
from loraplus.tasks.config import TuneConfig


@config_command(app, "tune", TuneConfig)
def run(config: TuneConfig, *, overwrite: bool, resume: bool, json: bool, plain: bool) -> None:
    """Find η_A and λ for your task within a budget, in one process or in several that share a study."""
    from loraplus.cli.console import quiet_libraries
    from loraplus.cli.progress import count, rate, study_progress

    quiet_libraries()
    from loraplus.study.tune import BEST_FILE, tune
    from loraplus.tasks.output import json_text

    console = Console(stderr=json, no_color=plain or None)
    with study_progress(console, plain=plain) as progress:
        result = tune(config, overwrite=overwrite, resume=resume, progress=progress)
    if json:
        print(json_text(result))
    best, cost = result["best"], result["cost"]
    console.print(trials_table(result))
    console.print(
        Text(
            f"best: η_A {rate(best['lr'])} · η_B {rate(best['lr'] * best['lr_ratio'])} (λ = {best['lr_ratio']:g}), "
            f"eval loss {best['eval_loss']:.4f}, for the cost of {count(cost['full_runs'])} runs of full length"
        ),
        soft_wrap=True,
    )
    if best["at_edge"]:
        console.print(Text("this is the lowest or highest rate tried: a better one may lie beyond"), soft_wrap=True)
    console.print(Text(result["train_command"]), soft_wrap=True)
    console.print(Text(f"or: loraplus train --config {Path(config.output) / BEST_FILE}"), soft_wrap=True)


def trials_table(result: dict[str, Any]) -> Table:
    """One row for each run, short runs first; the best of every rung is marked.

    Args:
        result: As written to tune.json.
    """
    from loraplus.cli.progress import rate

    table = Table(box=None, pad_edge=False, collapse_padding=True)  # fits 80 columns
    for title in ("steps", "√(η_A·η_B)", "λ", "η_A", "η_B", "eval loss", ""):
        table.add_column(title, justify="right")
    earlier = None
    for row in result["trials"]:
        first_of_rung, earlier = row["steps"] != earlier, row["steps"]
        loss = row["eval_loss"]
        table.add_row(
            str(row["steps"]),
            rate(row["geometric_mean_lr"]),
            f"{row['lr_ratio']:g}",
            rate(row["lr"]),
            rate(row["lr_b"]),
            "diverged" if loss is None else f"{loss:.4f}",
            "←" if first_of_rung and loss is not None else "",
        )
    return table
