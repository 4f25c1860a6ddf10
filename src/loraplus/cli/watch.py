"""`loraplus watch`: the reports of a folder in the browser, while a study runs and afterwards."""

from __future__ import annotations

from typing import Annotated

import typer

from loraplus.cli.app import app
from loraplus.cli.flag_groups import examples
from loraplus.cli.terminal import Console, tell

DEFAULT_PORT = 8017


@app.command(
    "watch",
    epilog=examples(
        "loraplus watch runs/compared",
        "loraplus watch runs --port 8080",
    ),
)
def run(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Output folder of a command, or a folder of such.")],
    port: Annotated[int, typer.Option(help="Port of this machine to listen on; 0 takes a free one.")] = DEFAULT_PORT,
) -> None:
    """Show the reports in a folder in the browser, refreshed while a study runs; to this machine alone."""
    from loraplus.report.serve import ADDRESS, server

    with server(folder, port) as serving:
        Console().copyable(f"watching {folder}: http://{ADDRESS}:{serving.server_address[1]}/ (Ctrl-C ends it)")
        try:
            serving.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            tell("watching has ended")
