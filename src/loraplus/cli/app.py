"""The command that every subcommand registers itself on."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(
    name="loraplus",
    help="Fine-tune with LoRA+: low-rank adapters whose two factors learn at the right speeds.",
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        import loraplus

        print(f"loraplus {loraplus.__version__}")
        raise typer.Exit


_Version = Annotated[
    bool, typer.Option("--version", help="Print the version and stop.", is_eager=True, callback=_show_version)
]


@app.callback()
def _show_help(context: typer.Context, version: _Version = False) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())
