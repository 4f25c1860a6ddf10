"""Means, intervals and tests: over seeds, where they decide, and over test examples, where they describe.

A seed is one training run, so verdicts rest on seeds: Student's t over the seeds' differences says whether the next
seeds would show a difference, too. Intervals over test examples say how sure a figure is for the models that were
trained, and nothing of models trained later.

There are two intervals, and published figures rest on both: `t_interval`, over seeds, for differences and exponents,
and `two_way_interval`, over seeds and test examples, for the test results of one arm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy import special

from loraplus.errors import InputError

Scores = NDArray[np.float64]
"""Shape (seeds, test examples)."""

LEVEL = 0.05
"""How often a difference may be found where there is none."""
LEAST_SEEDS = 3
"""Two seeds can agree with each other by luck: no verdict rests on fewer than three."""
_RESAMPLES = 9_999
_CELLS = 1_000_000  # resamples × examples held at a time
_EXACT_UP_TO = 12


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95% interval."""

    mean: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        """{"mean", "low", "high"}"""
        return asdict(self)

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of 0."""
        return self.low > 0 or self.high < 0

    def through(self, rising: Callable[[float], float]) -> Estimate:
        """Mean and bounds through a rising function, such as exp for a mean of logarithms."""
        return Estimate(rising(self.mean), rising(self.low), rising(self.high))

    def within(self, least: float, most: float) -> Estimate:
        """With an interval cut to the values that there can be, such as 0 to 1 for a part."""
        return Estimate(self.mean, max(self.low, least), min(self.high, most))


def _spread(values: Sequence[float], step: float) -> float:
    return max(float(np.std(values, ddof=1)), step * math.sqrt(2 / 12))


def t_interval(values: Sequence[float], step: float = 0.0) -> Estimate:
    """The mean of one value a seed with its 95% interval by Student's t; with one seed the interval is unbounded.

    Args:
        values: one a seed, at least one, all finite.
        step: each value is a difference of two numbers that move in such steps, as accuracies on E examples do in 1/E.
            Seeds may agree exactly by chance; the spread is then taken to be what rounding to such steps makes it.

    Example:
        >>> t_interval([1.0, 1.0, 1.0])
        Estimate(mean=1.0, low=1.0, high=1.0)
    """
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Estimate(mean, -math.inf, math.inf)
    half = float(special.stdtrit(len(values) - 1, 1 - LEVEL / 2)) * _spread(values, step) / math.sqrt(len(values))
    return Estimate(mean, mean - half, mean + half)


def exponent(x: Sequence[float], log10_y: Sequence[Sequence[float]]) -> Estimate:
    """p of y ∝ xᵖ, fitted by least squares for each seed; the mean over the seeds with its 95% interval.

    Args:
        x: Such as the widths.
        log10_y: For each seed the decimal logarithms of y at each x.

    Example:
        >>> exponent([64, 128, 256], [[0.0, 0.30103, 0.60206]]).mean.__round__(3)
        1.0
    """
    return t_interval([float(np.polyfit(np.log10(x), row, 1)[0]) for row in log10_y])


def finite_t_interval(values: Sequence[float]) -> Estimate | None:
    """`t_interval`; None without values, or if one of them is not finite (a run that diverged)."""
    return t_interval(values) if len(values) and np.isfinite(values).all() else None


def t_test(differences: Sequence[float], step: float = 0.0) -> float | None:
    """Two-sided p of a mean of paired differences by Student's t; None with one of them, which has no spread.

    It is below 0.05 exactly where `t_interval` leaves 0 out; `holm` can raise it above.

    Args:
        differences: one a seed, all finite.
        step: as in `t_interval`.

    Example:
        >>> t_test([0.0, 0.0, 0.0])
        1.0

    Source: Student, Biometrika 6 (1908).
    """
    if len(differences) < 2:
        return None
    mean = math.fsum(differences) / len(differences)
    error = _spread(differences, step) / math.sqrt(len(differences))
    if error == 0:
        return 0.0 if mean else 1.0
    return float(2 * special.stdtr(len(differences) - 1, -abs(mean) / error))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of several tests, such that the chance of any false finding among all of them is that of one test.

    p_(k) → max over j ≤ k of min(1, (m − j + 1)·p_(j)), where p_(1) is the smallest of m. It holds however the
    tests depend on each other, so arms may share their reference.

    Args:
        p_values: in any order.

    Returns:
        The adjusted ones, in the same order.

    Example:
        >>> holm([0.04, 0.01, 0.5])
        [0.08, 0.03, 0.5]

    Source: Holm, Scand. J. Statist. 6 (1979).
    """
    adjusted, so_far = [0.0] * len(p_values), 0.0
    for place, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        so_far = max(so_far, min(1.0, (len(p_values) - place) * p_values[i]))
        adjusted[i] = so_far
    return adjusted


