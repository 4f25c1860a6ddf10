"""Runs the command line, and turns every expected error into one line and exit code 2."""

from __future__ import annotations

import sys

import typer

from loraplus.cli import compare, predict, train, tune  # noqa: F401  (each registers its command on `app`)
from loraplus.cli.app import app
from loraplus.errors import InterruptedRun, LoraPlusError


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line. Exit codes: 0 done, 2 the user's mistake, 130 interrupted."""
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
