"""A run of a study as Optuna's trial, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from loraplus.study.records import RECORD, Keyed, Record, stored, trial_of


def frozen_trial(
    trial: Keyed,
    state: TrialState,
    attributes: Mapping[str, Any],
    curve: Mapping[int, float] | None = None,
    value: float | None = None,
) -> FrozenTrial:
    """A run as Optuna has it."""
    return create_trial(
        state=state,
        value=value,
        params={name: value for name, (value, _) in trial.numbers.items()},
        distributions={
            name: FloatDistribution(low, high, log=log) for name, (_, (low, high, log)) in trial.numbers.items()
        },
        user_attrs={**trial.attributes, **attributes},
        intermediate_values=dict(curve or {}),
    )


def trial_of_frozen(frozen: FrozenTrial) -> Any:
    """Inverse of `frozen_trial`."""
    return trial_of({**frozen.params, **frozen.user_attrs})


def outcome_of(record: Record) -> dict[str, Any]:
    """A record as attributes; beside it what is worth seeing in a dashboard. The record comes last."""
    beside = {"eval_accuracy": record.eval_accuracy, "seconds_per_step": record.seconds_per_step or None}
    return {**{name: value for name, value in beside.items() if value is not None}, RECORD: stored(record)}


def curve_of(record: Record) -> dict[int, float]:
    """{step: loss}, where it is finite."""
    return {point.step: point.eval_loss for point in record.curve if math.isfinite(point.eval_loss)}
