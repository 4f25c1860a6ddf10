"""Splits: stratified, fixed by the seed, and without shared texts."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplus.errors import InputError
from loraplus.tasks.splits import stratified_sample, stratified_split, without_duplicates

LABELS = ["a"] * 60 + ["b"] * 30 + ["c"] * 10


def test_a_split_keeps_the_proportions_and_is_fixed_by_the_seed():
    kept, held_out = stratified_split(LABELS, 0.2, seed=3)
    assert Counter(LABELS[i] for i in held_out) == {"a": 12, "b": 6, "c": 2}
    assert sorted([*kept, *held_out]) == list(range(100))
    again, other = (stratified_split(LABELS, 0.2, seed=seed)[1] for seed in (3, 4))
    assert again.tolist() == held_out.tolist() != other.tolist()


@given(st.lists(st.sampled_from("abcd"), min_size=4, max_size=60), st.floats(0.05, 0.95), st.integers(0, 5))
def test_every_class_with_two_rows_stands_on_both_sides(labels, fraction, seed):
    counts = Counter(labels)
    if max(counts.values()) < 2:
        return
    kept, held_out = stratified_split(labels, fraction, seed)
    assert sorted([*kept, *held_out]) == list(range(len(labels)))
    for name, count in counts.items():
        sides = {name in {labels[i] for i in side} for side in (kept, held_out)}
        assert sides == ({True} if count > 1 else {True, False})


def test_a_sample_keeps_the_proportions():
    sample = stratified_sample(LABELS, 20, seed=0)
    assert Counter(LABELS[i] for i in sample) == {"a": 12, "b": 6, "c": 2}
    assert stratified_sample(LABELS, 1000, seed=0).tolist() == list(range(100))


def test_a_sample_of_no_rows_is_refused():
    with pytest.raises(InputError, match="at least one row"):
        stratified_sample([], 0, seed=0)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan")])
def test_a_part_outside_zero_and_one_is_refused(fraction):
    with pytest.raises(InputError, match="between 0 and 1"):
        stratified_split(LABELS, fraction, seed=0)


def test_nothing_can_be_held_out_of_single_rows():
    with pytest.raises(InputError, match="too few"):
        stratified_split(["a", "b", "c"], 0.5, seed=0)


def test_texts_of_the_held_out_data_are_removed_whatever_their_case_and_spacing():
    kept, removed = without_duplicates(["One  film ", "two", "ONE FILM", "three"], ["one film", "four"])
    assert (kept.tolist(), removed) == ([1, 3], 2)
