"""Runs the command line, in this process or as one of its own, and gives back what a user would see."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from tasks.causal import adapter_on, save_llama

from loraplus.cli import main


class Outcome(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def last_line(self) -> str:
        return self.err.strip().splitlines()[-1] if self.err.strip() else ""


@pytest.fixture(scope="session")
def run() -> Callable[..., subprocess.CompletedProcess[str]]:
    """The command in a process of its own, to its end."""

    def call(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "loraplus", *map(str, arguments)], capture_output=True, text=True)

    return call


@pytest.fixture
def loraplus_command(capsys):
    def call(*arguments: object) -> Outcome:
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(int(stop.value.code or 0), captured.out, captured.err)

    return call


@pytest.fixture
def refused(loraplus_command):
    """Asserts exit code 2 and exactly one line of error, and returns that line."""

    def call(*arguments: object) -> str:
        outcome = loraplus_command(*arguments)
        assert outcome.code == 2, outcome
        assert "Traceback" not in outcome.err + outcome.out
        assert len(outcome.err.strip().splitlines()) == 1, outcome.err
        assert outcome.err.startswith("loraplus: ")
        return outcome.err

    return call


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama, as a model folder."""
    return save_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter on it, as PEFT writes one."""
    return adapter_on(base, tmp_path_factory.mktemp("adapter"), target_modules=["q_proj"])
