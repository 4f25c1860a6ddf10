"""What is seen of data and settings before training: the table, and every doubt with what to do about it."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from language import chat_rows, write_lines

from loraplus.tasks import seen as module
from loraplus.tasks.config import CompareConfig, TaskConfig, TrainConfig
from loraplus.tasks.doubts import doubts_of_settings
from loraplus.tasks.look import look, seen_of_run
from loraplus.tasks.seen import (
    doubts_of_encoding,
    doubts_of_labels,
    doubts_of_size,
    doubts_of_table,
    near_equal,
    repeats,
)
from loraplus.tasks.splits import canonical
from loraplus.tasks.streamed import Labels
from loraplus.tasks.table import Table
from loraplus.tasks.task import task_of


def test_repeats_and_contradictions_are_those_of_a_plain_count():
    draw = np.random.default_rng(0)
    for _ in range(50):
        texts = [f"text  {i}" if upper else f"TEXT {i}" for i, upper in draw.integers(0, [9, 2], (20, 2))]
        codes = draw.integers(0, 3, 20)
        by_text: dict[str, list[int]] = {}
        for row, text in enumerate(texts):
            by_text.setdefault(canonical(text), []).append(row)
        found = repeats(texts, codes)
        assert found.repeated == 20 - len(by_text)
        several = [rows for rows in by_text.values() if len({codes[row] for row in rows}) > 1]
        assert found.contradicted == len(several)
        if several:
            one, other = found.first
            assert canonical(texts[one]) == canonical(texts[other]) and codes[one] != codes[other]
        assert repeats(texts).repeated == found.repeated and repeats(texts).first is None


def test_a_huge_table_is_looked_at_in_part(monkeypatch):
    monkeypatch.setattr(module, "MOST_LOOKED_AT", 5)
    assert repeats(iter(["a"] * 100)).looked_at == 5
    assert "among the first 5" in module.repeats_row(repeats(["a"] * 100), 0)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["Democratic", "DEMOCRATIC", "green"], [["DEMOCRATIC", "Democratic"]]),
        (["sci-fi", "sci fi", "SciFi", "drama"], [["SciFi", "sci fi", "sci-fi"]]),
        (["ﬁne", "fine"], [["fine", "ﬁne"]]),
        (["straße", "STRASSE"], [["STRASSE", "straße"]]),
        (["1", "-1", "0"], []),
        (["c", "c++", "c#"], []),
        (["good", "Good.", "non_fiction", "non-fiction"], [["Good.", "good"], ["non-fiction", "non_fiction"]]),
        (["+", "-", "?"], []),
        (["a", "b"], []),
    ],
)  # fmt: skip
def test_labels_that_are_nearly_equal_are_found(labels, expected):
    assert near_equal(labels) == expected


@pytest.mark.parametrize(
    ("names", "text", "label", "doubtful"),
    [
        (["text", "label"], "text", "label", False),
        (["Review of the film", "Sentiment"], "Review of the film", "Sentiment", True),
        (["What did you like about it?", "label"], "What did you like about it?", "label", False),
        (["a fine film", "good"], "a fine film", "good", True),
        (["a fine film", "1"], "a fine film", "1", True),
        (["0", "1", "text"], "text", "1", True),
        (["fine", "class"], "fine", "class", False),
    ],
)
def test_a_header_that_reads_like_a_row_is_questioned(names, text, label, doubtful):
    found = doubts_of_table(Table("d.csv", {name: ["x"] for name in names}), text, [label], ["good", "bad", "1"])
    assert [("put a row of names above it" in doubt) for doubt in found] == [True] * doubtful


def test_a_guessed_encoding_is_shown_by_a_text_that_it_matters_for():
    table = Table("d.csv", {"id": [1, 2], "text": ["plain", "schön"]}, read_as=("cp1252, guessed",))
    (doubt,) = doubts_of_encoding(table)
    assert "cp1252" in doubt and "“schön”" in doubt and "--encoding" in doubt
    assert not doubts_of_encoding(Table("d.csv", {"text": ["schön"]}, read_as=("cp1252",)))


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["a"] * 5 + ["b"], ["classes with one example: 'b'"]),
        (["a"] * 95 + ["b"] * 5, ["95.0% of the rows are of the class 'a'"]),
        ([str(i // 2) for i in range(60)], ["30 classes among 60 rows .*--task regression"]),
        ([f"n{i // 2}" for i in range(60)], ["30 classes among 60 rows .*--label-column"]),
        (["a", "b", "a|b"] * 3, ["labels such as 'a.b' .*--task multi-label"]),
        (["Yes", "yes", "no"] * 3, ["nearly equal .*'Yes' \\(3\\), 'yes' \\(3\\)"]),
        (["a", "b"] * 9, []),
    ],
)
def test_classes_that_are_doubtful_are_named(labels, expected):
    found = doubts_of_labels(Labels.of(labels), len(labels))
    assert len(found) == len(expected)
    for doubt, pattern in zip(found, expected, strict=True):
        assert re.search(pattern, doubt)


@pytest.mark.parametrize(
    ("config", "flags"),
    [
        (TrainConfig(lr=10.0), ["--lr 10 "]),
        (TrainConfig(lr=0.04, lr_ratio=32.0), ["--lr-ratio 32"]),
        (TrainConfig(lr=1e-9), ["--lr 1e-09 is so small"]),
        (TrainConfig(lr="auto"), []),
        (TrainConfig(), []),
        (TrainConfig(lr_head=3.0), ["--lr-head 3"]),
        (TrainConfig(task="lm"), []),
        (CompareConfig(untuned_lr=5.0), ["--untuned-lr 5 "]),
        (TaskConfig(lora_dropout=0.9, warmup_ratio=0.8, weight_decay=5.0, eval_fraction=0.7, alpha=4e3),
         ["--lora-dropout 0.9", "--warmup-ratio 0.8", "--weight-decay 5", "--eval-fraction 0.7", "--alpha over"]),
    ],
)  # fmt: skip
def test_settings_that_are_doubtful_are_questioned(config, flags):
    found = doubts_of_settings(config, 100, 1000)
    assert len(found) == len(flags) and all(flag in doubt for flag, doubt in zip(flags, found, strict=True))


@pytest.mark.parametrize(
    ("steps", "examples", "expected"),
    [(100, 1000, []), (3, 1000, ["3 steps"]), (1000, 100, ["320 times"]), (20, 20, ["--batch-size 32"])],
)
def test_lengths_that_are_doubtful_are_questioned(steps, examples, expected):
    found = doubts_of_settings(TrainConfig(), steps, examples)
    assert len(found) == len(expected) and all(text in doubt for text, doubt in zip(expected, found, strict=True))


def test_chats_that_are_learnt_whole_are_told_with_the_flag_for_answers_alone(tmp_path, decoder_folder):
    data = write_lines(tmp_path / "chats.jsonl", chat_rows(60))
    for on, told in ((None, True), ("assistant", False)):
        config = TrainConfig(task="sft", model=str(decoder_folder), data=str(data), output="o", loss_on=on)
        task = task_of(config)
        tokenizer = task.load_tokenizer(config)
        found = seen_of_run(config, task.load_data(config, tokenizer))
        assert any("--loss-on assistant" in doubt for doubt in found.doubts) == told
        assert found.rows["columns"] == "messages 'messages': conversation"


def test_what_is_looked_at_is_not_trained_and_nothing_is_written(tmp_path, model_folder, reviews_csv, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = TrainConfig(model=str(model_folder), data=str(reviews_csv), output=str(tmp_path / "out"), max_steps=40)
    found = look(config)
    assert not list(tmp_path.iterdir())
    assert found.rows["classes"] == "2: negative 200, positive 200" and "400 rows" in found.rows["data"]
    assert "40 of 32 examples" in found.rows["steps"] and "s a step" in found.rows["time"]
    assert json.loads(json.dumps(found.to_dict()))["rows"] == found.rows


def test_few_validation_examples_are_questioned_in_the_words_of_the_task():
    (of_labels,), (of_numbers,) = (doubts_of_size(0, 270, 30, False, of_labels) for of_labels in (True, False))
    assert "accuracy to about ±18 points" in of_labels
    assert "accuracy" not in of_numbers and "--eval-fraction" in of_numbers
    (unused,) = doubts_of_size(0, 360, 32, False, unused=8)
    assert "--max-eval-samples" in unused and "--eval-fraction" not in unused


def test_examples_that_a_short_run_does_not_validate_on_are_counted_with_the_flag_that_takes_them(
    model_folder, reviews_csv
):
    for more, told in (
        ({}, "360 to train on, 32 of 40 to validate (all would take over a fifth of so short a run; "
             "--max-eval-samples 40 takes all)"),
        ({"max_eval_samples": 20}, "360 to train on, 20 of 40 to validate (as --max-eval-samples says)"),
        ({"max_eval_samples": 40}, "360 to train on, 40 to validate"),
    ):  # fmt: skip
        config = TrainConfig(model=str(model_folder), data=str(reviews_csv), output="o", max_steps=4, **more)
        task = task_of(config)
        assert task.load_data(config, task.load_tokenizer(config)).seen.rows["split"] == told
