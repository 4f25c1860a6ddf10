"""How much of a run is evaluation."""

from __future__ import annotations

import math

import pytest

from loraplus.tasks.config import TaskConfig, TrainConfig
from loraplus.tasks.lengths import COST, most_validation_examples, steps_between_evaluations


def share(steps: int, batch_size: int, examples: int) -> float:
    evaluated = math.ceil(steps / steps_between_evaluations(steps, batch_size, examples)) * examples * COST
    return evaluated / (evaluated + steps * batch_size)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 19, 20, 25, 99, 100, 1000])
@pytest.mark.parametrize("examples", [1, 32, 128, 5000])
def test_a_curve_has_three_points_and_takes_a_fifth_if_it_has_more(steps, examples):
    points = math.ceil(steps / steps_between_evaluations(steps, 32, examples))
    assert points >= min(3, steps)
    assert points <= 4 or share(steps, 32, examples) <= 0.2


@pytest.mark.parametrize(("steps", "every"), [(20, 2), (100, 10), (300, 30), (1005, 100)])
def test_a_run_with_the_time_is_evaluated_ten_times(steps, every):
    assert steps_between_evaluations(steps, 32, steps // 10) == every


@pytest.mark.parametrize("steps", [20, 50, 100])
def test_three_evaluations_of_a_short_run_fit_into_a_fifth_of_it(steps):
    most = most_validation_examples(TaskConfig(max_steps=steps), 10_000)
    assert most is not None and share(steps, 32, most) <= 0.2


def test_three_passes_over_the_data_leave_all_of_a_tenth_for_validation():
    most = most_validation_examples(TrainConfig(), 9000)
    assert most is not None and most > 1000
    assert steps_between_evaluations(844, 32, 1000) == 84


def test_validation_data_that_somebody_chose_is_used_as_it_is():
    assert most_validation_examples(TaskConfig(max_steps=1, eval_data="v.csv"), 100) is None
    assert most_validation_examples(TaskConfig(max_steps=1, max_eval_samples=500), 1000) == 500
