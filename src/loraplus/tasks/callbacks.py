"""What watches a run: it ends on a signal or when it diverges, and its time and loss are added up."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from loraplus.errors import DivergedError
from loraplus.notices import acknowledge
from loraplus.rates import Rates
from loraplus.steps.wrappers import unwrapped
from loraplus.tasks.data_parallel import any_process


class StopOnSignal(TrainerCallback):
    """After a signal, saves the run at the end of the step in progress and ends it."""

    def __init__(self) -> None:
        self.stopped = threading.Event()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> Any:
        # A launcher's signal reaches its processes at different steps; all stop at the same one.
        if any_process(self.stopped.is_set(), args) and state.global_step < state.max_steps:
            self.stopped.set()
            control.should_log = True  # before it saves, so that a loss that is NaN is seen
            control.should_save = True
            control.should_training_stop = True
        return control

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handles SIGINT and SIGTERM while the run lasts; a second one ends the process at once."""
        signals = (signal.SIGINT, signal.SIGTERM)
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        earlier = {number: signal.getsignal(number) for number in signals}

        def handle(number: int, _: object) -> None:
            self.stopped.set()
            acknowledge("stopping after this step, whose checkpoint is saved; once more ends at once")
            signal.signal(number, earlier[signal.Signals(number)])

        for number in signals:
            signal.signal(number, handle)
        try:
            yield
        finally:
            for number in signals:
                signal.signal(number, earlier[number])


class DivergenceGuard(TrainerCallback):
    """Stops a run whose loss, gradients or weights are no longer numbers, before the broken weights are saved.

    On a CPU the gradients of every step are checked before the optimizer takes them. On other devices each step would
    have to wait for that, so logged losses and the weights of checkpoints are checked instead. Put it behind every
    callback that asks for a checkpoint.
    """

    def __init__(self, rates: Rates) -> None:
        self.rates = rates

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **more: object
    ) -> None:
        if args.device.type == "cpu":
            learnt = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
            self._check_tensors("gradient", learnt, state.global_step + 1, more.get("optimizer"))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **more: object
    ) -> None:
        if control.should_save:
            self._check_weights(model, state.global_step, more.get("optimizer"))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        model: Any = None,
        **more: object,
    ) -> None:
        for name, what in (("loss", "training loss"), ("eval_loss", "validation loss")):
            value = (logs or {}).get(name)
            if value is not None and not math.isfinite(value):
                self._check_weights(model, state.global_step, more.get("optimizer"))
                self._stop(f"the {what} became {value}", state.global_step, more.get("optimizer"))

    def _check_weights(self, model: nn.Module, step: int, optimizer: Any) -> None:
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._check_tensors("weight", trained, step, optimizer)

    def _check_tensors(self, what: str, named: Sequence[tuple[str, torch.Tensor]], step: int, optimizer: Any) -> None:
        """Stops if a number in one of these tensors (…) is not finite. One sum over all tells whether to look."""
        if not named or torch.stack([tensor.detach().float().sum() for _, tensor in named]).sum().isfinite():
            return
        for name, tensor in named:
            if not tensor.isfinite().all():
                value = tensor.detach()[~tensor.isfinite()].flatten()[0].item()
                self._stop(f"the {what} of {name} became {value}", step, optimizer)

    def _stop(self, what: str, step: int, optimizer: Any) -> None:
        auto = getattr(unwrapped(optimizer), "loraplus_auto", None)
        a, b = (auto.lr_a, auto.lr_b) if auto else (self.rates.lr_a, self.rates.lr_a * self.rates.lr_ratio)
        advice = (
            "give --lr and --lr-ratio as numbers, or a smaller --lr-head"
            if auto
            else "take a smaller --lr or --lr-ratio"
        )
        raise DivergedError(f"{what} at step {step} with η_A = {a:g}, η_B = {b:g}; {advice}")


class StepClock(TrainerCallback):
    """Adds up the time inside optimizer steps, without evaluation, and tells a listener of every step."""

    def __init__(self, on_step: Callable[[int, int], None] | None = None) -> None:
        self.seconds = 0.0
        self.steps = 0
        self._started: float | None = None
        self._on_step = on_step

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if self._started is not None:
            self.seconds += time.perf_counter() - self._started
            self.steps += 1
        if self._on_step:
            self._on_step(state.global_step, state.max_steps)

    @property
    def seconds_per_step(self) -> float:
        """Mean time of a step; 0 if none ran."""
        return self.seconds / self.steps if self.steps else 0.0


class RunTotals(TrainerCallback, ExportableState):
    """Adds up training loss and time. Each checkpoint holds the sums up to its step.

    Set `trainer` before training: Trainer keeps the loss to itself.

    Args:
        clock: goes on from what it showed there.
    """

    def __init__(self, clock: StepClock) -> None:
        self.trainer: Any = None
        self._clock = clock
        self._loss_before = self._seconds_before = 0.0
        self._started: float | None = None
        self._ended: float | None = None

    def on_train_begin(self, args: TrainingArguments, state: Any, control: TrainerControl, **_: object) -> None:
        saved = state.stateful_callbacks.get(type(self).__name__)
        before = saved.get("attributes", {}) if isinstance(saved, dict) else {}
        self._loss_before, self._seconds_before = before.get("loss", 0.0), before.get("seconds", 0.0)
        self._clock.seconds += before.get("step_seconds", 0.0)
        self._clock.steps += before.get("steps", 0)
        self._started = time.perf_counter()
        state.stateful_callbacks[type(self).__name__] = self.state()  # checkpoints of earlier versions lack it

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self._ended = time.perf_counter()

    def state(self) -> dict[str, Any]:
        steps = {"steps": self._clock.steps, "step_seconds": self._clock.seconds}
        return {"args": {}, "attributes": {"loss": self.loss, "seconds": self.seconds, **steps}}

    @property
    def loss(self) -> float:
        """Sum over the steps."""
        if self._started is None:
            return self._loss_before
        pending = float(self.trainer._tr_loss) if self.trainer.is_in_train else 0.0  # added when training ends
        return self._loss_before + self.trainer._total_loss_scalar + pending

    @property
    def seconds(self) -> float:
        """From the start of training to its end, with evaluation."""
        if self._started is None:
            return self._seconds_before
        return self._seconds_before + (self._ended or time.perf_counter()) - self._started
