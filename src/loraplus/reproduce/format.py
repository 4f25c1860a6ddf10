"""How the runs of an experiment are kept in a study: numbers as Optuna parameters, everything as attributes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.trial import FrozenTrial

from loraplus.reproduce.experiment import Experiment, Result, Run

_ANY_NUMBER = FloatDistribution(-1e12, 1e12)
_PARAMS = "params"


class RunFormat:
    """Of one experiment; it says which value stands for a run.

    Infinity and NaN are kept as the words that Python reads them by: databases take no such numbers.
    """

    def __init__(self, experiment: Experiment) -> None:
        self._experiment = experiment

    def params(self, trial: Run) -> Mapping[str, float]:
        return {name: float(value) for name, value in trial.params.items() if not isinstance(value, str)}

    def distributions(self, trial: Run) -> Mapping[str, BaseDistribution]:
        return dict.fromkeys(self.params(trial), _ANY_NUMBER)

    def attributes(self, trial: Run) -> Mapping[str, Any]:
        return {_PARAMS: dict(trial.params)}

    def trial(self, frozen: FrozenTrial) -> Run:
        return Run(frozen.user_attrs[_PARAMS])

    def value(self, record: Result) -> float | None:
        _, value = self._experiment.main(record) or ("", 0.0)  # a run of rows alone has no value of its own
        return value if record.status == "done" and math.isfinite(value) else None

    def points(self, record: Result) -> Iterable[tuple[int, float]]:
        return ((step, value) for step, value in record.curve if math.isfinite(value))

    def measured(self, record: Result) -> Mapping[str, Any]:
        return {}

    def to_dict(self, record: Result) -> dict[str, Any]:
        return {
            "params": dict(record.params),
            "status": record.status,
            "values": _kept(record.values),
            "curve": [[step, _kept_value(value)] for step, value in record.curve],
            "rows": [_kept(row) for row in record.rows],
            "seconds": record.seconds,
        }

    def from_dict(self, data: dict[str, Any]) -> Result:
        return Result(
            run=Run(data["params"]),
            status=data["status"],
            values=_restored(data["values"]),
            curve=tuple((step, _restored_value(value)) for step, value in data["curve"]),
            rows=tuple(_restored(row) for row in data["rows"]),
            seconds=data["seconds"],
        )


_WORDS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def _kept_value(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _restored_value(value: Any) -> Any:
    return _WORDS.get(value, value) if isinstance(value, str) else value


def _kept(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _kept_value(value) for name, value in values.items()}


def _restored(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _restored_value(value) for name, value in values.items()}
