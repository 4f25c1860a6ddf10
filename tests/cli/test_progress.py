"""What a study shows while it runs."""

from __future__ import annotations

import io
import time

from loraplus.cli.progress import BarProgress, TrainingWording
from loraplus.cli.terminal import Console
from loraplus.study.records import Trial
from loraplus.study.runner import Event

TRIAL = Trial("untuned", "loraplus", 7.91e-4, 16.0, 1)


def test_a_bar_and_its_time_left_fit_in_eighty_columns(monkeypatch):
    screen = io.StringIO()
    console = Console(file=screen, width=80, height=40, force_terminal=True, color_system=None)
    with BarProgress(console, TrainingWording()) as show:
        show(Event("planned", 0, 16))
        show(Event("started", 0, 16, TRIAL))
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + 300)
        show(Event("step", 0, 16, TRIAL, step=100, total_steps=120))
        show._bars.refresh()
    shown = [line.rstrip() for line in screen.getvalue().splitlines()]
    assert any(line.endswith("left") and "all runs" in line for line in shown)
    assert not any(line.strip() in ("left", "min left") for line in shown)