def decisions(family: Mapping[str, Sequence[float]], step: float = 0.0) -> dict[str, float | None]:
    """The p-values that verdicts rest on: `t_test` over the seeds of each comparison, then `holm` over all of them.

    Args:
        family: {comparison: its differences, one a seed}.
        step: as in `t_interval`.

    Returns:
        {comparison: p}; None for those with fewer than `LEAST_SEEDS` seeds, which are no part of the family.

    Example:
        >>> decisions({"two seeds": [0.1, 0.1], "three": [0.0, 0.0, 0.0]})
        {'two seeds': None, 'three': 1.0}
    """
    p_values = {
        name: p
        for name, differences in family.items()
        if len(differences) >= LEAST_SEEDS and (p := t_test(differences, step)) is not None
    }
    adjusted = dict(zip(p_values, holm(list(p_values.values())), strict=True))
    return {name: adjusted.get(name) for name in family}


def _checked(scores: Sequence[Sequence[float]] | Scores) -> Scores:
    try:
        array = np.asarray(scores, dtype=np.float64)
    except ValueError as error:
        raise InputError("scores must be one row a seed, all of one length") from error
    if array.ndim != 2 or 0 in array.shape:
        raise InputError(f"scores must be one row a seed, with at least one example each; got shape {array.shape}")
    if not np.isfinite(array).all():
        raise InputError("scores must be finite; a run with NaN or infinite scores counts as diverged")
    return array


def two_way_interval(scores: Sequence[Sequence[float]] | Scores) -> Estimate:
    """The mean of (seeds × examples) scores with a 95% interval for new seeds and new test examples.

    half² = half²_seeds + half²_examples, of the t intervals over the seeds' means and over the examples' means. It is
    wide rather than narrow: what neither seed nor example explains counts in both. With one seed only the examples
    vary, with one example only the seeds.

    Args:
        scores: shape (seeds, test examples).

    Returns:
        The mean and its interval, which is unbounded for a single score.

    Raises:
        InputError: rows of unequal length, none, or with NaN or infinite scores.

    Example:
        >>> two_way_interval([[1.0, 1.0], [1.0, 1.0]])
        Estimate(mean=1.0, low=1.0, high=1.0)

    Source: Banerjee, Sankhyā 22 (1960), for a sum of variances each known from its own sample.
    """
    scores = _checked(scores)
    ways = [t_interval(means) for means in (scores.mean(axis=1), scores.mean(axis=0)) if len(means) > 1]
    mean, half = float(scores.mean()), math.hypot(*(way.high - way.mean for way in ways)) if ways else math.inf
    return Estimate(mean, mean - half, mean + half)


@dataclass(frozen=True)
class PairedDifference:
    """b − a on the same seeds and examples: tested over seeds, and described over examples."""

    by_seed: tuple[float, ...]
    difference: Estimate
    p_value: float | None
    p_value_over_seeds: float
    over_examples: Estimate
    p_value_over_examples: float


