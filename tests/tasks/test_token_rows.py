"""Tokenised rows are those of the tokenizer, however they are held and cut."""

from __future__ import annotations

import hashlib
import json

import pytest
from transformers import AutoTokenizer

from loraplus.tasks import classification, token_rows
from loraplus.tasks.classification import LabelledTexts, _fingerprint
from loraplus.tasks.token_rows import tokenised

TEXTS = ["good", "the film was good and bright", "bad " * 20, "a dull plot", "", "great"]
LABELS = [1, 0, 1, 0, 1, 0]


@pytest.fixture
def tokenizer(model_folder):
    return AutoTokenizer.from_pretrained(model_folder)


@pytest.mark.parametrize("at_once", [1, 2, 1000])
@pytest.mark.parametrize("length", [3, 8, 30])
def test_rows_are_what_the_tokenizer_makes_of_all_at_once(tokenizer, monkeypatch, at_once, length):
    monkeypatch.setattr(token_rows, "AT_ONCE", at_once)
    wanted = tokenizer(TEXTS, truncation=True, max_length=length)["input_ids"]
    rows = tokenised(TEXTS, LABELS, tokenizer).cut(TEXTS, tokenizer, length)
    assert rows[:] == [{"input_ids": ids, "labels": y} for ids, y in zip(wanted, LABELS, strict=True)]
    assert rows[-1] == rows[len(TEXTS) - 1] and len(rows) == len(TEXTS)
    assert rows.lengths.tolist() == list(map(len, wanted))
    assert rows.largest == max(map(max, tokenizer(TEXTS)["input_ids"]))  # of the whole texts
    assert tokenised(TEXTS, LABELS, tokenizer, length)[:] == rows[:]
    assert rows.by_length()[:] == sorted(rows, key=lambda row: len(row["input_ids"]))


def test_nothing_is_no_rows(tokenizer):
    rows = tokenised([], [], tokenizer, 8)
    assert len(rows.by_length()) == 0 and rows[:] == [] and rows.largest == 0


@pytest.mark.parametrize("count", [0, 1, 3, 4, 7])
def test_a_long_list_has_the_hash_that_its_json_has(monkeypatch, count):
    monkeypatch.setattr(classification, "_HASHED_AT_ONCE", 3)
    splits = [LabelledTexts([f'é "{i}"' for i in range(n)], ["x"] * n, "t", "l") for n in (count, 0, 2 * count)]
    content = [[split.texts, split.labels] for split in splits]
    assert _fingerprint(*splits) == hashlib.sha256(json.dumps(content).encode()).hexdigest()
