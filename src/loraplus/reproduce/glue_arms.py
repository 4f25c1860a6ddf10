"""LoRA against LoRA+ on sentence classification: GLUE as published, or the same grid on rated snippets and MiniLM."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase

from loraplus.reproduce.classifier import LabelledTexts, Recipe, encode, train_classifier
from loraplus.reproduce.experiment import Record, Records
from loraplus.reproduce.glue import HUB_NAME, LENGTH, TASKS, check, encoded, in_folder_or_hub
from loraplus.reproduce.report import Report
from loraplus.reproduce.small_tasks import BOOK, Text, Texts, book_texts, domain_texts
from loraplus.reproduce.tuned_arms import HOW_TUNED, TEST_ACCURACY, TEST_LOSS, Case, Job, TunedArms, headline, verdicts
from loraplus.study.search.grid import HALF_DECADE
from loraplus.study.worker import OnStep
from loraplus.tasks.classification import ClassificationData
from loraplus.tasks.config import TaskConfig
from loraplus.tasks.pretrained import load_tokenizer

_BETA2 = 0.99
_WARMUP = 0.06
_PUBLISHED_FIRST_STEP = -HALF_DECADE


@dataclass(frozen=True)
class GlueArms(TunedArms):
    """Base of glue-roberta and glue-gpt2; they name the models, the layers and the length of small runs.

    Args:
        domains: cases at --scale cpu: movies, products, editorials, tweets, book.
        glue: cases at --scale paper.
        max_steps: length of a run; default: the published epochs, or `small_steps`.
    """

    domains: tuple[str, ...] = ()
    glue: tuple[str, ...] = tuple(TASKS)
    max_steps: int | None = None

    packages = ("matplotlib", "sklearn")
    baseline_scales = ("cpu",)
    small_steps: ClassVar[int]
    small_batch: ClassVar[int]
    published_model: ClassVar[str]
    """Folder in the data folder, else name on the hub."""
    published_targets: ClassVar[str]
    small_targets: ClassVar[str]

    @abstractmethod
    def small_model(self) -> Path:
        """Folder of the model at --scale cpu."""

    def obtain_small_model(self) -> None:
        """Puts that model there, unless it is one of `assets`."""

    def needed_assets(self) -> tuple[str, ...]:
        """Of the small scale; the published one takes what the hub or the data folder has."""
        return self.assets if self.scale == "cpu" else ()

    def grid_start(self) -> int:
        """The published rates lie around √(η_A·η_B) = 3e-4; those of small models higher."""
        return _PUBLISHED_FIRST_STEP if self.scale == "paper" else self.first_step

    def cases(self) -> list[Case]:
        if self.scale == "paper":
            return [{"task": name} for name in self.glue]
        return [{"domain": name} for name in self.domains]

    def recipe(self, case: Case) -> Recipe:
        """As published; at --scale cpu a small model without dropout, fewer steps, the head at a rate of its own."""
        published = TaskConfig(
            rank=8, alpha=8, batch_size=32, max_length=LENGTH, max_steps=self.max_steps,
            warmup_ratio=_WARMUP, lr_scheduler_type="linear", weight_decay=0.0,
        )  # fmt: skip
        if self.scale == "paper":
            published.model = in_folder_or_hub(self.data, self.published_model)
            published.target_modules, published.epochs = self.published_targets, TASKS[str(case["task"])].epochs
            return Recipe(published, _BETA2, head_at_lr=True, half=True)
        published.model, published.target_modules = str(self.small_model()), self.small_targets
        published.max_steps, published.batch_size = self.max_steps or self.small_steps, self.small_batch
        published.eval_batch_size = 100
        return Recipe(published, _BETA2, dropout=False)

    def settings(self) -> dict[str, Any]:
        one = self.recipe(self.cases()[0])
        model = self.published_model if self.scale == "paper" else Path(one.config.model).name
        cases = [next(iter(case.values())) for case in self.cases()]
        shown = "rank alpha target_modules lr_scheduler_type warmup_ratio weight_decay max_length max_steps batch_size"
        return {"model": model, "cases": cases, **one.settings(*shown.split())}

    def needs(self) -> list[str]:
        if self.scale == "cpu":
            return []
        return [
            f"{self.published_model}: in {self.data}/{Path(self.published_model).name}, else from the hub",
            f"GLUE: in {self.data}/glue, else {HUB_NAME} from the hub",
            "a GPU; some 20 runs of the published length for each task",
        ]

    def check(self) -> None:
        if self.scale == "paper":
            check(self.glue, self.data, in_folder_or_hub(self.data, self.published_model))

    def train(self, job: Job, on_step: OnStep) -> Record:
        recipe = self.recipe(job.case)
        if self.scale == "cpu":
            self.obtain_small_model()
        load = encoded if self.scale == "paper" else _encoded
        tokenizer, data = load(str(next(iter(job.case.values()))), self.data, recipe.config.model)
        return train_classifier(
            recipe, data, tokenizer, lr=job.lr, lr_ratio=job.lr_ratio, seed=job.seed,
            evaluations=job.evaluations, on_step=on_step,
        )  # fmt: skip

    def baseline(self, case: Case) -> dict[str, float]:
        from loraplus.reproduce.tfidf import tfidf

        return tfidf(small_texts(Path(self.data), str(case["domain"])))

    def report(self, results: Records, figures: Mapping[str, Any]) -> Report:
        recipe = self.recipe(self.cases()[0])
        length = f"{recipe.config.max_steps} steps" if recipe.config.max_steps else "the published epochs"
        return Report(
            verdict=[
                *verdicts(figures, TEST_ACCURACY, "test accuracy", lower_is_better=False),
                *verdicts(figures, TEST_LOSS, "test loss", lower_is_better=True),
            ],
            parts=[
                self.table_of_arms(figures),
                self.table_of_differences(figures),
                *self.maps(results),
                *self.curves(results, figures),
            ],
            method=[
                f"Rank {recipe.config.rank}, α {recipe.config.alpha:g}, layers {recipe.config.target_modules}, batch "
                f"{recipe.config.batch_size}, {length}, linear schedule, Adam with β2 = {recipe.beta2}.",
                HOW_TUNED,
                "The published settings known to us give no warm-up; here it is 6% of the steps.",
            ],
            limits=self.limits(),
            headline=headline(figures, TEST_ACCURACY, lower_is_better=False),
        )

    def limits(self) -> list[str]:
        """What the scale leaves open."""
        if self.scale == "paper":
            return []
        return ["A small model on short texts: the size of the effect need not carry over to the published models."]


def small_texts(data: Path, case: str) -> Texts:
    """Labelled text of a case at --scale cpu."""
    return book_texts(data) if case == BOOK else domain_texts(data, case, True)


@functools.lru_cache(maxsize=2)
def _encoded(case: str, data: str, model: str) -> tuple[PreTrainedTokenizerBase, ClassificationData]:
    """Tokenizer and token ids of a case at --scale cpu, kept for the later runs of this process."""
    tokenizer = load_tokenizer(TaskConfig(model=model))
    texts = small_texts(Path(data), case)
    names = [str(number) for number in range(texts.classes)]
    parts = _labelled(texts.train), _labelled(texts.validation), _labelled(texts.test)
    return tokenizer, encode(names, parts, tokenizer, min(LENGTH, tokenizer.model_max_length))


def _labelled(texts: list[Text]) -> LabelledTexts:
    return LabelledTexts([text for text, _ in texts], [label for _, label in texts])
