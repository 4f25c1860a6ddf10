"""Llama-7b on MNLI as a classifier, as published: all linear layers, constant schedule, one epoch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from loraplus.reproduce.classifier import Recipe, train_classifier
from loraplus.reproduce.descriptions import DESCRIPTIONS
from loraplus.reproduce.experiment import Record
from loraplus.reproduce.glue import HUB_NAME, LENGTH, check, encoded, in_folder_or_hub
from loraplus.reproduce.rate_grid import RateGrid
from loraplus.study.worker import OnStep
from loraplus.tasks.config import TaskConfig

MODEL = "huggyllama/llama-7b"


@dataclass(frozen=True)
class LlamaMnli(RateGrid):
    """The published grid on MNLI.

    Args:
        rank, alpha: of the adapter.
        max_steps: fewer than one epoch, for a trial.
    """

    rank: int = 8
    alpha: float = 8.0
    max_steps: int | None = None

    name = "llama-mnli"
    title, claims, scales = DESCRIPTIONS[name]
    main_value = "test_accuracy"
    unknown = (
        "Not known to us: rank and α (here 8 and 8, as with RoBERTa), the rate of the head (here η_A), the text length "
        f"(here {LENGTH} tokens).",
    )

    @property
    def recipe(self) -> Recipe:
        """As published."""
        config = TaskConfig(
            model=in_folder_or_hub(self.data, MODEL), rank=self.rank, alpha=self.alpha, target_modules="all-linear",
            batch_size=32, gradient_accumulation_steps=4, epochs=1, max_steps=self.max_steps, max_length=LENGTH,
            lr_scheduler_type="constant", warmup_ratio=0.0, weight_decay=0.0, eval_batch_size=16,
            bf16=torch.cuda.is_available(),
        )  # fmt: skip
        return Recipe(config, beta2=0.999, head_at_lr=True)

    def settings(self) -> dict[str, Any]:
        shown = "target_modules batch_size gradient_accumulation_steps epochs max_length lr_scheduler_type weight_decay"
        return super().settings() | {"model": MODEL, "task": "mnli", **self.recipe.settings(*shown.split())}

    def sources(self) -> list[str]:
        return [
            f"{MODEL}: in {self.data}/llama-7b, else from the hub",
            f"GLUE: in {self.data}/glue, else {HUB_NAME} from the hub",
        ]

    def check(self) -> None:
        check(("mnli",), self.data, self.recipe.config.model)

    def train(self, lr: float, lr_ratio: float, seed: int, on_step: OnStep) -> Record:
        recipe = self.recipe
        tokenizer, data = encoded("mnli", self.data, recipe.config.model)
        return train_classifier(
            recipe, data, tokenizer, lr=lr, lr_ratio=lr_ratio, seed=seed, evaluations=10, on_step=on_step
        )
