"""How a study's runs are written into an Optuna storage and read back: what the store must know of them.

`Training` is that of training runs (`Trial`, `Record`). Whatever has a key and an outcome can be kept the same way.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, TypeVar

from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.trial import FrozenTrial

from loraplus.study.records import Record, Trial

# What a trial has as attributes, whatever its format.
RECORD = "record"
KEY = "key"
BEAT = "beat"
_DIGEST = "sha256"


class Keyed(Protocol):
    """Something to run; two of one key are the same run."""

    @property
    def key(self) -> str:
        """Identity within a study."""
        ...


TrialT = TypeVar("TrialT", bound=Keyed)
TrialT_co = TypeVar("TrialT_co", bound=Keyed, covariant=True)


class Outcome(Protocol[TrialT_co]):
    """What came back of a run."""

    @property
    def trial(self) -> TrialT_co:
        """What was run."""
        ...


RecordT = TypeVar("RecordT", bound=Outcome[Any])


class Format(Protocol[TrialT, RecordT]):
    """Translates what to run and what came back into an Optuna trial, and back."""

    def params(self, trial: TrialT) -> Mapping[str, float]:
        """The numbers that Optuna shows as the trial's parameters."""
        ...

    def distributions(self, trial: TrialT) -> Mapping[str, BaseDistribution]:
        """Of each of `params`; the same for all trials of a study that have it."""
        ...

    def attributes(self, trial: TrialT) -> Mapping[str, Any]:
        """What else `trial` needs to restore it."""
        ...

    def trial(self, frozen: FrozenTrial) -> TrialT:
        """Inverse of `params` and `attributes`."""
        ...

    def value(self, record: RecordT) -> float | None:
        """What Optuna shows as the trial's value; None if it failed."""
        ...

    def points(self, record: RecordT) -> Iterable[tuple[int, float]]:
        """(step, value) of the curve, as intermediate values."""
        ...

    def measured(self, record: RecordT) -> Mapping[str, Any]:
        """Further figures that are worth seeing in a dashboard."""
        ...

    def to_dict(self, record: RecordT) -> dict[str, Any]:
        """The whole record, ready for JSON."""
        ...

    def from_dict(self, data: dict[str, Any]) -> RecordT:
        """Inverse of `to_dict`."""
        ...


def stored(format: Format[TrialT, RecordT], record: RecordT) -> dict[str, Any]:
    """An outcome as it is stored, with a digest, so that a changed one is not taken for what came back."""
    data: dict[str, Any] = json.loads(json.dumps(format.to_dict(record)))
    return {**data, _DIGEST: _digest(data)}


def restored(format: Format[TrialT, RecordT], data: Any) -> RecordT:
    """Inverse of `stored`; outcomes of earlier versions have no digest.

    Raises:
        ValueError: it is damaged, or of another version.
    """
    if not isinstance(data, dict):
        raise ValueError("an outcome that is none")
    kept = {name: value for name, value in data.items() if name != _DIGEST}
    if _DIGEST in data and data[_DIGEST] != _digest(kept):
        raise ValueError("an outcome that has been changed")
    try:
        return format.from_dict(kept)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"an outcome that lacks something or has too much ({error})") from None


def _digest(data: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


class Training:
    """Training runs: η_A and λ are the parameters, the validation loss is the value."""

    _DISTRIBUTIONS: Mapping[str, BaseDistribution] = {
        "lr": FloatDistribution(1e-12, 1e4, log=True),
        "lr_ratio": FloatDistribution(1.0, 1e9, log=True),
    }

    def params(self, trial: Trial) -> Mapping[str, float]:
        return {"lr": trial.lr, "lr_ratio": trial.lr_ratio}

    def distributions(self, trial: Trial) -> Mapping[str, BaseDistribution]:
        return self._DISTRIBUTIONS

    def attributes(self, trial: Trial) -> Mapping[str, Any]:
        return {"phase": trial.phase, "arm": trial.arm, "seed": trial.seed, "steps": trial.steps}

    def trial(self, frozen: FrozenTrial) -> Trial:
        attributes = frozen.user_attrs
        return Trial(
            phase=attributes["phase"],
            arm=attributes["arm"],
            lr=frozen.params["lr"],
            lr_ratio=frozen.params["lr_ratio"],
            seed=attributes["seed"],
            steps=attributes.get("steps"),
        )

    def value(self, record: Record) -> float | None:
        return record.eval_loss if record.status == "done" else None

    def points(self, record: Record) -> Iterable[tuple[int, float]]:
        return ((point.step, point.eval_loss) for point in record.curve)

    def measured(self, record: Record) -> Mapping[str, Any]:
        accuracy = {} if record.eval_accuracy is None else {"eval_accuracy": record.eval_accuracy}
        return {**accuracy, "seconds_per_step": record.seconds_per_step}

    def to_dict(self, record: Record) -> dict[str, Any]:
        return record.to_dict()

    def from_dict(self, data: dict[str, Any]) -> Record:
        return Record.from_dict(data)


TRAINING = Training()
