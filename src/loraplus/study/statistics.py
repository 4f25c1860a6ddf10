"""Means, intervals and tests over seeds × test examples.

Both arms are trained on the same seeds and tested on the same examples, so everything compared is paired. A result
varies for two reasons, the seed and the choice of test examples; intervals resample both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from loraplus.errors import InputError

Scores = NDArray[np.float64]
"""Shape (seeds, test examples)."""

_RESAMPLES = 9_999
_CELLS = 1_000_000  # resamples × examples held at a time
_CONFIDENCE = 0.95
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


def _counts(generator: np.random.Generator, draws: int, kinds: int, size: int) -> NDArray[np.int64]:
    """How often each of `kinds` things came in `draws` draws with replacement, `size` times: multinomial, but fast."""
    drawn = generator.integers(kinds, size=(size, draws), dtype=np.int64 if size * kinds >= 2**31 else np.int32)
    drawn += (np.arange(size, dtype=drawn.dtype) * kinds)[:, None]  # a range of numbers for each resample
    return np.bincount(drawn.ravel(), minlength=size * kinds).reshape(size, kinds)


def bootstrap_mean(scores: Sequence[Sequence[float]] | Scores, seed: int = 0) -> Estimate:
    """Mean of (seeds × examples) scores with a two-way bootstrap interval.

    Examples are drawn with replacement, and so are the seeds, but only S − 1 of them, which makes the variance over
    seeds unbiased even for S = 2 (with S draws it would be half of what it is). One seed alone: examples only.

    Args:
        scores: shape (seeds, test examples).
        seed: of the resampling.

    Returns:
        The mean and its 95% percentile interval.

    Raises:
        InputError: rows of unequal length, none, or with NaN or infinite scores.

    Example:
        >>> bootstrap_mean([[1.0, 1.0], [1.0, 1.0]])
        Estimate(mean=1.0, low=1.0, high=1.0)

    Source: Rao and Wu, JASA 83 (1988), for the m = n − 1 draws; Owen, Ann. Appl. Stat. 1 (2007), for both ways.
    """
    scores = _checked(scores)
    seeds, examples = scores.shape
    generator = np.random.default_rng(seed)
    means = np.empty(_RESAMPLES)
    chunk = max(1, _CELLS // examples)
    for start in range(0, _RESAMPLES, chunk):
        count = min(chunk, _RESAMPLES - start)
        per_seed = (_counts(generator, examples, examples, count) / examples) @ scores.T
        if seeds > 1:
            seed_weights = _counts(generator, seeds - 1, seeds, count) / (seeds - 1)
            means[start : start + count] = (per_seed * seed_weights).sum(axis=1)
        else:
            means[start : start + count] = per_seed[:, 0]
    tail = (1 - _CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Estimate(float(scores.mean()), float(low), float(high))


@dataclass(frozen=True)
class PairedDifference:
    """b − a over the same seeds and examples."""

    difference: Estimate
    p_value: float
    p_value_over_seeds: float

    @property
    def found(self) -> bool:
        """A difference counts as found only if the interval excludes 0 and the permutation test agrees."""
        return self.difference.excludes_zero and self.p_value < 1 - _CONFIDENCE


def paired_difference(
    a: Sequence[Sequence[float]] | Scores, b: Sequence[Sequence[float]] | Scores, seed: int = 0
) -> PairedDifference:
    """Mean of b − a, its interval, and two permutation tests.

    p_value swaps the arms within each test example (scores averaged over seeds): do *these* models differ on new
    examples? p_value_over_seeds swaps them within each seed, exactly up to 12 seeds: do the *methods* differ on new
    seeds? With S seeds it cannot fall below 2/2^S.

    Args:
        a, b: shape (seeds, test examples), paired in both.
        seed: of the resampling.

    Returns:
        The difference and its p-values.

    Raises:
        InputError: the shapes differ, or as in `bootstrap_mean`.

    Example:
        >>> paired_difference([[0.0] * 8], [[1.0] * 8]).p_value  # 2 of the 2^8 sign patterns
        0.0078125

    Source: Good, Permutation, Parametric and Bootstrap Tests of Hypotheses (2005), section 3.7, for paired samples.
    """
    a, b = _checked(a), _checked(b)
    if a.shape != b.shape:
        raise InputError(f"paired scores must have one shape, got {a.shape} and {b.shape}")
    difference = b - a
    return PairedDifference(
        bootstrap_mean(difference, seed),
        _sign_flip_p(difference.mean(axis=0), seed),
        _sign_flip_p(difference.mean(axis=1), seed),
    )


def _sign_flip_p(differences: Scores, seed: int) -> float:
    """Two-sided p of a mean of paired differences; exact where all sign patterns can be tried."""
    changed = differences[differences != 0]  # a zero difference has no sign to flip
    if not len(changed):
        return 1.0
    if len(changed) <= _EXACT_UP_TO:  # scipy's test needs two observations or more
        sums = np.abs(np.array(list(product((-1.0, 1.0), repeat=len(changed)))) @ changed)
        return float((sums >= abs(changed.sum()) - 1e-12 * np.abs(changed).sum()).mean())
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
