"""Flags that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

from loraplus.cli.flag_groups import OF_COMMAND

AdapterFolder = Annotated[str, typer.Option(help="Folder that PEFT or `loraplus train` wrote.")]
TrainedAdapter = Annotated[str, typer.Option(help="Folder that `loraplus train` wrote.")]
BaseModel = Annotated[str | None, typer.Option(help="Base model, if it is no longer where it was.")]
TextColumn = Annotated[str | None, typer.Option(help="Column with the text. Default: that of training, else guessed.")]
Encoding = Annotated[str | None, typer.Option(help="Encoding of a text file, such as cp1252; guessed if not given.")]
BatchSize = Annotated[int, typer.Option(help="Texts at once.", min=1)]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that the model brings.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace what an earlier run left in --output.", rich_help_panel=OF_COMMAND)
]
Resume = Annotated[
    bool,
    typer.Option("--resume", help="Go on where an interrupted run in --output stopped.", rich_help_panel=OF_COMMAND),
]
Check = Annotated[
    bool,
    typer.Option(
        "--check",
        help="Say what is seen of the data and how long a run takes, and stop there.",
        rich_help_panel=OF_COMMAND,
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON on standard output.", rich_help_panel=OF_COMMAND)
]
Plain = Annotated[
    bool, typer.Option("--plain", help="No colours, no moving progress bars.", rich_help_panel=OF_COMMAND)
]
