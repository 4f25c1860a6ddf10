"""Collects the subcommands, and turns every expected error into one line and exit code 2."""

from __future__ import annotations

import sys

import typer

from loraplus.errors import InterruptedRun, LoraPlusError

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


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line. Exit codes: 0 done, 2 the user's mistake, 130 interrupted."""
    from loraplus.cli import compare, predict, train  # noqa: F401  (each registers its command on `app`)

    try:
        code = app(args=arguments, standalone_mode=False)
    except InterruptedRun as stop:
        print(stop, file=sys.stderr)
        sys.exit(130)
    except LoraPlusError as error:
        print(f"loraplus: {error}", file=sys.stderr)
        sys.exit(2)
    except typer.TyperException as error:  # a flag that does not exist, a value of the wrong type, …
        message = getattr(error, "format_message", error.__str__)()
        print(f"loraplus: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(code if isinstance(code, int) else 0)
