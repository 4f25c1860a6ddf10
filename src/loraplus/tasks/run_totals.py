"""Loss and time of a run over all of its parts, however often it was interrupted."""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from loraplus.tasks.training import StepClock


class RunTotals(TrainerCallback, ExportableState):
    """Adds up training loss and time; each checkpoint holds what they were there.

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

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        saved = state.stateful_callbacks.get(type(self).__name__)
        before = saved.get("attributes", {}) if isinstance(saved, dict) else {}
        self._loss_before, self._seconds_before = before.get("loss", 0.0), before.get("seconds", 0.0)
        self._clock.seconds += before.get("step_seconds", 0.0)
        self._clock.steps += before.get("steps", 0)
        self._started = time.perf_counter()
        state.stateful_callbacks[type(self).__name__] = self.state()  # checkpoints of earlier versions lack it

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
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