def paired_difference(
    a: Sequence[Sequence[float]] | Scores, b: Sequence[Sequence[float]] | Scores, *, step: float = 0.0, seed: int = 0
) -> PairedDifference:
    """Mean of b − a with interval and test over seeds, and the same over examples.

    `difference` and `p_value` are Student's t over the seeds' differences: do the *methods* differ on new seeds, tested
    on these examples? `p_value_over_seeds` is the exact permutation test for the same question; with S seeds it cannot
    fall below 2/2^S. `over_examples` and `p_value_over_examples` (Student's t, and a permutation test that swaps the
    arms within an example, scores averaged over seeds) ask another one: do *these models* differ on new examples?

    Args:
        a, b: shape (seeds, test examples), paired in both.
        step: of a seed's mean, as in `t_interval`.
        seed: of the permutations over examples, where there are too many to try them all.

    Returns:
        The difference; its interval is unbounded and `p_value` None with one seed.

    Raises:
        InputError: the shapes differ, rows of unequal length, none, or with NaN or infinite scores.

    Example:
        >>> paired_difference([[0.0], [0.0], [0.0]], [[0.9], [1.1], [1.0]]).p_value < 0.01
        True

    Source: Good, Permutation, Parametric and Bootstrap Tests of Hypotheses (2005), section 3.7, for the permutations.
    """
    a, b = _checked(a), _checked(b)
    if a.shape != b.shape:
        raise InputError(f"paired scores must have one shape, got {a.shape} and {b.shape}")
    difference = b - a
    by_seed, by_example = difference.mean(axis=1), difference.mean(axis=0)
    return PairedDifference(
        tuple(by_seed.tolist()), t_interval(by_seed, step), t_test(by_seed, step), _sign_flip_p(by_seed, seed),
        t_interval(by_example), _sign_flip_p(by_example, seed),
    )  # fmt: skip


def _sign_flip_p(differences: Scores, seed: int) -> float:
    """Two-sided p of a mean of paired differences; exact where all sign patterns can be tried."""
    changed = differences[differences != 0]  # a zero difference has no sign to flip
    if not len(changed):
        return 1.0
    if len(changed) <= _EXACT_UP_TO:  # scipy's test needs two observations or more
        sums = np.abs(np.array(list(product((-1.0, 1.0), repeat=len(changed)))) @ changed)
        return float((sums >= abs(changed.sum()) - 1e-12 * np.abs(changed).sum()).mean())
    from scipy import stats  # half a second to import, and seldom needed

    result = stats.permutation_test(
        (changed,), lambda sample, axis: sample.mean(axis=axis), permutation_type="samples", vectorized=True,
        n_resamples=_RESAMPLES, batch=max(1, _CELLS // len(changed)), rng=np.random.default_rng(seed),
    )  # fmt: skip
    return float(result.pvalue)


def steps_to_target(steps: Sequence[int], losses: Sequence[float], target: float) -> float | None:
    """First step, between evaluations by a straight line, at which a loss curve is down to `target`.

    Args:
        steps: of the evaluations, rising.
        losses: one an evaluation; NaN and infinity have not reached anything.
        target: loss to reach.

    Returns:
        The step; None if the curve never gets there.

    Raises:
        InputError: not as many losses as steps.

    Example:
        >>> steps_to_target([10, 20], [1.0, 0.5], 0.75)
        15.0
    """
    if len(steps) != len(losses):
        raise InputError(f"a curve needs one loss a step, got {len(steps)} steps and {len(losses)} losses")
    for i, (step, loss) in enumerate(zip(steps, losses, strict=True)):
        if loss <= target:
            before = losses[i - 1] if i else math.nan
            if not math.isfinite(before):  # no point to draw a line from
                return float(step)
            return float(steps[i - 1] + (step - steps[i - 1]) * (before - target) / (before - loss))
    return None
