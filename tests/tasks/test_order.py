"""The order of a pass: batches of like length, which come at random; the longest row first."""

from __future__ import annotations

from statistics import fmean

from hypothesis import given
from hypothesis import strategies as st

from loraplus.tasks.data_parallel import OrderByPass


def batches_of(order: OrderByPass, batch_size: int) -> list[list[int]]:
    rows = list(order)
    return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]


@given(st.lists(st.integers(1, 9), max_size=400), st.integers(1, 9), st.integers(0, 99))
def test_a_pass_has_every_row_once_the_longest_first_and_the_same_again(lengths, batch_size, seed):
    order = OrderByPass(lengths, batch_size, lambda: seed)
    rows = list(order)
    assert sorted(rows) == list(range(len(lengths))) and len(order) == len(rows)
    assert not rows or lengths[rows[0]] == max(lengths)
    assert list(order) == rows


def test_each_pass_has_an_order_of_its_own():
    seeds = iter((1, 2, 1))
    order = OrderByPass(range(1, 161), 4, lambda: next(seeds))
    one, other, again = list(order), list(order), list(order)
    assert one == again != other


@given(st.integers(0, 99))
def test_a_batch_holds_rows_of_like_length(seed):
    lengths = [1 + (7 * i) % 60 for i in range(160)]  # laid out in 4 parts of 10 batches
    for batch in batches_of(OrderByPass(lengths, 4, lambda: seed), 4):
        assert max(lengths[i] for i in batch) - min(lengths[i] for i in batch) <= 20


@given(st.integers(0, 99))
def test_the_first_batch_is_as_heavy_as_any_where_nothing_is_padded(seed):
    lengths = [2 ** (i % 9) for i in range(640)]  # each part of 160 has about 18 of the longest
    sums = [sum(lengths[i] for i in batch) for batch in batches_of(OrderByPass(lengths, 16, lambda: seed), 16)]
    assert sums[0] > 0.7 * max(sums)


def test_a_short_run_does_not_end_on_the_shortest_texts():
    lengths = [1 + i % 100 for i in range(1600)]  # 4 parts of 25 batches; looked at are the last ten of the first
    last = [
        fmean(
            lengths[i]
            for batch in batches_of(OrderByPass(lengths, 16, lambda seed=seed: seed), 16)[15:25]
            for i in batch
        )
        for seed in range(20)
    ]
    assert 40 < fmean(last) < 61


def test_the_smaller_batch_at_the_end_of_a_pass_holds_rows_of_any_length():
    lengths = [1 + i % 100 for i in range(1608)]
    last = [fmean(lengths[i] for i in list(OrderByPass(lengths, 16, lambda s=seed: s))[-8:]) for seed in range(40)]
    assert 40 < fmean(last) < 61
