"""Numbers and sets of labels as targets: what is read, what is refused, what is learnt and measured."""

from __future__ import annotations

import random

import numpy as np
import pytest
from sklearn import metrics as sklearn
from transformers import AutoConfig

from loraplus.errors import InputError
from loraplus.tasks.multi_label import multi_label_metrics
from loraplus.tasks.regression import regression_metrics
from loraplus.tasks.table import Table
from loraplus.tasks.targets import labelled_sets, numbered_texts


def table(**columns):
    return Table("d.csv", columns, lines=list(range(2, 2 + len(next(iter(columns.values()))))))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["1", "2.5", "-3e1"], [1, 2.5, -30]),
        ([1, 2.5, True], [1, 2.5, 1]),
        (["1,5", "2", "-0,25"], [1.5, 2, -0.25]),
        ([" 7 ", "8", "9"], [7, 8, 9]),
    ],
)
def test_numbers_are_read_however_they_are_written(values, expected):
    assert numbered_texts(table(text=["a", "b", "c"], score=values)).targets.tolist() == expected


@pytest.mark.parametrize(
    ("columns", "options", "expected"),
    [
        (
            {"text": ["a", "b"], "score": ["1", "good"]},
            {},
            "d.csv, line 3: the target 'good' in column 'score' is no number",
        ),
        ({"text": ["a", "b"], "score": ["1", "inf"]}, {}, "line 3: the target 'inf'"),
        ({"text": ["a", "b"], "score": ["1", " "]}, {}, "target .*missing in 1 of 2 rows, first in line 3"),
        ({"text": ["a", "b"], "score": ["1,234", "2,500"]}, {}, "'score' has numbers such as 1,234, whose comma"),
        ({"text": ["a", "b"], "p": [1, 2], "q": [1, 2]}, {}, "cannot tell which column is the target.*--label-column"),
        ({"text": ["a", "b"], "p": [1, 2]}, {"target_column": "x"}, "no column 'x' \\(--label-column\\)"),
        ({"text": ["a", "b"], "p": [[1], 2]}, {"target_column": "p"}, "line 2: the target .* is a list"),
    ],
)
def test_what_is_no_number_is_one_line(columns, options, expected):
    with pytest.raises(InputError, match=expected):
        numbered_texts(table(**columns), **options)


def test_the_only_column_of_numbers_is_the_target():
    found = numbered_texts(table(words=["a b", "c d"], who=["x", "y"], how_much=[1, 2]))
    assert found.target_columns == ("how_much",)


SETS = [["drama", "war"], [], ["comedy"]]


@pytest.mark.parametrize(
    "columns",
    [
        {"tags": SETS},
        {"tags": ["drama|war", "", "comedy"]},
        {"labels": ["war; drama", None, "comedy"]},
        {"genres": ["drama,war", " ", "comedy"]},
        {"topics": ['["war", "drama"]', "[]", '["comedy"]']},
        {"comedy": [0, 0, 1], "drama": [1, 0, 0], "war": ["1", "0", "0"]},
    ],
)
def test_sets_of_labels_are_read_however_they_are_written(columns):
    found, names = labelled_sets(table(text=["a", "b", "c"], **columns))
    assert names == ["comedy", "drama", "war"] and found.targets.tolist() == [[0, 1, 1], [0, 0, 0], [1, 0, 0]]


def test_columns_of_0_and_1_can_be_named():
    found, names = labelled_sets(table(text=["a", "b"], id=[0, 1], p=[0, 1], q=[1, 1]), label_column="q, p")
    assert names == ["q", "p"] and found.targets.tolist() == [[1, 0], [1, 1]]


