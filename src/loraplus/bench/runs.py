"""Trainers that take turns: each runs in a thread of its own, and waits after every so many steps.

What is timed is Trainer's own loop as it is: data, collator, forward, backward, clipping, optimizer, scheduler,
callbacks. Only one of the threads runs at a time.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_PATIENCE = 60.0  # seconds for the step in progress, when a run is ended


class _EndedError(BaseException):
    """Ends `trainer.train()` from within."""


class Run:
    """A trainer that goes on by turns.

    Args:
        trainer: Any of transformers' trainers; its `.train()` is called once.
        steps: Of a turn.

    Example:
        >>> run = Run(trainer, steps=10)  # doctest: +SKIP
        >>> run.turn()  # doctest: +SKIP
        1.234
    """

    def __init__(self, trainer: Trainer, steps: int) -> None:
        self.trainer, self.steps = trainer, steps
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self._ended = False
        self._threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._train, name="loraplus-bench", daemon=True)
        trainer.add_callback(_Gate(self))

    def turn(self) -> float:
        """Runs so many steps.

        Returns:
            The seconds that they took. The first turn starts the trainer, so it is to be thrown away.

        Raises:
            Exception: whatever the trainer raised.
        """
        if self._error is not None:
            raise self._error
        if self._thread.ident is None:
            self._thread.start()
        start = time.perf_counter()
        self._go.release()
        self._done.acquire()
        if self._error is not None:
            raise self._error
        return time.perf_counter() - start

    def end(self) -> None:
        """Ends the run after the step in progress."""
        if self._thread.is_alive():
            self._ended = True
            self._go.release()
            self._thread.join(_PATIENCE)

    def wait(self) -> None:
        """At the end of a turn, in the trainer's thread."""
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        self._done.release()
        self._go.acquire()
        self.check()

    def check(self) -> None:
        """Ends the trainer's thread if the run is to end."""
        if self._ended:
            raise _EndedError

    def _train(self) -> None:
        torch.set_num_threads(self._threads)  # OpenMP keeps it for each thread
        self._go.acquire()
        try:
            self.check()
            self.trainer.train()
            self._error = RuntimeError("the trainer ended before its time")
        except _EndedError:
            pass
        except BaseException as error:  # raised again where the turn was asked for
            self._error = error
        finally:
            self._done.release()


@contextmanager
def ended(run: Run) -> Iterator[Run]:
    """Ends a run when the block is left."""
    try:
        yield run
    finally:
        run.end()


def steps_of(trainer: Any) -> int:
    """Optimizer steps of a pass over a trainer's examples."""
    args = trainer.args
    batches = math.ceil(len(trainer.train_dataset) / args.per_device_train_batch_size)
    return max(1, math.ceil(batches / args.gradient_accumulation_steps))


class _Gate(TrainerCallback):
    def __init__(self, run: Run) -> None:
        self._run = run

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self._run.check()
        if state.global_step % self._run.steps == 0:
            self._run.wait()
