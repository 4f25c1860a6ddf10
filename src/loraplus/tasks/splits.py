"""Training, validation and test data: fixed by a seed, each with its share of every class, no text in two of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Generic, NamedTuple, Protocol, Self, TypeVar

import numpy as np

from loraplus.errors import InputError
from loraplus.tasks.config import CompareConfig, TaskConfig
from loraplus.tasks.lengths import most_validation_examples
from loraplus.tasks.streamed import Labels, digest

_LARGEST_SEED = 2**32 - 1  # numpy's


def check_seed(config: TaskConfig) -> None:
    """Makes sure that numpy takes every seed of a run or comparison.

    Raises:
        InputError: it does not.
    """
    last_seed = config.seed + (config.seeds if isinstance(config, CompareConfig) else 0)
    if config.seed < 0 or last_seed > _LARGEST_SEED:
        most = _LARGEST_SEED - (last_seed - config.seed)
        raise InputError(f"--seed must lie between 0 and {most}, got {config.seed}")


def _shuffled_classes(labels: Sequence[str], seed: int) -> list[np.ndarray]:
    """The indices (rows of it,) of every class, each in an order fixed by the seed."""
    generator = np.random.default_rng(seed)
    return [generator.permutation(rows) for rows in Labels.of(labels).classes()]


def _quotas(sizes: Sequence[int], total: int, least: Sequence[int], most: Sequence[int]) -> list[int]:
    """Splits `total` into integers in proportion to `sizes`, within bounds, by largest remainder."""
    exact = [total * size / sum(sizes) for size in sizes]
    quotas = [min(max(int(share), low), high) for share, low, high in zip(exact, least, most, strict=True)]
    by_remainder = sorted(range(len(sizes)), key=lambda i: int(exact[i]) - exact[i])
    for i in by_remainder:
        if sum(quotas) < total and quotas[i] < most[i]:
            quotas[i] += 1
    return quotas


def check_fraction(fraction: float) -> None:
    """Makes sure that a part of the data can be held out.

    Raises:
        InputError: it is not between 0 and 1.
    """
    if not 0 < fraction < 1:
        raise InputError(f"the part of the data to hold out must lie between 0 and 1, got {fraction}")


def stratified_split(labels: Sequence[str], fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Keeps a part of every class aside.

    Args:
        labels: one a row.
        fraction: part to hold out, between 0 and 1.
        seed: the same seed gives the same split.

    Returns:
        (indices kept, indices held out), each in the order of the rows. A class with two or more rows stands on both
        sides, one with a single row is kept.

    Raises:
        InputError: the fraction is not between 0 and 1, or the data is too small to hold anything out.

    Example:
        >>> kept, held_out = stratified_split(["a", "a", "b", "b"], 0.5, seed=0)
        >>> len(kept), len(held_out)
        (2, 2)
    """
    check_fraction(fraction)
    classes = _shuffled_classes(labels, seed)
    sizes = [len(indices) for indices in classes]
    quotas = _quotas(
        sizes,
        round(len(labels) * fraction),
        [1 if size > 1 else 0 for size in sizes],
        [size - 1 if size > 1 else 0 for size in sizes],
    )
    held_out = _first_of_each(classes, quotas)
    if not len(held_out):
        raise InputError(f"{len(labels)} rows are too few to hold any out: every class has a single row")
    return np.delete(np.arange(len(labels)), held_out), held_out


def _first_of_each(classes: Sequence[np.ndarray], quotas: Sequence[int]) -> np.ndarray:
    """The first rows of each class (rows of it,), as many as its quota, in the order of the data."""
    parts = [rows[:quota] for rows, quota in zip(classes, quotas, strict=True)]
    return np.sort(np.concatenate(parts)) if parts else np.arange(0)


def stratified_sample(labels: Sequence[str], count: int, seed: int) -> np.ndarray:
    """Indices of `count` rows in the proportions of the classes.

    Args:
        labels: one a row.
        count: rows wanted; all of them if there are no more than that.
        seed: the same seed gives the same sample.

    Returns:
        Indices in the order of the rows. A class too rare for a whole row may be absent.

    Raises:
        InputError: less than one row is asked for.

    Example:
        >>> len(stratified_sample(["a"] * 6 + ["b"] * 3, 3, seed=0))
        3
    """
    if count < 1:
        raise InputError(f"a sample needs at least one row, got {count}")
    if count >= len(labels):
        return np.arange(len(labels))
    classes = _shuffled_classes(labels, seed)
    sizes = [len(indices) for indices in classes]
    quotas = _quotas(sizes, count, [0] * len(sizes), sizes)
    return _first_of_each(classes, quotas)


