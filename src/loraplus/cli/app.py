"""The command that every subcommand registers itself on."""

from __future__ import annotations

import typer

app = typer.Typer(
    name="loraplus",
    help="Fine-tune with LoRA+: low-rank adapters whose two factors learn at the right speeds.",
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _show_help(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())
