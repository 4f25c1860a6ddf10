"""`loraplus tune`: finds η_A and λ within a budget."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from loraplus.cli.app import app
from loraplus.cli.flag_groups import examples
from loraplus.cli.next_step import show_next
from loraplus.cli.options import config_command
from loraplus.cli.terminal import Console, plain_table
from loraplus.study.wording import counted
from loraplus.tasks.command_line import command_line
from loraplus.tasks.config import TuneConfig


@config_command(
    app,
    "tune",
    TuneConfig,
    examples=examples(
        "loraplus tune --model MODEL --data reviews.csv --output runs/tuned",
        "loraplus tune --model MODEL --data reviews.csv --output runs/tuned --minutes 30",
    ),
)
def run(config: TuneConfig, *, overwrite: bool, resume: bool, json: bool, plain: bool) -> None:
    """Find η_A and λ for your task within a budget, in one process or in several that share a study."""
    from loraplus.cli.console import quiet_libraries
    from loraplus.cli.progress import rate, run_study

    quiet_libraries()
    from loraplus.report.live import LivePage, study_page
    from loraplus.report.training import REPORT_FILE
    from loraplus.report.tuned import write_search_report
    from loraplus.study.tune import BEST_FILE, settings_of, tune

    console = Console(stderr=json, plain=plain)
    page = partial(LivePage, Path(config.output) / REPORT_FILE, study_page("tune", settings_of(config)))
    result = run_study(tune, config, console, overwrite=overwrite, resume=resume, json=json, plain=plain, beside=page)
    report = write_search_report(config.output)
    best, cost = result["best"], result["cost"]
    console.print(trials_table(result))
    console.say(
        f"best: η_A {rate(best['lr'])} · η_B {rate(best['lr'] * best['lr_ratio'])} (λ = {best['lr_ratio']:g}), "
        f"eval loss {best['eval_loss']:.4f}, for the cost of {counted(cost['full_runs'], 'run')} of full length"
    )
    if best["at_edge"]:
        console.say("this is the lowest or highest rate tried: a better one may lie beyond")
    console.say(f"the same settings as a file: {command_line('train', config=Path(config.output) / BEST_FILE)}")
    console.say(f"report: {report}")
    show_next(console, "train with them", result["train_command"])


def trials_table(result: dict[str, Any]) -> Table:
    """One row for each run, short runs first; the best of every rung is marked.

    Args:
        result: As written to tune.json.
    """
    from loraplus.cli.progress import rate

    table = plain_table("steps", "√(η_A·η_B)", "λ", "η_A", "η_B", "eval loss", "")
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
