"""What to run (`Trial`) and what came back (`Record`): the two shapes that every part of a study shares."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from loraplus.study.arms import ALL

Phase = Literal["tuning", "final", "untuned"]
ARMS = ("lora", "loraplus")
"""The arms of the main result and of the untuned picture; all that there are: `arms.ALL`."""


@dataclass(frozen=True)
class Trial:
    """One training run of a study: the rates, the seed, why it is run, and its length if it is not the full one."""

    phase: Phase
    arm: str
    lr: float
    lr_ratio: float
    seed: int
    steps: int | None = None

    @property
    def geometric_mean_lr(self) -> float:
        """√(η_A·η_B), the one number that λ = 1 and λ > 1 runs can be compared by."""
        return self.lr * math.sqrt(self.lr_ratio)

    @property
    def key(self) -> str:
        """Identity of the run within a study; two trials of one key are the same run."""
        length = "" if self.steps is None else f"/{self.steps}"
        return f"{self.phase}/{self.arm}/{self.lr:.6g}/{self.lr_ratio:.6g}/{self.seed}{length}"


@dataclass(frozen=True)
class CurvePoint:
    """One evaluation on the validation split during training; a language model has no accuracy."""

    step: int
    eval_loss: float
    eval_accuracy: float | None = None


@dataclass(frozen=True)
class Record:
    """The outcome of one trial. A diverged run has eval_loss = inf and no test results.

    `test_losses` and `test_correct` hold one entry per test example, in the order of the test split;
    they are filled for the phases final and untuned only: tuning never sees the test split. Records of a language model
    have no accuracy and no `test_correct`; their test losses are such that the mean over examples is that over tokens.
    """

    trial: Trial
    status: Literal["done", "diverged"]
    steps: int
    eval_loss: float
    eval_accuracy: float | None
    seconds_per_step: float
    curve: tuple[CurvePoint, ...] = ()
    test_losses: tuple[float, ...] = field(default=(), repr=False)
    test_correct: tuple[bool, ...] = field(default=(), repr=False)
    seconds: float = 0.0
    """Wall-clock time of the run, with its evaluations."""
    found: tuple[float, float] | None = None
    """(η_A, η_B) that a method which sets its own rates arrived at, without the schedule."""

    @property
    def lr(self) -> float | None:
        """η_A of the run; None if the method set it and it is not known."""
        if ALL[self.trial.arm].tuned:
            return self.trial.lr
        return self.found[0] if self.found else None

    @property
    def lr_b(self) -> float | None:
        """η_B of the run, likewise."""
        if ALL[self.trial.arm].tuned:
            return self.trial.lr * self.trial.lr_ratio
        return self.found[1] if self.found else None

    @property
    def lr_ratio(self) -> float | None:
        """λ of the run, likewise."""
        if ALL[self.trial.arm].tuned:
            return self.trial.lr_ratio
        return self.found[1] / self.found[0] if self.found and self.found[0] else None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; a non-finite loss becomes null."""
        data = asdict(self)
        if not math.isfinite(self.eval_loss):
            data["eval_loss"] = None
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Record:
        """Inverse of `to_dict`.

        Raises:
            ValueError: of an arm or a status that there is none of.
        """
        trial = Trial(**data["trial"])
        if trial.arm not in ALL:
            raise ValueError(f"of an arm that there is not: {trial.arm!r}")
        if data["status"] not in ("done", "diverged"):
            raise ValueError(f"of a status that there is not: {data['status']!r}")
        return cls(
            trial=trial,
            status=data["status"],
            steps=data["steps"],
            eval_loss=math.inf if data["eval_loss"] is None else data["eval_loss"],
            eval_accuracy=data["eval_accuracy"],
            seconds_per_step=data["seconds_per_step"],
            curve=tuple(CurvePoint(**point) for point in data["curve"]),
            test_losses=tuple(data["test_losses"]),
            test_correct=tuple(data["test_correct"]),
            seconds=data.get("seconds", 0.0),
            found=tuple(data["found"]) if data.get("found") else None,
        )
