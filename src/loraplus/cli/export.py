"""`loraplus export`"""

from __future__ import annotations

from typing import Annotated

import typer
from rich.text import Text

from loraplus.cli import flags
from loraplus.cli.app import app
from loraplus.cli.flag_groups import examples
from loraplus.cli.terminal import Console, print_json


@app.command(
    "export",
    epilog=examples(
        "loraplus export runs/chats --to trl",
        "loraplus export runs/chats --to axolotl --output axolotl.yml",
    ),
)
def run(
    path: Annotated[str, typer.Argument(metavar="RUN", help="Folder that `loraplus train` wrote.")],
    to: Annotated[str, typer.Option(help="peft-benchmark, axolotl, llamafactory, trl or torchtitan.")],
    output: Annotated[
        str | None, typer.Option(help="File to write (peft-benchmark: folder). Default: the project's own name for it.")
    ] = None,
    json: flags.Json = False,
    plain: flags.Plain = False,
) -> None:
    """Write a run's settings as another project's configuration, and say what that cannot express."""
    from loraplus.export.write import export_run

    written, notes = export_run(path, to, output)
    if json:
        print_json({"to": to, "output": str(written), "not_expressed": notes})
        return
    console = Console(plain=plain)
    for note in notes:
        console.print(Text(note), soft_wrap=True)
    console.say(f"written: {written}")