def canonical(text: str) -> str:
    """A text whatever its case and spacing."""
    return " ".join(text.split()).casefold()


def without_duplicates(texts: Iterable[str], held_out_texts: Iterable[str]) -> tuple[np.ndarray, int]:
    """Leaves out texts that also stand in the held-out data, whatever their case and spacing.

    Args:
        texts: to leave some out of.
        held_out_texts: that none of them may repeat.

    Returns:
        (indices kept, number removed).

    Example:
        >>> without_duplicates(["A  film", "another"], ["a film"])
        (array([1]), 1)
    """
    aside = {digest(canonical(text)) for text in held_out_texts}
    stays = np.fromiter((digest(canonical(text)) not in aside for text in texts), bool)
    kept = np.flatnonzero(stays)
    return kept, len(stays) - len(kept)


class Splittable(Protocol):
    """Examples of any kind, not in memory."""

    @property
    def labels(self) -> Labels:
        """One label an example; each part gets its share of each. One label for all where there are no classes."""
        ...

    def contents(self) -> Iterable[str]:
        """The text of each example, by which one that stands in the data twice is found."""
        ...

    def take(self, rows: np.ndarray) -> Self:
        """Some of them, by their indices (int, ascending)."""
        ...

    def __len__(self) -> int: ...


D = TypeVar("D", bound=Splittable)
Reader = Callable[[str, str], D]
"""Takes (source, the option that names it) of held-out data with a file of its own; returns its examples, checked."""


class Splits(NamedTuple, Generic[D]):
    """The parts, how many examples were removed because a part that is held out has them, too, and how many of those
    kept aside for validation are not used, since a short run has no time for them or --max-eval-samples says so."""

    train: D
    validation: D
    test: D
    duplicates_removed: int
    validation_unused: int


def split(data: D, config: TaskConfig, read: Reader[D]) -> Splits[D]:
    """Keeps validation and, for a comparison, test examples aside, and removes what stands on both sides.

    Args:
        data: all of --data.
        config: whose seed fixes the split; only a `CompareConfig` gets test examples.
        read: reads --eval-data and --test-data.

    Raises:
        InputError: too few examples, or none left to train or validate on.
    """
    check_seed(config)
    train, test = data, data.take(np.arange(0))
    if isinstance(config, CompareConfig):
        options = config.test_data, "--test-data", config.test_fraction, config.max_test_samples
        train, test, _ = _hold_out(train, config, read, *options)
    most = most_validation_examples(config, len(train))
    options = config.eval_data, "--eval-data", config.eval_fraction, most
    train, validation, unused = _hold_out(train, config, read, *options)
    kept, removed = without_duplicates(train.contents(), chain(validation.contents(), test.contents()))
    kept_validation, removed_validation = without_duplicates(validation.contents(), test.contents())
    if not len(kept) or not len(kept_validation):
        raise InputError(f"{config.data}: nothing is left to train on after examples of the held-out data were removed")
    return Splits(train.take(kept), validation.take(kept_validation), test, removed + removed_validation, unused)


def _hold_out(
    data: D,
    config: TaskConfig,
    read: Reader[D],
    source: str | None,
    option: str,
    fraction: float,
    at_most: int | None,
) -> tuple[D, D, int]:
    """(rest, held out, kept aside and not used): from a file of its own, or a stratified part of `data`."""
    if source is not None:
        rest, held_out = data, read(source, option)
    elif len(data) < 2:
        raise InputError(f"{config.data}: one example is too few to keep any aside; add some, or name held-out data")
    else:
        kept, aside = stratified_split(data.labels, fraction, config.seed)
        rest, held_out = data.take(kept), data.take(aside)
    if at_most is None or at_most >= len(held_out):
        return rest, held_out, 0
    used = held_out.take(stratified_sample(held_out.labels, at_most, config.seed))
    return rest, used, len(held_out) - len(used)
