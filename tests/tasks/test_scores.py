"""The scores of answers, held to scikit-learn's."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.metrics import (
    accuracy_score,
    classification_report,
    confusion_matrix,
    f1_score,
    log_loss,
    mean_absolute_error,
    r2_score,
)

from loraplus.tasks.scores import figures, most_frequent, scores

NAMES = ["a", "b|c", "<d>"]


def of(logits, truth, **config):
    given = SimpleNamespace(**{"problem_type": None, "id2label": dict(enumerate(NAMES)), **config})
    return scores(given, logits, truth, lambda number: {"text": f"text {number}"})


def test_scores_of_classes_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    truth, logits = rng.integers(0, 3, 200), rng.normal(size=(200, 3)) * 3
    logits[np.arange(200), truth] += 2
    found, guess = of(logits, truth), logits.argmax(1)
    report = classification_report(truth, guess, target_names=NAMES, output_dict=True)
    for row in found["per_class"]:
        theirs = report[row["label"]]
        assert [row[name] for name in ("precision", "recall", "f1", "support")] == pytest.approx(
            [theirs[name] for name in ("precision", "recall", "f1-score", "support")]
        )
        assert row["predicted"] == np.sum(guess == NAMES.index(row["label"]))
    assert found["accuracy"] == pytest.approx(accuracy_score(truth, guess))
    assert found["macro_f1"] == pytest.approx(f1_score(truth, guess, average="macro"))
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert found["loss"] == pytest.approx(log_loss(truth, probabilities))
    assert found["confusion_matrix"] == confusion_matrix(truth, guess).tolist()
    assert found["learnt"]["learnt"] and found["majority_share"] == np.bincount(truth).max() / 200
    json.dumps(found, allow_nan=False)


def test_mistakes_come_with_the_surest_first_and_what_is_confused_most_is_named():
    logits = np.asarray([[9.0, 0, 0], [3, 0, 0], [0, 5, 0], [0, 0, 1], [2, 0, 0]])
    found = of(logits, np.asarray([1, 1, 1, 2, 2]))
    assert [row["text"] for row in found["mistakes"]] == ["text 0", "text 1", "text 4"]
    assert found["mistakes"][0] | {"probability": None} == {
        "text": "text 0", "truth": "b|c", "prediction": "a", "probability": None
    }  # fmt: skip
    sure = [row["probability"] for row in found["mistakes"]]
    assert sure == sorted(sure, reverse=True) and sure[0] > 0.99
    assert found["confused"][0] == {"truth": "b|c", "prediction": "a", "count": 2}


def test_a_long_text_is_cut_and_many_classes_have_no_matrix():
    names, truth = dict(enumerate(map(str, range(300)))), np.arange(300)
    config = SimpleNamespace(problem_type=None, id2label=names)
    found = scores(config, np.eye(300)[::-1], truth, lambda number: {"text": "x" * 5000})
    assert found["confusion_matrix"] is None and len(found["confused"]) == 20
    assert all(len(row["text"]) == 1000 for row in found["mistakes"])


def test_scores_of_sets_are_those_of_scikit_learn():
    rng = np.random.default_rng(1)
    truth, logits = rng.integers(0, 2, (100, 3)), rng.normal(size=(100, 3))
    found = of(logits, truth, problem_type="multi_label_classification")
    report = classification_report(truth, logits > 0, target_names=NAMES, output_dict=True, zero_division=0)
    assert [row["f1"] for row in found["per_label"]] == pytest.approx([report[name]["f1-score"] for name in NAMES])
    assert found["micro_f1"] == pytest.approx(report["micro avg"]["f1-score"])
    assert found["accuracy"] == pytest.approx(accuracy_score(truth, logits > 0))
    worst = found["mistakes"][0]
    assert worst["label"] in NAMES and (worst["label"] in worst["truth"]) != (worst["label"] in worst["prediction"])
    assert worst["probability"] == pytest.approx(
        (1 / (1 + np.exp(-np.abs(logits[(logits > 0) != (truth > 0)])))).max(), abs=1e-6
    )
    json.dumps(found, allow_nan=False)


def test_scores_of_numbers_are_in_the_scale_of_the_data():
    rng = np.random.default_rng(2)
    truth = rng.normal(100, 20, 80)
    logits = (truth - 100)[:, None] / 20 + rng.normal(size=(80, 1))
    found = of(logits, truth, problem_type="regression", target_mean=100.0, target_deviation=20.0)
    predicted = logits[:, 0] * 20 + 100
    assert found["mae"] == pytest.approx(mean_absolute_error(truth, predicted))
    assert found["r2"] == pytest.approx(r2_score(truth, predicted))
    assert found["loss"] == pytest.approx(found["mse"] / 400)
    sizes = np.abs(predicted - truth)
    assert found["absolute_error"]["median"] == pytest.approx(np.median(sizes))
    assert found["absolute_error"]["largest"] == pytest.approx(sizes.max())
    assert abs(found["mistakes"][0]["error"]) == pytest.approx(sizes.max(), abs=1e-5)
    assert set(figures(found)) == {"loss", "mse", "mae", "r2", "pearson"}


def test_the_most_frequent_class_is_that_of_training_where_it_is_known():
    assert most_frequent(["a", "b"], {"train_class_counts": {"a": 1, "b": 5}}) == 1
    assert most_frequent(["a", "b"], {}) is None
    for damaged in ([5], {"a": "many", "b": 1}, {}, 7):
        assert most_frequent(["a", "b"], {"train_class_counts": damaged}) is None
    truth = np.asarray([0, 0, 0, 1])
    config = SimpleNamespace(problem_type=None, id2label={0: "a", 1: "b"})
    asked = scores(config, np.eye(2)[truth], truth, lambda number: {"text": ""}, frequent=1)
    assert asked["majority_share"] == 0.25
