"""The process that trains: it is started once, keeps what it has loaded, and does one run after another."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing import connection, parent_process
from typing import Any, NamedTuple, Protocol

from loraplus.study.records import Keyed

SECONDS_BETWEEN_MESSAGES = 0.1


class OnStep(Protocol):
    """What a run calls after every optimizer step."""

    def __call__(self, step: int, total_steps: int, eval_loss: float | None = None) -> None: ...


RunTrial = Callable[[Any, OnStep], Any]
"""Does one run (`Keyed`) and gives back its `Record`."""


class Message(NamedTuple):
    """How far a run is; small enough to be written to the pipe in one piece."""

    key: str
    step: int
    total_steps: int
    eval_loss: float | None


class _Worker(NamedTuple):
    run: RunTrial
    messages: Any  # a multiprocessing queue


_worker: list[_Worker] = []


def set_up(run: RunTrial, messages: object, threads: int, log: str | None, scratch: str) -> None:
    """Prepares the process: the parent alone decides when it stops, and it shares the cores with its siblings.

    Args:
        run: Does one trial.
        messages: Queue to the parent.
        threads: Threads that torch may use.
        log: File that takes what the libraries print, which would otherwise run into the parent's display.
        scratch: Folder for temporary files, which the parent removes even if this process is ended in the middle.
    """
    tempfile.tempdir = scratch
    if log is not None:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.close(file)
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(scratch,), daemon=True).start()
    torch.set_num_threads(threads)
    _worker[:] = [_Worker(run, messages)]


def perform(trial: Keyed) -> Any:
    """Does one run and tells the parent how far it is."""
    (worker,) = _worker
    last = 0.0

    def on_step(step: int, total_steps: int, eval_loss: float | None = None) -> None:
        nonlocal last
        now = time.monotonic()
        if eval_loss is not None or step == total_steps or now - last >= SECONDS_BETWEEN_MESSAGES:
            last = now
            worker.messages.put(Message(trial.key, step, total_steps, eval_loss))

    return worker.run(trial, on_step)


def _end_with_parent(scratch: str) -> None:
    """Ends this process when its parent ends; else it would go on training, and its temporary files would stay."""
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        shutil.rmtree(scratch, ignore_errors=True)
        os._exit(1)
