"""Intervals that cover, p-values that are level under the null, verdicts that rest on seeds, steps to a target."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from loraplus.errors import InputError
from loraplus.study import statistics
from loraplus.study.statistics import (
    decisions,
    holm,
    paired_difference,
    steps_to_target,
    t_interval,
    t_test,
    two_way_interval,
)


def crossed(generator, seeds, examples, seed_sd=0.5, example_sd=1.0, noise_sd=0.5):
    """Scores with a part from the seed, a part from the example, and noise; their true mean is 0."""
    return (
        seed_sd * generator.standard_normal((seeds, 1))
        + example_sd * generator.standard_normal((1, examples))
        + noise_sd * generator.standard_normal((seeds, examples))
    )


def test_the_interval_is_that_of_the_mean_when_examples_decide():
    scores = np.random.default_rng(0).standard_normal((1, 400))
    estimate = two_way_interval(scores)
    assert estimate.mean == pytest.approx(scores.mean())
    assert (estimate.high - estimate.low) / 3.92 == pytest.approx(scores.std() / 20, rel=0.05)


@pytest.mark.parametrize(
    ("seeds", "examples", "parts", "at_most"),
    [
        (3, 60, {}, 0.99),
        (8, 60, {}, 0.98),
        (5, 400, {"seed_sd": 1.0, "example_sd": 0.0, "noise_sd": 0.01}, 0.97),
        (2, 50, {"seed_sd": 1.0, "example_sd": 0.0, "noise_sd": 0.01}, 0.97),
        (3, 50, {"seed_sd": 0.0, "example_sd": 1.0}, 1.0),
    ],
)
def test_the_interval_of_an_arm_covers_the_truth_as_often_as_it_says(seeds, examples, parts, at_most):
    generator = np.random.default_rng(2)
    estimates = [two_way_interval(crossed(generator, seeds, examples, **parts)) for _ in range(1000)]
    assert 0.93 <= np.mean([estimate.low <= 0 <= estimate.high for estimate in estimates]) <= at_most


def test_a_single_score_has_no_interval():
    assert two_way_interval([[0.5]]).high == math.inf
    assert two_way_interval([[0.5], [0.7]]).high == pytest.approx(t_interval([0.5, 0.7]).high)  # only the seeds vary


def test_the_interval_of_a_few_seeds_is_students():
    estimate = t_interval([1.0, 2.0, 4.0])
    assert estimate.mean == pytest.approx(7 / 3)
    assert estimate.high - estimate.mean == pytest.approx(4.3027 * math.sqrt(7 / 3) / math.sqrt(3), rel=1e-4)


@pytest.mark.parametrize("differences", [[1.0, 2.0, 4.0], [0.3, -0.1], [0.9, 1.1, 1.0, 1.3, 0.2], [0.0, 0.0, 0.25]])
def test_p_is_that_of_the_one_sample_t_test_and_agrees_with_the_interval(differences):
    p = t_test(differences)
    assert p == pytest.approx(ttest_1samp(differences, 0.0).pvalue)
    assert (p < 0.05) == t_interval(differences).excludes_zero


def test_seeds_that_all_agree_are_judged_by_the_step_of_what_they_count():
    assert t_test([0.1, 0.1, 0.1]) < 1e-9 and t_test([0.0, 0.0, 0.0]) == 1.0
    one_example = [1 / 400] * 3
    assert t_test(one_example, step=1 / 400) > 0.05 > t_test([4 / 400] * 3, step=1 / 400)
    assert not t_interval(one_example, step=1 / 400).excludes_zero
    spread = [0.01, 0.03, 0.05]
    assert t_test(spread, step=1 / 400) == t_test(spread)


def test_holm_multiplies_by_what_is_left_and_never_falls():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.6]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2] and holm([]) == []


def test_a_verdict_takes_three_seeds_and_counts_the_whole_family():
    clear = [0.05, 0.06, 0.055]
    p = t_test(clear)
    assert decisions({"a": clear}) == {"a": p}
    assert decisions({"a": clear, "b": clear[:2]}) == {"a": p, "b": None}
    assert decisions({"a": clear, "b": [0.1, -0.1, 0.0]})["a"] == 2 * p


def test_p_over_examples_is_level_when_there_is_no_difference(monkeypatch):
    monkeypatch.setattr(statistics, "_RESAMPLES", 999)  # the simulation's own noise is larger than that
    generator = np.random.default_rng(3)
    p = [
        paired_difference(generator.standard_normal((2, 30)), generator.standard_normal((2, 30))).p_value_over_examples
        for _ in range(60)
    ]
    assert 0.3 < np.mean(p) < 0.7
    assert np.mean(np.array(p) < 0.05) < 0.15


def test_seeds_and_examples_are_asked_apart():
    generator = np.random.default_rng(4)
    a = (generator.random((3, 500)) < 0.7).astype(float)
    b = np.maximum(a, generator.random((3, 500)) < 0.4)
    better = paired_difference(a, b)
    assert better.by_seed == pytest.approx((b - a).mean(axis=1))
    assert better.difference == t_interval(better.by_seed) and better.p_value == t_test(better.by_seed) < 0.01
    assert better.difference.mean == better.over_examples.mean == pytest.approx((b - a).mean())
    assert better.p_value_over_examples < 0.001
    assert better.p_value_over_seeds == pytest.approx(0.25)  # 2 of the 8 sign patterns of three seeds
    same = paired_difference(a, a)
    assert (same.difference.mean, same.p_value, same.p_value_over_examples) == (0.0, 1.0, 1.0)


def test_the_difference_turns_its_sign_when_the_arms_are_swapped():
    generator = np.random.default_rng(5)
    a, b = generator.random((3, 40)), generator.random((3, 40))
    ab, ba = paired_difference(a, b), paired_difference(b, a)
    assert ab.difference.mean == pytest.approx(-ba.difference.mean)
    assert ab.difference.low == pytest.approx(-ba.difference.high, abs=1e-9)
    assert ab.p_value == pytest.approx(ba.p_value)
    assert ab.p_value_over_examples == pytest.approx(ba.p_value_over_examples, abs=0.02)


@pytest.mark.parametrize("scores", [[], [[]], [1.0, 2.0], [[1.0], [1.0, 2.0]]])
def test_ragged_or_empty_scores_are_refused(scores):
    with pytest.raises(InputError, match="one row a seed"):
        two_way_interval(scores)


def test_arms_of_different_shape_are_refused():
    with pytest.raises(InputError, match="one shape"):
        paired_difference([[1.0, 2.0]], [[1.0]])


def test_steps_to_target_reads_between_evaluations():
    steps, losses = [10, 20, 30], [0.9, 0.5, 0.6]
    assert steps_to_target(steps, losses, 0.7) == pytest.approx(15.0)
    assert steps_to_target(steps, losses, 0.95) == 10.0
    assert steps_to_target(steps, losses, 0.4) is None


def test_the_same_seed_gives_the_same_permutations():
    a, b = np.random.default_rng(7).random((2, 3, 50))
    assert paired_difference(a, b, seed=1) == paired_difference(a, b, seed=1)
    p = {paired_difference(a, b, seed=seed).p_value_over_examples for seed in range(4)}
    assert len(p) > 1


@pytest.mark.parametrize(("changed", "p"), [(0, 1.0), (1, 1.0), (3, 0.25), (8, 2 / 2**8), (12, 2 / 2**12)])
def test_a_few_changed_examples_among_many_have_the_exact_p_value(changed, p):
    better = np.zeros((2, 100))
    better[:, :changed] = 1
    assert paired_difference(np.zeros((2, 100)), better).p_value_over_examples == p


@pytest.mark.parametrize("seeds", [1, 2, 5, 12])
def test_p_over_seeds_reaches_its_smallest_value_when_all_seeds_agree(seeds):
    a = np.zeros((seeds, 4))
    assert paired_difference(a, a + 0.1).p_value_over_seeds == 2 / 2**seeds


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_that_are_not_finite_are_refused(bad):
    with pytest.raises(InputError, match="finite"):
        two_way_interval([[1.0, bad], [1.0, 2.0]])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_curve_that_comes_from_no_number_reaches_the_target_at_the_evaluation_itself(bad):
    assert steps_to_target([10, 20], [bad, 0.5], 0.7) == 20.0


def test_a_curve_with_more_steps_than_losses_is_refused():
    with pytest.raises(InputError, match="one loss a step"):
        steps_to_target([10, 20], [0.5], 0.7)
