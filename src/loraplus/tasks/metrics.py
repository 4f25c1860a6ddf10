"""What answers are worth: the measures of classes, of sets of labels, and of numbers, as scikit-learn defines them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

_MOST_CLASSES_IN_A_MATRIX = 200
_MOST_CONFUSED = 20


def classification_metrics(guess: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy, and F1 averaged over the classes so that rare ones count.

    Args:
        guess, labels: indices of classes (examples,).
    """
    return {
        "accuracy": float(np.mean(guess == labels)),
        "macro_f1": macro_f1(labels, guess),
    }


def macro_f1(labels: np.ndarray, guess: np.ndarray) -> float:
    """Mean over the classes of F1 = 2·hits / (labels + guesses), as scikit-learn's `f1_score(average="macro")`.

    Example:
        >>> macro_f1(np.asarray([0, 0, 1]), np.asarray([0, 0, 2]))
        0.3333333333333333
    """
    of_class = ((labels == c, guess == c) for c in np.union1d(labels, guess))
    return float(np.mean([2 * np.sum(there & said) / (np.sum(there) + np.sum(said)) for there, said in of_class]))


def multi_label_metrics(said: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy (all labels of a text right), and F1 over all labels of all texts and as a mean over the labels.

    Args:
        said, labels: boolean, (examples, labels). A label that is neither there nor said has F1 0, as in scikit-learn.

    Example:
        >>> multi_label_metrics(np.asarray([[True, False]]), np.asarray([[True, True]]))
        {'accuracy': 0.0, 'micro_f1': 0.6666666666666666, 'macro_f1': 0.5}
    """
    hits, all_of_them = (said & labels).sum(axis=0), said.sum(axis=0) + labels.sum(axis=0)
    return {
        "accuracy": float((said == labels).all(axis=1).mean()),
        "micro_f1": float(2 * hits.sum() / max(1, all_of_them.sum())),
        "macro_f1": float(np.mean(2 * hits / np.maximum(1, all_of_them))),
    }


def regression_metrics(predicted: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Mean squared and absolute error, R² and Pearson's r; the last two are 0 where one side does not vary.

    Args:
        predicted, targets: (examples,), in the data's own scale.

    Example:
        >>> regression_metrics(np.asarray([1.0, 3.0]), np.asarray([1.0, 2.0]))["mse"]
        0.5
    """
    errors = predicted - targets
    about = targets - targets.mean()
    spread, varies = float(np.sum(about**2)), predicted - predicted.mean()
    product = float(np.sqrt(np.sum(varies**2) * spread))
    return {
        "mse": float(np.mean(errors**2)),
        "mae": float(np.mean(np.abs(errors))),
        "r2": 1 - float(np.sum(errors**2)) / spread if spread else 0.0,
        "pearson": float(np.sum(varies * about)) / product if product else 0.0,
    }


def losses_of_classes(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Cross-entropy of every example (examples,).

    Args:
        logits: (examples, classes).
        labels: indices of classes (examples,).
    """
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return np.log(np.exp(shifted).sum(axis=-1)) - shifted[np.arange(len(labels)), labels]


def losses_of_sets(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Mean binary cross-entropy over the labels of every example (examples,).

    Args:
        logits, labels: (examples, labels).
    """
    return (np.logaddexp(0, logits) - labels * logits).mean(axis=1)


def of_each(names: Sequence[str], hits: np.ndarray, support: np.ndarray, said: np.ndarray) -> list[dict[str, Any]]:
    """Precision, recall and F1 of each class or label, (names,) each of what they are computed from.

    precision = hits / said, recall = hits / support, F1 = 2·hits / (support + said); 0 where the divisor is 0.

    Args:
        names: of the classes or labels.
        hits: how often it was said rightly.
        support: how often it was there.
        said: how often it was said.

    Example:
        >>> of_each(["a"], np.asarray([1]), np.asarray([2]), np.asarray([1]))
        [{'label': 'a', 'precision': 1.0, 'recall': 0.5, 'f1': 0.6666666666666666, 'support': 2, 'predicted': 1}]
    """
    return [
        {
            "label": name,
            "precision": hit / max(1, guesses),
            "recall": hit / max(1, there),
            "f1": 2 * hit / max(1, there + guesses),
            "support": there,
            "predicted": guesses,
        }
        for name, hit, there, guesses in zip(names, hits.tolist(), support.tolist(), said.tolist(), strict=True)
    ]


def confusion(names: Sequence[str], guess: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """How often a class was taken for another.

    Args:
        names: of the classes.
        guess, labels: indices of classes (examples,).

    Returns:
        {"confusion_matrix", "confused"}: counts [true class][predicted class], None where there are more than 200
        classes; and the pairs that were confused most, {"truth", "prediction", "count"}.

    Example:
        >>> confusion(["a", "b"], np.asarray([0, 1, 1]), np.asarray([0, 0, 1]))["confusion_matrix"]
        [[1, 1], [0, 1]]
    """
    count = len(names)
    pairs, times = np.unique(labels.astype(np.int64) * count + guess, return_counts=True)
    wrong = [
        place for place in np.argsort(-times, kind="stable").tolist() if pairs[place] // count != pairs[place] % count
    ]
    matrix = None
    if count <= _MOST_CLASSES_IN_A_MATRIX:
        cells = np.zeros(count * count, np.int64)
        cells[pairs] = times
        matrix = cells.reshape(count, count).tolist()
    most = [(*divmod(int(pairs[place]), count), int(times[place])) for place in wrong[:_MOST_CONFUSED]]
    confused = [{"truth": names[true], "prediction": names[said], "count": times} for true, said, times in most]
    return {"confusion_matrix": matrix, "confused": confused}
