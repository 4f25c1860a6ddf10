"""`loraplus bench`: speed and memory side by side with PEFT and Trainer, on this machine."""

from __future__ import annotations

import logging
from typing import Any

from rich.table import Table

from loraplus.bench.tables import HEADS, about, arm_cells, bars, findings, machine_line
from loraplus.cli.app import app
from loraplus.cli.flag_groups import examples
from loraplus.cli.options import config_command
from loraplus.cli.terminal import Console, narrated, plain_table, print_json
from loraplus.tasks.config import BenchConfig

_WIDTH_OF_FILES = 140  # of the arms' names and figures


@config_command(
    app,
    "bench",
    BenchConfig,
    required=(),
    own=("overwrite", "json", "plain"),
    examples=examples(
        "loraplus bench",
        "loraplus bench --model MODEL --data reviews.csv --output bench.json --minutes 10",
    ),
)
def run(config: BenchConfig, *, overwrite: bool, json: bool, plain: bool) -> None:
    """Compare speed and memory with PEFT and Trainer on this machine, for your model and data or built-in ones."""
    console = Console(stderr=json, plain=plain)
    if config.table:
        _show_table(config.table)
        return
    from loraplus.bench.asked import rows_of
    from loraplus.files.single import check_file, write_json

    rows_of(config)
    output = check_file(config.output, (".json",), overwrite=overwrite) if config.output else None
    console.say("compares speed and memory with PEFT and Trainer; the libraries are being loaded")
    from loraplus.bench.plan import bench
    from loraplus.cli.console import quiet_libraries

    quiet_libraries()
    logging.getLogger("trl").setLevel(logging.ERROR)  # advises against what is tried here on purpose
    with narrated(console):
        result = bench(config, console.say)
    if output:
        write_json(output, result)
    if json:
        print_json(result)
    show(console, result)


def show(console: Console, result: dict[str, Any]) -> None:
    """Tables, bars and what they say."""
    console.widened(_WIDTH_OF_FILES)
    console.say(machine_line(result))
    for row in result["rows"]:
        console.say(f"\n{about(row)}")
        console.print(_table(HEADS, arm_cells(row)))
        console.print(_table(("", "", f"{row['unit']} a second"), bars(row), bar_style="green"))
        for finding in findings(row):
            console.say(finding)
        for name, arm in row["arms"].items():
            if "profile" in arm:
                console.say(f"\n{name}, one step")
                lines = [(line["name"], f"{line['ms']:.2f}", str(line["calls"])) for line in arm["profile"]]
                console.print(_table(("", "ms", "calls"), lines))


def _table(heads: tuple[str, ...], rows: Any, bar_style: str = "") -> Table:
    """Rows under their heads; the second column holds bars if there is a style for them."""
    table = plain_table(*heads, left=2 if bar_style else 1)
    table.columns[1].style = bar_style
    for cells in rows:
        table.add_row(*cells)
    return table


def _show_table(path: str) -> None:
    """Prints a file of results as Markdown."""
    from loraplus.bench.asked import saved
    from loraplus.bench.tables import markdown

    Console().copyable(markdown(saved(path)))
