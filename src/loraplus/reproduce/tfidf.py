"""TF-IDF and logistic regression: what a method without a network reaches on the same split."""

from __future__ import annotations

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from loraplus.reproduce.small_tasks import Text, Texts

_STRENGTHS = (0.3, 1.0, 3.0, 10.0, 30.0)


def tfidf(texts: Texts) -> dict[str, float]:
    """Words and pairs of words; the strength of regularisation that is best on the validation data.

    Returns:
        eval_loss, eval_accuracy, test_loss, test_accuracy.
    """
    vectors = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2)
    train = vectors.fit_transform([text for text, _ in texts.train])
    labels = [label for _, label in texts.train]
    by_strength = []
    for strength in _STRENGTHS:
        model = LogisticRegression(C=strength, max_iter=1000).fit(train, labels)
        by_strength.append(
            {**_measured(model, vectors, texts.validation, "eval"), **_measured(model, vectors, texts.test, "test")}
        )
    return min(by_strength, key=lambda values: values["eval_loss"])


def _measured(model: LogisticRegression, vectors: TfidfVectorizer, texts: list[Text], name: str) -> dict[str, float]:
    labels = np.array([label for _, label in texts])
    chances = model.predict_proba(vectors.transform([text for text, _ in texts]))
    losses = -np.log(np.maximum(chances[np.arange(len(labels)), labels], 1e-12))
    return {
        f"{name}_loss": float(losses.mean()),
        f"{name}_accuracy": float((chances.argmax(axis=1) == labels).mean()),
    }
