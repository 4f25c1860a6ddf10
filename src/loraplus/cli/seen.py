"""Shows what was seen of a run's data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from loraplus.cli.next_step import after_check, show_next
from loraplus.cli.terminal import Console, narrated, print_json
from loraplus.tasks.config import TaskConfig

if TYPE_CHECKING:
    from loraplus.tasks.seen import Seen


def show(console: Console, seen: Seen) -> None:
    """Prints a row for each thing that was seen; doubts are logged separately."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in seen.rows.items():
        table.add_row(name, text)
    console.widened().print(table)


def run_check(command: str, config: TaskConfig, *, json: bool, plain: bool) -> None:
    """All of --check: what was seen, what is doubtful, how long a run takes, and the command without it."""
    from loraplus.cli.console import quiet_libraries

    quiet_libraries()
    from loraplus.tasks.look import look

    console = Console(stderr=json, plain=plain)
    with narrated(console):
        seen = look(config)
        if json:
            print_json(seen.to_dict())
        show(console, seen)
        seen.tell()
    many = len(seen.doubts)
    console.say(f"checked, {'nothing stands in the way' if not many else f'with {many} doubt' + 's' * (many > 1)}")
    if not json:
        show_next(console, *after_check(command, config))
