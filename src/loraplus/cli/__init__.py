"""The `loraplus` command."""

from loraplus.cli.main import main

__all__ = ["main"]