@pytest.mark.parametrize(
    ("columns", "options", "expected"),
    [
        ({"tags": ["a", "a"]}, {}, "one label only \\(a\\)"),
        ({"tags": ["", ""]}, {}, "one label only \\(none\\)"),
        ({"tags": [{"a": 1}, "b"]}, {}, "line 2: the labels \\(column 'tags'\\) are no list"),
        ({"tags": ["[1", "b"]}, {}, "line 2: the labels .* not valid JSON"),
        ({"p": [0, 1], "q": [1, 2]}, {"label_column": "p,q"}, "line 3: column 'q' holds '2', expected 0 or 1"),
        ({"p": [0, 1], "q": [1, 2]}, {"label_column": "p,r"}, "no column 'r' \\(--label-column\\)"),
        ({"p": [0, 1], "q": [1, 2]}, {}, "cannot tell where the labels are.*--label-column"),
        ({"tags": ["a", "b"]}, {"names": ["a", "c"]}, "line 3: a label that the training data lacks: 'b'"),
    ],
)
def test_what_is_no_set_of_labels_is_one_line(columns, options, expected):
    with pytest.raises(InputError, match=expected):
        labelled_sets(table(text=["x y", "z"], **columns), **options)


def test_measures_are_those_of_scikit_learn():
    draw = np.random.default_rng(0)
    truth, guess = draw.normal(size=50), draw.normal(size=50)
    ours = regression_metrics(guess, truth)
    assert ours["mse"] == pytest.approx(sklearn.mean_squared_error(truth, guess))
    assert ours["mae"] == pytest.approx(sklearn.mean_absolute_error(truth, guess))
    assert ours["r2"] == pytest.approx(sklearn.r2_score(truth, guess))
    assert ours["pearson"] == pytest.approx(np.corrcoef(truth, guess)[0, 1])
    there, said = draw.random((50, 4)) < 0.4, draw.random((50, 4)) < 0.4
    there[:, 3] = said[:, 3] = False
    ours = multi_label_metrics(said, there)
    for kind in ("micro", "macro"):
        assert ours[f"{kind}_f1"] == pytest.approx(sklearn.f1_score(there, said, average=kind, zero_division=0))
    assert ours["accuracy"] == pytest.approx(sklearn.accuracy_score(there, said))


def test_a_constant_has_no_correlation():
    assert regression_metrics(np.ones(3), np.asarray([1.0, 2.0, 3.0]))["pearson"] == 0
    assert regression_metrics(np.asarray([1.0, 2.0]), np.ones(2))["r2"] == 0


def scores_csv(path):
    """Texts whose number says how many good and bad words are in them, far from 0 and from a spread of 1."""
    draw, lines = random.Random(0), []
    for _ in range(300):
        words = [draw.choice(["good", "bad", "film", "plot", "the"]) for _ in range(8)]
        lines.append(f"{' '.join(words)};{1000 + 50 * (words.count('good') - words.count('bad'))},5")
    path.write_text("text;score\n" + "\n".join(lines) + "\n")
    return path


def test_regression_learns_and_predicts_in_the_scale_of_the_data(tmp_path, model_folder):
    from loraplus.tasks.config import TrainConfig
    from loraplus.tasks.predict import load_adapter, predict
    from loraplus.tasks.train import train

    config = TrainConfig(
        task="regression", model=str(model_folder), data=str(scores_csv(tmp_path / "d.csv")),
        output=str(tmp_path / "out"), max_steps=150, batch_size=16, lr=5e-3, lr_ratio=4, eval_fraction=0.2,
        target_modules="all-linear",
    )  # fmt: skip
    metrics = train(config)
    assert metrics["eval_mse"] == pytest.approx(
        metrics["eval_loss"] * metrics["data"]["target_deviation"] ** 2, rel=1e-4
    )
    assert metrics["eval_r2"] > 0.5 and metrics["eval_pearson"] > 0.7
    assert AutoConfig.from_pretrained(tmp_path / "out").problem_type == "regression"
    low, high = predict(
        *load_adapter(str(tmp_path / "out")), ["bad bad bad film plot the", "good good good film plot the"]
    )
    assert 700 < low["prediction"] < high["prediction"] < 1300 and low.keys() == {"prediction"}
