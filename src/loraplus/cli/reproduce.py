"""`loraplus reproduce`: the paper's experiments by name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from loraplus.cli import flags
from loraplus.cli.app import app
from loraplus.cli.flag_groups import examples
from loraplus.cli.next_step import after_reproduce, show_next
from loraplus.cli.terminal import Console, plain_table, print_json
from loraplus.errors import InputError

DEFAULT_OUTPUT = "runs/reproduce"


@app.command(
    "reproduce",
    epilog=examples(
        "loraplus reproduce --list",
        "loraplus reproduce toy --output runs/toy",
    ),
)
def run(
    name: Annotated[str, typer.Argument(help="Name of the experiment; --list tells them all.")] = "",
    list_all: Annotated[bool, typer.Option("--list", help="List the experiments and what each tests.")] = False,
    output: Annotated[str | None, typer.Option(help=f"Folder to write to.  [default: {DEFAULT_OUTPUT}/NAME]")] = None,
    scale: Annotated[str, typer.Option(help="cpu (small, two cores) or paper (as published).")] = "cpu",
    seeds: Annotated[int, typer.Option(help="Seeds of every point.")] = 3,
    workers: Annotated[
        int | None, typer.Option(help="Runs side by side. Default: one a core up to 2 on a CPU, one on a GPU.")
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(
            help="Journal file or URL (postgresql://…). Processes with the same --storage and the same settings, each "
            "with an --output of its own, share the runs. Default: a journal in --output."
        ),
    ] = None,
    data: Annotated[str, typer.Option(help="Folder for data and models; what is missing is obtained.")] = "data",
    redraw: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Train nothing: figures, plots and page from the runs.csv in FOLDER."),
    ] = None,
    overwrite: flags.Overwrite = False,
    resume: flags.Resume = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be run, and write nothing.")] = False,
    json: flags.Json = False,
    plain: flags.Plain = False,
) -> None:
    """Reproduce an experiment of the LoRA+ paper: data, plots and a page; resumable, in several processes if wanted."""
    from loraplus.reproduce.registry import EXPERIMENTS, check_name, described

    console = Console(stderr=json, plain=plain)
    if list_all:
        _list(console, json)
        return
    if not name:
        raise InputError(f"which experiment? loraplus reproduce NAME, one of {', '.join(EXPERIMENTS)}")
    check_name(name)
    if redraw is not None and resume:
        raise InputError("--redraw trains nothing, so there is nothing to --resume")

    from loraplus.cli.console import quiet_libraries

    quiet_libraries()
    from loraplus.reproduce.command import Options
    from loraplus.reproduce.command import dry_run as planned
    from loraplus.reproduce.command import redraw as drawn_again

    options = Options(
        name=name, output=output or f"{DEFAULT_OUTPUT}/{name}", scale=scale, seeds=seeds, data=data, storage=storage,
        workers=workers,
    )  # fmt: skip
    if dry_run:
        plan = planned(options)
        if json:
            print_json(plan)
        else:
            _show_plan(console, plan)
        return
    if redraw is not None:
        summary = drawn_again(options, redraw, overwrite=overwrite)
    else:
        summary = _run(console, options, overwrite=overwrite, resume=resume, plain=plain)
    if json:
        print_json(summary)
    for sentence in summary["verdict"]:
        console.say(sentence)
    console.say(f"page: {Path(options.output) / 'index.html'}")
    if step := after_reproduce(name, scale, described(name).scales):
        show_next(console, *step)


def _run(console: Console, options: Any, *, overwrite: bool, resume: bool, plain: bool) -> dict[str, Any]:
    from loraplus.cli.progress import study_progress
    from loraplus.reproduce.command import reproduce

    wording = _ExperimentWording(options.experiment)
    with study_progress(console, wording, plain=plain) as progress:
        return reproduce(options, overwrite=overwrite, resume=resume, progress=progress, say=console.say)


class _ExperimentWording:
    """How the progress display calls a run and its result."""

    def __init__(self, experiment: Any) -> None:
        self._experiment = experiment

    def describe(self, trial: Any) -> str:
        return self._experiment.describe(trial)

    def outcome(self, record: Any) -> str:
        if record.status == "diverged":
            return "diverged"
        main = self._experiment.main(record)
        return f"{main[0].replace('_', ' ')} {main[1]:.4g}" if main else f"done in {record.seconds:.1f} s"


def _list(console: Console, json: bool) -> None:
    from loraplus.reproduce.registry import EXPERIMENTS, described

    experiments = [(name, described(name)) for name in EXPERIMENTS]
    if json:
        rows = [
            {"name": name, "title": one.title, "scales": list(one.scales), "claims": list(one.claims)}
            for name, one in experiments
        ]
        print_json(rows)
        return
    table = plain_table("name", "scales", "what it shows", left=3)
    for name, one in experiments:
        table.add_row(name, ", ".join(one.scales), f"{one.title}: {' '.join(one.claims)}")
    console.print(table)


def _show_plan(console: Console, plan: dict[str, Any]) -> None:
    lines = [f"{plan['experiment']}: {plan['title']}", *(f"  {claim}" for claim in plan["claims"])]
    lines += [f"runs known so far: {plan['runs_known']}"]
    lines += [f"  {run}" for run in plan["first_runs"]]
    if plan["runs_known"] > len(plan["first_runs"]):
        lines += ["  …"]
    lines += ["settings:", *(f"  {key}: {value}" for key, value in plan["settings"].items())]
    lines += ["needs:", *(f"  {need}" for need in plan["needs"])] if plan["needs"] else []
    lines += [f"would write to {plan['output']}"]
    for line in lines:
        console.say(line)
