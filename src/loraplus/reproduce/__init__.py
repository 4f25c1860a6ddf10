"""The paper's experiments by name: `loraplus reproduce`."""

from loraplus.reproduce.command import reproduce

__all__ = ["reproduce"]
