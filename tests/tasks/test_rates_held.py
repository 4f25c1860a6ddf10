"""Rates that no study could keep are refused before anything is read or written."""

from __future__ import annotations

import pytest

from loraplus.compare import compare
from loraplus.errors import LoraPlusError
from loraplus.study.records import Trial
from loraplus.tasks.config import HIGHEST_LR, HIGHEST_LR_RATIO, LOWEST_LR, CompareConfig


@pytest.mark.parametrize(
    "rates",
    [
        {"untuned_lr": 1e-30}, {"untuned_lr": 1e30}, {"untuned_lr": 5e-324}, {"untuned_lr": float("inf")},
        {"lr_ratio": 1e10}, {"lr_ratio": 1e30}, {"lr_ratio": float("nan")}, {"lr_ratio": 1.0}, {"lr_ratio": -4.0},
    ],
    ids=str,
)  # fmt: skip
def test_a_rate_that_no_study_keeps_is_one_line(tmp_path, rates):
    (option,) = rates
    with pytest.raises(LoraPlusError, match=f"--{option.replace('_', '-')} must"):
        compare(CompareConfig(model="nowhere", data="nowhere.csv", output=str(tmp_path / "o"), **rates))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("lr", [LOWEST_LR, HIGHEST_LR])
@pytest.mark.parametrize("ratio", [1.0, HIGHEST_LR_RATIO])
def test_every_rate_that_is_taken_fits_into_a_study(lr, ratio):
    trial = Trial("tuning", "loraplus", lr, ratio, 0)
    (value, (low, high, _)), (of_ratio, (_, highest_ratio, _)) = (trial.numbers[name] for name in ("lr", "lr_ratio"))
    assert low <= value <= high
    assert of_ratio * 64 <= highest_ratio  # the search goes up from there
