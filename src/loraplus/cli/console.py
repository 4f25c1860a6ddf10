"""Shows one run while it goes on: a bar with the losses, or plain lines."""

from __future__ import annotations

import importlib.util
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loraplus.cli.terminal import Console, narrated, without_chatter
from loraplus.tasks.progress_log import ProgressLog

_SHOWN = ("eval_loss", "eval_accuracy", "eval_macro_f1", "eval_r2", "eval_perplexity")


def quiet_libraries() -> None:
    """Keeps the libraries' notices (fresh heads, download bars, deprecations) out of the command's own output."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")  # read by `datasets` if it is imported
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity(logging.CRITICAL)  # what it logs as an error it raises, too
    transformers_logging.disable_progress_bar()
    logging.getLogger("httpx").setLevel(logging.WARNING)
    # Where DeepSpeed is installed, PEFT imports it, and it writes its notices to standard output, into our JSON.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\.")
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    if logging.lastResort:  # of libraries that set up no log of their own
        logging.lastResort.setLevel(logging.ERROR)
    for name in ("bitsandbytes", "accelerate", "peft", "trl"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if importlib.util.find_spec("bitsandbytes") is not None:  # PEFT imports it, and it tells what it finds
        with without_chatter(), suppress(Exception):
            importlib.import_module("bitsandbytes")


def is_moving(console: Console, plain: bool) -> bool:
    """Whether bars that redraw themselves make sense here."""
    return console.is_terminal and not plain


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(), console=console, transient=True, redirect_stdout=False, redirect_stderr=False,
    )  # fmt: skip


@contextmanager
def counting_bar(console: Console, title: str, total: int, *, plain: bool) -> Iterator[Callable[[int], None]]:
    """Yields a function that moves a bar by a count. Where no bar is shown it prints a line now and then."""
    if not is_moving(console, plain):
        with narrated(console):
            yield ProgressLog(title, total).advance
        return
    with _bar(console) as progress:
        task = progress.add_task(title, total=total)
        yield lambda count: progress.advance(task, count)


class TrainingProgress(TrainerCallback):
    """A line for every evaluation, and below them a bar with the time left; a plain terminal gets the lines alone."""

    def __init__(self, console: Console, *, plain: bool) -> None:
        self._console = console
        self._progress = _bar(console) if is_moving(console, plain) else None
        self._task: Any = None
        self._train_loss: float | None = None
        self._started = self._first_step = 0.0

    def __enter__(self) -> TrainingProgress:
        if self._progress:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress:
            self._progress.stop()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        self._started, self._first_step = time.monotonic(), state.global_step
        if self._progress:
            self._task = self._progress.add_task("training", total=state.max_steps, completed=state.global_step)
        elif state.global_step:
            self._console.print(f"going on at step {state.global_step} of {state.max_steps}")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if self._progress:
            self._progress.update(self._task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: object,
    ) -> None:
        logs = logs or {}
        if "loss" in logs:
            self._train_loss = logs["loss"]
        if "eval_loss" not in logs or (state.global_step >= state.max_steps and self._train_loss is None):
            return
        parts = [f"step {state.global_step}/{state.max_steps}"]
        if self._train_loss is not None:
            parts.append(f"loss {self._train_loss:.4f}")
        parts += [f"{name} {logs[name]:.4f}" for name in _SHOWN if name in logs]
        done = state.global_step - self._first_step
        if not self._progress and done > 0 and state.global_step < state.max_steps:
            left = (time.monotonic() - self._started) / done * (state.max_steps - state.global_step)
            parts.append(f"about {max(1, round(left / 60))} min left" if left > 60 else f"about {left:.0f} s left")
        self._console.say(" · ".join(parts))
        self._train_loss = None
