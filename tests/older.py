"""What older versions that the ranges of pyproject.toml let in cannot do, with or without loraplus."""

from __future__ import annotations

from importlib.metadata import version

import pytest


def skip_before(package: str, least: str, reason: str) -> None:
    """Skips a test where a package is older than the version that mended something."""
    if tuple(map(int, version(package).split(".")[:3])) < tuple(map(int, least.split("."))):
        pytest.skip(f"{package} before {least} {reason}")


def needs_encoder_decoders() -> None:
    skip_before("peft", "0.21.2", "cannot wrap T5 of these transformers")
