"""Stand-ins for training, importable by worker processes. Each execution is noted as a line in a file."""

from __future__ import annotations

import math
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

from loraplus.errors import InputError
from loraplus.study.records import CurvePoint, Record, Trial

STEPS = 4


def note(folder: str, name: str, line: str) -> None:
    with open(Path(folder) / name, "a") as file:
        file.write(line + "\n")


def noted(folder: Path, name: str = "runs") -> list[str]:
    path = folder / name
    return path.read_text().splitlines() if path.exists() else []


def quick(folder: str, trial: Trial, on_step) -> Record:
    """A loss that is lowest at √(η_A·η_B) = 3e-3 and diverges above 0.02."""
    note(folder, "runs", trial.key)
    for step in range(1, STEPS + 1):
        on_step(step, STEPS, eval_loss=1.0 / step)
    rate = trial.geometric_mean_lr
    if rate > 0.02:
        return Record(trial, "diverged", 2, math.inf, 0.0, 0.01)
    loss = 0.3 + math.log10(rate / 3e-3) ** 2
    tested = trial.phase != "tuning"
    return Record(
        trial, "done", STEPS, loss, 1 - loss / 4, 0.01,
        curve=tuple(CurvePoint(step, 1.0 / step, 0.5) for step in range(1, STEPS + 1)),
        test_losses=(loss, loss) if tested else (), test_correct=(True, False) if tested else (),
    )  # fmt: skip


def overlapping(folder: str, trial: Trial, on_step) -> Record:
    """Notes when it starts and ends; the first one ends when another process has started one, too."""
    note(folder, "spans", f"{trial.arm} {os.getpid()} {trial.phase} start")
    late = time.monotonic() + 60
    while len({line.split()[1] for line in noted(Path(folder), "spans")}) < 2 and time.monotonic() < late:
        time.sleep(0.02)
    note(folder, "spans", f"{trial.arm} {os.getpid()} {trial.phase} end")
    return quick(folder, trial, on_step)


def briefly(folder: str, trial: Trial, on_step) -> Record:
    """Takes long enough for two processes to share the runs, and notes who did what."""
    note(folder, "shares", f"{os.getppid()} {trial.key}")
    time.sleep(0.3)
    return quick(folder, trial, on_step)


def waits(folder: str, trial: Trial, on_step) -> Record:
    """In the run that was noted first, waits until its study's process may go on; each process has its own losses."""
    process = os.getppid()
    note(folder, "waiting", f"{process} {trial.key}")
    first = noted(Path(folder), "waiting")[0].split()[1]
    while trial.key == first and not (Path(folder) / f"go-{process}").exists():
        time.sleep(0.02)
    record = quick(folder, trial, on_step)
    return replace(record, eval_loss=record.eval_loss + process % 1000 * 1e-6)


def hangs(folder: str, trial: Trial, on_step) -> Record:
    note(folder, "hangs", str(os.getpid()))
    on_step(1, STEPS, eval_loss=1.0)
    time.sleep(600)
    return quick(folder, trial, on_step)


def killed_in_final(folder: str, trial: Trial, on_step) -> Record:
    if trial.phase == "final":
        os.kill(os.getpid(), signal.SIGKILL)
    return quick(folder, trial, on_step)


def hangs_in_final(folder: str, trial: Trial, on_step) -> Record:
    if trial.phase == "final":
        note(folder, "hangs", str(os.getpid()))
        time.sleep(600)
    return quick(folder, trial, on_step)


def wrong_input(folder: str, trial: Trial, on_step) -> Record:
    raise InputError("the label column is empty")


def talks(folder: str, trial: Trial, on_step) -> Record:
    print(f"hello from {trial.phase}", flush=True)
    return quick(folder, trial, on_step)
