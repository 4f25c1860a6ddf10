"""The `loraplus` command."""

from loraplus.cli.app import main

__all__ = ["main"]
