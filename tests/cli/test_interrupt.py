"""Ctrl-C at any moment is one line, in a terminal, too; what libraries print is not seen there."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

CHATTER = """
import logging, sys, types, warnings
nn = types.SimpleNamespace()
print("CHATTER on standard output")
print("CHATTER on standard error", file=sys.stderr)
logging.getLogger("bitsandbytes.cextension").warning("CHATTER in a log")
warnings.warn("CHATTER as a warning")
"""


class Terminal:
    """A command in a terminal of 60 columns, and all that it has shown."""

    def __init__(self, *words: object, path: Path | None = None) -> None:
        ours, theirs = pty.openpty()
        paths = os.pathsep.join(filter(None, [str(path) if path else "", *sys.path]))
        environment = {**os.environ, "PYTHONPATH": paths, "COLUMNS": "60", "TERM": "xterm"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "loraplus", *map(str, words)], stdin=theirs, stdout=theirs, stderr=theirs,
            start_new_session=True, env=environment,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # where the tests run in the background
        )  # fmt: skip
        os.close(theirs)
        self._ours, self.shown = ours, ""

    def until(self, text: str = "\0", seconds: float = 60) -> float:
        """Reads until a text is shown, or the command has ended; gives the seconds that it took."""
        begun = time.monotonic()
        while text not in self.shown and time.monotonic() - begun < seconds:
            if select.select([self._ours], [], [], 0.05)[0]:
                try:
                    self.shown += os.read(self._ours, 65536).decode(errors="replace")
                except OSError:  # the other end is closed
                    break
        return time.monotonic() - begun

    def interrupt(self) -> None:
        os.killpg(self.process.pid, signal.SIGINT)


@pytest.fixture
def run_flags(tmp_path, model_folder, reviews_csv):
    return ["--model", model_folder, "--data", reviews_csv, "--output", tmp_path / "out"]


@pytest.mark.parametrize("after", [0.1, 0.7])
def test_ctrl_c_during_imports_is_one_line(run_flags, after, tmp_path):
    terminal = Terminal("train", *run_flags)
    terminal.until("train: ")  # the first line; what is heavy is imported after it
    time.sleep(after)
    terminal.interrupt()
    assert terminal.until() < 20
    assert terminal.process.wait(10) == 130
    said = terminal.shown.split("\r\n")
    assert said[-2:] == ["interrupted", ""] and "Traceback" not in terminal.shown
    assert not (tmp_path / "out").exists()


def test_ctrl_c_while_training_is_acknowledged_at_once_and_ends_in_one_line(run_flags, tmp_path):
    terminal = Terminal("train", *run_flags, "--max-steps", 100000, "--eval-steps", 10)
    terminal.until("step 20/")
    terminal.interrupt()
    assert terminal.until("stopping after this step") < 5
    terminal.until()
    assert terminal.process.wait(30) == 130 and "Traceback" not in terminal.shown
    assert "interrupted after step" in terminal.shown and list((tmp_path / "out").glob("checkpoint-*"))


def test_what_libraries_print_reaches_no_screen(run_flags, tmp_path):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "bitsandbytes.py").write_text(CHATTER)
    terminal = Terminal("train", *run_flags, "--max-steps", 4, "--eval-steps", 2, path=tmp_path / "lib")
    terminal.until(seconds=120)
    assert terminal.process.wait(10) == 0 and "adapter:" in terminal.shown
    assert "CHATTER" not in terminal.shown
    lines = [line for line in terminal.shown.replace("\x1b[2K", "").split("\r\n") if "\x1b" not in line]
    assert all(len(line.split("\r")[-1]) <= 60 for line in lines if "/" not in line)
