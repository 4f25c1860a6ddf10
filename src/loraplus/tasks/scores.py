"""The scores of a model on labelled texts: figures, each class or label, and the most confident mistakes.

`train`, `predict` and `evaluate` all use these, so they say the same of the same answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from loraplus.tasks.config import CLASSIFICATION, MULTI_LABEL, REGRESSION
from loraplus.tasks.learnt import chance_p, learnt_record, product
from loraplus.tasks.metrics import (
    classification_metrics,
    confusion,
    losses_of_classes,
    losses_of_sets,
    multi_label_metrics,
    of_each,
    regression_metrics,
)
from loraplus.tasks.targets import SEPARATOR

FIGURES = {
    "loss": "loss", "accuracy": "accuracy", "micro_f1": "micro-F1", "macro_f1": "macro-F1",
    "mse": "mean squared error", "mae": "mean absolute error", "r2": "R²", "pearson": "Pearson's r",
}  # fmt: skip
"""{name of a figure in scores.json: its title}, in the order shown; metrics.json has `eval_` before the name."""
_MOST_MISTAKES = 20
_LONGEST_TEXT = 1000  # characters of a mistake that are kept
_OVER = "the examples"
_PARTS = (0.5, 0.9, 1.0)

Example = Callable[[int], dict[str, str]]
"""{"text"}, and where it stands if that is known, of an example by its number."""


def scores(
    config: Any, logits: np.ndarray, truth: np.ndarray, example: Example, *, frequent: int | None = None
) -> dict[str, Any]:
    """What a model's outputs are worth, whatever its task.

    Args:
        config: of the model, with `problem_type` and `id2label`; of numbers `target_mean` and `target_deviation`.
        logits: (examples, outputs).
        truth: indices of classes (examples,), numbers in the data's own scale (examples,), or ones and zeros
            (examples, labels).
        example: says of one by its number what is shown of it if it is a mistake: {"text", …}.
        frequent: index of the class that was most frequent in training. Default: the one that is most frequent here.

    Returns:
        "task", "examples", its `FIGURES`, "learnt", and
        of classes "majority_share", "labels", "per_class", "confusion_matrix", "confused", "mistakes";
        of sets of labels "labels", "per_label", "mistakes";
        of numbers "absolute_error" and "mistakes", the largest misses.
    """
    logits = np.asarray(logits, np.float64)
    problem = getattr(config, "problem_type", None)
    if problem == "regression":
        return _of_numbers(config, logits, truth, example)
    names = [config.id2label[index] for index in range(logits.shape[1])]
    if problem == "multi_label_classification":
        return _of_sets(names, logits, truth > 0.5, example)
    return _of_classes(names, logits, truth, example, frequent)


def figures(scored: Mapping[str, Any]) -> dict[str, float]:
    """The `FIGURES` among some scores."""
    return {name: scored[name] for name in FIGURES if name in scored}


def most_frequent(names: Sequence[str], facts: Mapping[str, Any]) -> int | None:
    """The index of the class that is most frequent in training, if the facts of the data tell."""
    counts = facts.get("train_class_counts")
    if not isinstance(counts, Mapping) or not all(isinstance(count, int) for count in counts.values()):
        return None
    return max(range(len(names)), key=lambda index: counts.get(names[index], 0)) if counts else None


def in_data_scale(config: object, outputs: np.ndarray) -> np.ndarray:
    """The numbers that outputs of any shape stand for, (examples,)."""
    mean, deviation = getattr(config, "target_mean", 0.0), getattr(config, "target_deviation", 1.0)
    return np.asarray(outputs, np.float64).reshape(-1) * deviation + mean


def _of_classes(
    names: list[str], logits: np.ndarray, truth: np.ndarray, example: Example, frequent: int | None
) -> dict[str, Any]:
    """Scores of logits (examples, classes) by true classes (examples,)."""
    truth = truth.astype(np.int64)
    guess = logits.argmax(axis=1)
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities = shifted / shifted.sum(axis=1, keepdims=True)
    count = [np.bincount(indices, minlength=len(names)) for indices in (guess[guess == truth], truth, guess)]
    most = int(count[1].argmax()) if frequent is None else frequent
    sure, wrong = probabilities.max(axis=1), np.flatnonzero(guess != truth)
    return {
        "task": CLASSIFICATION,
        "examples": len(truth),
        "loss": float(losses_of_classes(logits, truth).mean()),
        **classification_metrics(guess, truth),
        "majority_share": float(np.mean(truth == most)),
        "learnt": learnt_record(chance_p(guess, truth), _OVER),
        "labels": names,
        "per_class": of_each(names, *count),
        **confusion(names, guess, truth),
        "mistakes": [
            {
                **_shown(example(place)),
                "truth": names[truth[place]],
                "prediction": names[guess[place]],
                "probability": round(float(sure[place]), 6),
            }
            for place in _first(wrong, -sure[wrong])
        ],
    }


def _of_sets(names: list[str], logits: np.ndarray, truth: np.ndarray, example: Example) -> dict[str, Any]:
    """Scores of logits (examples, labels) by booleans (examples, labels)."""
    said = logits > 0
    hits, support, guesses = (bits.sum(axis=0) for bits in (said & truth, truth, said))
    # How sure the model is of its answer to each label: the sigmoid of the logit's size.
    sure = np.where(said != truth, 1 / (1 + np.exp(-np.abs(logits))), 0.0)
    worst, wrong = sure.argmax(axis=1), np.flatnonzero((said != truth).any(axis=1))

    def joined(bits: np.ndarray) -> str:
        return SEPARATOR.join(name for name, bit in zip(names, bits, strict=True) if bit)

    return {
        "task": MULTI_LABEL,
        "examples": len(truth),
        "loss": float(losses_of_sets(logits, truth).mean()),
        **multi_label_metrics(said, truth),
        "learnt": learnt_record(chance_p(said, truth), _OVER),
        "labels": names,
        "per_label": of_each(names, hits, support, guesses),
        "mistakes": [
            {
                **_shown(example(place)),
                "truth": joined(truth[place]),
                "prediction": joined(said[place]),
                "label": names[worst[place]],
                "probability": round(float(sure[place, worst[place]]), 6),
            }
            for place in _first(wrong, -sure.max(axis=1)[wrong])
        ],
    }


def _of_numbers(config: object, logits: np.ndarray, truth: np.ndarray, example: Example) -> dict[str, Any]:
    """Scores of outputs (examples, 1) by numbers (examples,) in the data's own scale."""
    predicted, truth = in_data_scale(config, logits), truth.reshape(-1)
    errors = predicted - truth
    sizes = np.abs(errors)
    measured = regression_metrics(predicted, truth)
    median, most, largest = np.quantile(sizes, _PARTS).tolist()
    return {
        "task": REGRESSION,
        "examples": len(truth),
        "loss": measured["mse"] / getattr(config, "target_deviation", 1.0) ** 2,
        **measured,
        "learnt": learnt_record(chance_p(predicted, truth - truth.mean(), product), _OVER),
        "absolute_error": {"median": median, "percentile_90": most, "largest": largest},
        "mean_error": float(errors.mean()),
        "mistakes": [
            {
                **_shown(example(place)),
                "truth": float(truth[place]),
                "prediction": round(float(predicted[place]), 6),
                "error": round(float(errors[place]), 6),
            }
            for place in _first(np.arange(len(truth)), -sizes)
        ],
    }


def _first(places: np.ndarray, order: np.ndarray) -> list[int]:
    """The places (n,) with the smallest `order` (n,), few enough to read."""
    return places[np.argsort(order, kind="stable")[:_MOST_MISTAKES]].tolist()


def _shown(example: dict[str, str]) -> dict[str, str]:
    text = example["text"]
    return {**example, "text": text if len(text) <= _LONGEST_TEXT else text[: _LONGEST_TEXT - 1] + "…"}
