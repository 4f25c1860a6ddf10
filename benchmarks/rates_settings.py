"""The settings of the rates benchmark: model, task, adapter, length, optimizer.

The method's constants were chosen on the tuned half of the first fourteen. The untouched half was looked at twice. The
last three parts were written down before the first run of any of them, and nothing has been chosen on them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from loraplus.study.search.grid import HALF_DECADE, Point

Part = Literal["tuned", "untouched", "ordinary", "extreme", "another kind"]
FIRST: tuple[Part, ...] = ("tuned", "untouched")
LATER: tuple[Part, ...] = ("ordinary", "extreme", "another kind")
# Points (λ, step) of the grid that every later setting has: λ = 1, 4, 16 and √(η_A·η_B) from 1e-4 to 1e-2.
BLOCK: list[Point] = [(ratio, HALF_DECADE * k) for ratio in (1.0, 4.0, 16.0) for k in (-2, -1, 0, 1, 2)]


@dataclass(frozen=True)
class Setting:
    """One cell of the benchmark.

    Args:
        part: what the setting is there for.
        model: minilm, decoder-WIDTH, or the only model that a task has.
        task: see `rates_problems`.
        batch: examples a step, over all of its accumulated parts.
        targets: "qv" or "all-linear".
        rslora: s is α/√r.
        length: tokens of the longest example.
        precision: float16 comes with a gradient scaler.
        bits: of the frozen base.
    """

    name: str
    part: Part
    model: str
    task: str
    steps: int
    batch: int
    rank: int
    alpha: float
    targets: Literal["qv", "all-linear"] = "qv"
    rslora: bool = False
    dora: bool = False
    dropout: float = 0.0
    length: int = 32
    optimizer: Literal["adamw", "sgd", "lion"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    clip: float = 0.0
    accumulation: int = 1
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    bits: Literal[8, 32] = 32


def _setting(part: Part, name: str, model: str, task: str, steps: int, batch: int, rank: int, alpha: float, **more):
    return Setting(name, part, model, task, steps, batch, rank, alpha, **more)


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
        # ordinary: what people do
        _setting("ordinary", "minilm-tweets-cosine", "minilm", "tweets", 50, 16, 16, 32, targets="all-linear",
                 dropout=0.05, schedule="cosine", weight_decay=0.1),
        _setting("ordinary", "minilm-products-rating", "minilm", "rating-products", 60, 16, 8, 8),
        _setting("ordinary", "lm128-editorials-accumulated", "decoder-128", "lm-editorials", 150, 32, 16, 16,
                 targets="all-linear", accumulation=4, weight_decay=0.1, schedule="cosine"),
        _setting("ordinary", "completion128-movies", "decoder-128", "completion-movies", 200, 8, 16, 32,
                 targets="all-linear", clip=1.0),
        _setting("ordinary", "lm512-movies", "decoder-512", "lm-movies", 50, 8, 8, 16),
        _setting("ordinary", "lm64-movies-bf16", "decoder-64", "lm-movies", 200, 16, 8, 16, precision="bfloat16",
                 betas=(0.9, 0.95)),
        # extreme: where constants fail
        _setting("extreme", "decoder64-tweets-r1", "decoder-64", "tweets", 150, 16, 1, 1, targets="all-linear"),
        _setting("extreme", "lm64-editorials-a256", "decoder-64", "lm-editorials", 200, 16, 4, 256),
        _setting("extreme", "decoder128-editorials-r128", "decoder-128", "editorials", 100, 16, 128, 512,
                 targets="all-linear", rslora=True),
        _setting("extreme", "lm32-editorials-b2", "decoder-32", "lm-editorials", 5000, 2, 4, 4),
        _setting("extreme", "decoder64-book-25-steps", "decoder-64", "book", 25, 128, 16, 16),
        _setting("extreme", "lm128-movies-clipped", "decoder-128", "lm-movies", 150, 8, 8, 8, clip=0.1,
                 schedule="constant"),
        _setting("extreme", "lm64-editorials-sgd", "decoder-64", "lm-editorials", 300, 16, 8, 16, optimizer="sgd"),
        _setting("extreme", "lm64-movies-lion", "decoder-64", "lm-movies", 200, 16, 16, 16, targets="all-linear",
                 optimizer="lion", weight_decay=0.1),
        _setting("extreme", "decoder64-products-fp16", "decoder-64", "products", 150, 4, 8, 8, precision="float16"),
        _setting("extreme", "minilm-passages", "minilm", "passages", 25, 4, 8, 32, length=256),
        # another kind: of task, layer or base
        _setting("another kind", "t5-restore", "t5", "restore-editorials", 200, 16, 8, 16),
        _setting("another kind", "vit-digits", "vit", "digits", 120, 32, 4, 8, targets="all-linear"),
        _setting("another kind", "minilm-capitals", "minilm", "capitals", 50, 16, 8, 16),
        _setting("another kind", "dpo64-movies", "decoder-64", "preference-movies", 150, 16, 16, 32,
                 targets="all-linear"),
        _setting("another kind", "dpo128-editorials", "decoder-128", "preference-editorials", 100, 8, 64, 64),
        _setting("another kind", "toy4096", "toy-4096", "sine", 80, 64, 4, 4),
        _setting("another kind", "decoder64-tweets-dora", "decoder-64", "tweets", 150, 16, 8, 16, dora=True),
        _setting("another kind", "lm128-editorials-int8", "decoder-128", "lm-editorials", 100, 8, 8, 16, bits=8),
    )
}  # fmt: skip
