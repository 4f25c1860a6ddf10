"""Examples on disk are the examples that were written, whole, cut, dropped or split."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplus.errors import InputError
from loraplus.tasks import target_rows
from loraplus.tasks.config import CUT, DROP, LONG_EXAMPLES, SPLIT
from loraplus.tasks.target_rows import IGNORED, Encoded, TargetRows, fit, how_to_fit

EXAMPLES = st.lists(
    st.lists(st.tuples(st.integers(0, 2**31 - 1), st.integers(0, 1)), max_size=12).map(
        lambda tokens: Encoded([token for token, _ in tokens], [learnt for _, learnt in tokens])
    ),
    max_size=12,
)


def written(examples, at_once=3):
    parts = [examples[start : start + at_once] for start in range(0, len(examples), at_once)]
    return TargetRows.of(parts, len(examples))


def row(ids, labels):
    return {"input_ids": list(ids), "labels": [IGNORED, *labels[1:]]}


def rows_by_hand(examples, length, how):
    """One example after the other: (rows, longer, cut, dropped)."""
    found, longer, cut, dropped = [], 0, 0, 0
    for example in examples:
        ids, labels = example.ids, example.labels
        parts = [(0, len(ids))]
        if len(ids) > length:
            longer += 1
            cut += (len(ids) - length) * (how == CUT)
            starts = {CUT: [0], DROP: [], SPLIT: range(0, len(ids) - 1, length - 1)}[how]
            parts = [(start, start + length) for start in starts]
        kept = [row(ids[start:end], labels[start:end]) for start, end in parts]
        kept = [part for part in kept if any(label != IGNORED for label in part["labels"])]
        dropped += not kept
        found += kept
    return found, longer, cut, dropped


def test_a_label_is_its_token_where_it_is_learnt_and_never_at_the_first():
    rows = written([Encoded([5, 0, 7], [1, 1, 0]), Encoded([3], [1])])
    assert rows[:] == [row([5, 0, 7], [5, 0, IGNORED]), row([3], [3])]
    assert Encoded([5, 0, 7], [1, 1, 0]).labels == rows[0]["labels"] == [IGNORED, 0, IGNORED]


@pytest.mark.parametrize("how", LONG_EXAMPLES)
@settings(max_examples=60)
@given(examples=EXAMPLES, length=st.integers(2, 6), tokens=st.integers(1, 9), rows=st.integers(1, 5))
def test_examples_are_fitted_as_if_one_by_one_whatever_is_read_at_once(how, examples, length, tokens, rows):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target_rows, "_TOKENS_AT_ONCE", tokens)
        patch.setattr(target_rows, "_ROWS_AT_ONCE", rows)
        found = fit(written(examples), length, how)
    wanted = rows_by_hand(examples, length, how)
    assert (found.rows[:], found.longer, found.cut, found.dropped) == wanted
    assert found.targets == sum(label != IGNORED for each in wanted[0] for label in each["labels"])
    assert found.largest == max((token for each in wanted[0] for token in each["input_ids"]), default=0)
    assert found.rows.by_length()[:] == sorted(wanted[0], key=lambda each: len(each["input_ids"]))


def test_what_is_learnt_comes_from_the_examples_that_stay():
    found = fit(written([Encoded([1, 2, 9], [0, 1, 1]), Encoded([4], [1]), Encoded([5, 6], [1, 0])]), 2, CUT)
    assert (found.rows[:], found.dropped, found.largest) == ([row([1, 2], [IGNORED, 2])], 2, 2)


def test_long_texts_are_split_and_long_chats_cut_unless_told_otherwise():
    assert (how_to_fit(None, "lm", "text"), how_to_fit(None, "sft", "text"), how_to_fit(DROP, "lm", "text")) == (
        SPLIT, CUT, DROP,
    )  # fmt: skip
    with pytest.raises(InputError, match="split is for texts"):
        how_to_fit(SPLIT, "sft", "conversation")
