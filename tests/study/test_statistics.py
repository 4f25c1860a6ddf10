"""Intervals that cover, p-values that are level under the null, steps to a target."""

from __future__ import annotations

import math

import numpy as np
import pytest

from loraplus.errors import InputError
from loraplus.study import statistics
from loraplus.study.statistics import _counts, bootstrap_mean, paired_difference, steps_to_target


@pytest.fixture
def fewer_resamples(monkeypatch):
    """For simulations, whose own noise is larger than that of 999 resamples."""
    monkeypatch.setattr(statistics, "_RESAMPLES", 999)


def crossed(generator, seeds, examples, seed_sd=0.5, example_sd=1.0, noise_sd=0.5):
    """Scores with a part from the seed, a part from the example, and noise; their true mean is 0."""
    return (
        seed_sd * generator.standard_normal((seeds, 1))
        + example_sd * generator.standard_normal((1, examples))
        + noise_sd * generator.standard_normal((seeds, examples))
    )


def test_the_bootstrap_spread_is_that_of_the_mean_when_examples_decide():
    scores = np.random.default_rng(0).standard_normal((1, 400))
    estimate = bootstrap_mean(scores)
    assert estimate.mean == pytest.approx(scores.mean())
    assert (estimate.high - estimate.low) / 3.92 == pytest.approx(scores.std() / 20, rel=0.05)


def test_the_spread_over_two_seeds_is_not_halved(fewer_resamples):
    generator = np.random.default_rng(1)
    widths, means = [], []
    for _ in range(300):
        scores = crossed(generator, 2, 50, seed_sd=1.0, example_sd=0.0, noise_sd=0.01)
        estimate = bootstrap_mean(scores)
        means.append(estimate.mean)
        widths.append((estimate.high - estimate.low) / 2)
    # With one of two seeds drawn, the interval is the range of the two: half its width is |a − b| / 2, whose mean
    # square is the variance of the mean.
    assert np.sqrt(np.mean(np.square(widths))) == pytest.approx(np.std(means), rel=0.15)


def test_the_interval_covers_the_truth_about_as_often_as_it_says(fewer_resamples):
    generator = np.random.default_rng(2)
    covered = 0
    for _ in range(200):
        estimate = bootstrap_mean(crossed(generator, 8, 60))
        covered += estimate.low <= 0 <= estimate.high
    assert 0.88 <= covered / 200 <= 1.0


def test_p_values_are_level_when_there_is_no_difference(fewer_resamples):
    generator = np.random.default_rng(3)
    p = [
        paired_difference(generator.standard_normal((2, 30)), generator.standard_normal((2, 30))).p_value
        for _ in range(60)
    ]
    assert 0.3 < np.mean(p) < 0.7
    assert np.mean(np.array(p) < 0.05) < 0.15


def test_a_clear_difference_is_found_and_none_is_not():
    generator = np.random.default_rng(4)
    a = (generator.random((3, 500)) < 0.7).astype(float)
    b = np.maximum(a, generator.random((3, 500)) < 0.4)
    better = paired_difference(a, b)
    assert better.found
    assert better.difference.mean == pytest.approx((b - a).mean())
    assert better.p_value < 0.001
    assert better.p_value_over_seeds == pytest.approx(0.25)  # 2 of the 8 sign patterns of three seeds
    same = paired_difference(a, a)
    assert not same.found
    assert (same.difference.mean, same.p_value) == (0.0, 1.0)


def test_the_difference_turns_its_sign_when_the_arms_are_swapped():
    generator = np.random.default_rng(5)
    a, b = generator.random((2, 40)), generator.random((2, 40))
    ab, ba = paired_difference(a, b), paired_difference(b, a)
    assert ab.difference.mean == pytest.approx(-ba.difference.mean)
    assert ab.difference.low == pytest.approx(-ba.difference.high, abs=1e-9)
    assert ab.p_value == pytest.approx(ba.p_value, abs=0.02)


@pytest.mark.parametrize("scores", [[], [[]], [1.0, 2.0], [[1.0], [1.0, 2.0]]])
def test_ragged_or_empty_scores_are_refused(scores):
    with pytest.raises(InputError, match="one row a seed"):
        bootstrap_mean(scores)


def test_arms_of_different_shape_are_refused():
    with pytest.raises(InputError, match="one shape"):
        paired_difference([[1.0, 2.0]], [[1.0]])


def test_steps_to_target_reads_between_evaluations():
    steps, losses = [10, 20, 30], [0.9, 0.5, 0.6]
    assert steps_to_target(steps, losses, 0.7) == pytest.approx(15.0)
    assert steps_to_target(steps, losses, 0.95) == 10.0
    assert steps_to_target(steps, losses, 0.4) is None


def test_resampling_counts_are_multinomial():
    counts = _counts(np.random.default_rng(6), draws=9, kinds=5, size=20_000)
    assert counts.shape == (20_000, 5)
    assert (counts.sum(axis=1) == 9).all()
    assert counts.mean(axis=0) == pytest.approx([9 / 5] * 5, rel=0.03)
    assert np.cov(counts.T)[0, :2] == pytest.approx([9 * 0.2 * 0.8, -9 * 0.2 * 0.2], abs=0.06)


def test_the_same_seed_gives_the_same_interval():
    scores = np.random.default_rng(7).random((3, 50))
    assert bootstrap_mean(scores, seed=1) == bootstrap_mean(scores, seed=1)
    assert bootstrap_mean(scores, seed=1) != bootstrap_mean(scores, seed=2)


@pytest.mark.parametrize(("changed", "p"), [(0, 1.0), (1, 1.0), (3, 0.25), (8, 2 / 2**8), (12, 2 / 2**12)])
def test_a_few_changed_examples_among_many_have_the_exact_p_value(changed, p):
    better = np.zeros((2, 100))
    better[:, :changed] = 1
    assert paired_difference(np.zeros((2, 100)), better).p_value == p


@pytest.mark.parametrize("seeds", [1, 2, 5, 12])
def test_p_over_seeds_reaches_its_smallest_value_when_all_seeds_agree(seeds):
    a = np.zeros((seeds, 4))
    assert paired_difference(a, a + 0.1).p_value_over_seeds == 2 / 2**seeds


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_that_are_not_finite_are_refused(bad):
    with pytest.raises(InputError, match="finite"):
        bootstrap_mean([[1.0, bad], [1.0, 2.0]])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_curve_that_comes_from_no_number_reaches_the_target_at_the_evaluation_itself(bad):
    assert steps_to_target([10, 20], [bad, 0.5], 0.7) == 20.0


def test_a_curve_with_more_steps_than_losses_is_refused():
    with pytest.raises(InputError, match="one loss a step"):
        steps_to_target([10, 20], [0.5], 0.7)
