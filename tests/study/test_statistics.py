"""Intervals that cover, p-values that are level under the null, steps to a target."""

from __future__ import annotations

import numpy as np
import pytest

from loraplus.errors import InputError
from loraplus.study.statistics import bootstrap_mean, paired_difference, steps_to_target


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


def test_the_spread_over_two_seeds_is_not_halved():
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


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    generator = np.random.default_rng(2)
    covered = 0
    for _ in range(200):
        estimate = bootstrap_mean(crossed(generator, 8, 60))
        covered += estimate.low <= 0 <= estimate.high
    assert 0.88 <= covered / 200 <= 1.0


def test_p_values_are_level_when_there_is_no_difference():
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


@pytest.mark.parametrize("scores", [[], [[]], [[1.0], [1.0, 2.0]]])
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
