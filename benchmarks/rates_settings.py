"""The settings of the rates benchmark: model, task, adapter, length. Half of them were chosen beforehand for tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Setting:
    """One cell of the benchmark. `half` says whether the method may be tuned on it."""

    name: str
    half: Literal["tuned", "untouched"]
    model: str  # minilm, decoder-WIDTH
    task: str  # movies, products, editorials, tweets, rating, book, lm-movies, lm-editorials
    steps: int
    batch: int
    rank: int
    alpha: float
    targets: Literal["qv", "all-linear"] = "qv"
    rslora: bool = False
    dropout: float = 0.0


def _setting(half: str, name: str, model: str, task: str, steps: int, batch: int, rank: int, alpha: float, **more):
    return Setting(name, half, model, task, steps, batch, rank, alpha, **more)


SETTINGS: dict[str, Setting] = {
    setting.name: setting
    for setting in (
        # tuned half
        _setting("tuned", "minilm-movies", "minilm", "movies", 100, 32, 8, 16),
        _setting("tuned", "minilm-products-b8", "minilm", "products", 150, 8, 16, 16),
        _setting("tuned", "decoder64-book-long", "decoder-64", "book", 600, 32, 8, 16),
        _setting("tuned", "decoder128-book-linear", "decoder-128", "book", 200, 32, 4, 8, targets="all-linear"),
        _setting("tuned", "lm128-movies", "decoder-128", "lm-movies", 200, 16, 8, 16),
        _setting("tuned", "decoder128-tweets-r64", "decoder-128", "tweets", 100, 16, 64, 64, rslora=True),
        _setting("tuned", "lm64-editorials-linear-dropout", "decoder-64", "lm-editorials", 300, 8, 16, 32,
                 targets="all-linear", dropout=0.1),
        # untouched half
        _setting("untouched", "minilm-book", "minilm", "book", 100, 32, 8, 16),
        _setting("untouched", "minilm-editorials-linear", "minilm", "editorials", 60, 16, 4, 4, targets="all-linear"),
        _setting("untouched", "minilm-rating-dropout", "minilm", "rating", 80, 16, 32, 16, dropout=0.1),
        _setting("untouched", "decoder64-book-r2", "decoder-64", "book", 150, 64, 2, 16),
        _setting("untouched", "decoder64-book-2000", "decoder-64", "book", 2000, 8, 8, 8),
        _setting("untouched", "lm64-movies-linear", "decoder-64", "lm-movies", 300, 32, 4, 8,
                 targets="all-linear"),
        _setting("untouched", "lm32-movies-rslora", "decoder-32", "lm-movies", 300, 8, 16, 16, rslora=True),
    )
}  # fmt: skip
