"""Splits that keep the proportions of the classes, are fixed by a seed, and share no text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from loraplus.errors import InputError
from loraplus.tasks.config import CompareConfig, TaskConfig
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
    """The indices of every class, each in an order fixed by the seed."""
    generator = np.random.default_rng(seed)
    return [generator.permutation(rows) for rows in Labels.of(labels).classes()]


def _quotas(sizes: Sequence[int], total: int, least: Sequence[int], most: Sequence[int]) -> list[int]:
    """Whole shares of `total` in proportion to `sizes`, within bounds, by largest remainder."""
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


def _canonical(text: str) -> str:
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
    aside = {digest(_canonical(text)) for text in held_out_texts}
    stays = np.fromiter((digest(_canonical(text)) not in aside for text in texts), bool)
    kept = np.flatnonzero(stays)
    return kept, len(stays) - len(kept)
