"""The command that each command ends with: it can be copied, whatever the paths are called."""

from __future__ import annotations

import shlex

import pytest

from loraplus.cli.next_step import after_compare, after_evaluate, after_merge, after_predict, after_train, free_path
from loraplus.tasks.config import CompareConfig, TrainConfig

FOLDER, DATA = "my runs/it's", "-data of mine.csv"


def config(**more):
    return TrainConfig(**{"model": "m", "data": DATA, "output": FOLDER, "text_column": "a b", **more})


@pytest.mark.parametrize(
    "step, expected",
    [
        (after_train(config(), {}), ["predict", "--data", DATA, "--output", f"{FOLDER}/predictions.csv"]),
        (after_train(config(eval_data="e f"), {}), ["evaluate", "--data", "e f", "--adapter", FOLDER]),
        (after_train(config(task="sft"), {}), ["generate", "--adapter", FOLDER]),
        (
            after_train(config(), {"learnt": {"learnt": False}}),
            ["tune", "--model", "m", "--data", DATA, "--output", f"{FOLDER}-tune", "--text-column", "a b"],
        ),
        (after_predict(FOLDER, "n o", True), ["merge", "--output", f"{FOLDER}-merged", "--model", "n o"]),
        (after_evaluate(FOLDER, DATA, label_column="l m"), ["predict", "--label-column", "l m", "--adapter", FOLDER]),
        (after_merge(FOLDER, "CAUSAL_LM"), ["generate", "--model", FOLDER]),
    ],
)
def test_paths_are_quoted_and_flags_are_kept(step, expected):
    name, *words = expected
    line = shlex.split(step[1])
    assert line[:2] == ["loraplus", name]
    for word in words:
        assert word in line
    assert "None" not in step[1]


def test_a_merged_classifier_is_tried_with_transformers_alone():
    words = shlex.split(after_merge('a "b"', "SEQ_CLS")[1])
    assert words[:2] == ["python", "-c"]
    compile(words[2], "next", "exec")
    assert '"./a \\"b\\""' in words[2]


def test_a_comparison_trains_with_the_better_rates_or_searches_where_nothing_was_learnt():
    def arm(loss, lr):
        return {"test": {"loss": {"mean": loss}}, "best": {"lr": lr, "lr_ratio": 4.0}}

    compared = CompareConfig(model="m", data="d e.csv", output="o p")
    summary = {"arms": {"lora": arm(0.5, 1e-3), "loraplus": arm(0.25, 2e-3), "auto": arm(0.1, 1.0)}}
    words = shlex.split(after_compare(compared, summary)[1])
    assert words[:2] == ["loraplus", "train"] and words[words.index("--lr") + 1] == "0.002"
    assert "o p/adapter" in words and "--tuning-runs" not in words
    nothing = after_compare(compared, summary | {"learning": {"nothing": ["lora", "loraplus"]}})
    assert shlex.split(nothing[1])[:2] == ["loraplus", "tune"]


def test_what_is_there_is_not_in_the_way(tmp_path):
    path = tmp_path / "p.csv"
    assert free_path(str(path)) == str(path)
    path.touch()
    assert free_path(str(path)) == str(tmp_path / "p-2.csv")
