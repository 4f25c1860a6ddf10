"""The built-in data is what its description says."""

from __future__ import annotations

import random
from dataclasses import replace
from statistics import mean, median

import pytest

from loraplus.bench.prepared import prepare
from loraplus.bench.shapes import EXAMPLES, SHAPES, log_normal_length, make, review_length
from loraplus.tasks.config import TaskConfig


def lengths(shape):
    return [shape.length((i + 0.5) / EXAMPLES) for i in range(EXAMPLES)]


def test_batches_of_32_at_random_hold_three_tenths_real_tokens():
    found = [log_normal_length((i + 0.5) / EXAMPLES) for i in range(EXAMPLES)]
    random.Random(0).shuffle(found)
    padded = sum(32 * max(found[i : i + 32]) for i in range(0, EXAMPLES, 32))
    assert median(found) == 48 and 0.26 < sum(found) / padded < 0.34


def test_reviews_are_as_long_as_those_that_were_measured():
    found = [review_length((i + 0.5) / EXAMPLES) for i in range(EXAMPLES)]
    assert median(found) == 26 and 26 < mean(found) < 28 and max(found) <= 79


@pytest.mark.parametrize("name", ["reviews", "masked"])
def test_texts_have_just_the_tokens_that_they_should(name, tmp_path, monkeypatch):
    shape = replace(SHAPES[name], words=600)
    prepared = prepare(TaskConfig(**make(shape, tmp_path, seed=0)), batches=50)
    read = sorted(len(row["input_ids"]) for row in prepared.data.train)
    off = [abs(a - b) for a, b in zip(read, sorted(lengths(shape)), strict=True)]
    assert max(off) <= 1
    if name == "masked":
        learnt = sum(label != -100 for row in prepared.data.train for label in row["labels"])
        assert learnt / sum(read) == pytest.approx(0.25, abs=0.02)
    # A turn's batches are as long as the pool's.
    assert mean(prepared.with_batches(5).lengths) == pytest.approx(mean(prepared.lengths), rel=0.1)
