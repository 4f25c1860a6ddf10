"""What differs from task to task: data, model, trainer, test. Training, tuning and comparing share the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from peft import PeftModel
from transformers import PreTrainedTokenizerBase, Trainer

from loraplus.integrations.transformers import LoraPlusTrainingArguments
from loraplus.tasks.checks import check_task
from loraplus.tasks.config import CLASSIFICATION, MULTI_LABEL, REGRESSION, TaskConfig
from loraplus.tasks.data_parallel import DataParallelTrainer
from loraplus.tasks.pretrained import load_tokenizer
from loraplus.tasks.seen import Seen


class Tested(NamedTuple):
    """Results on the test examples: the loss of each, whether it was answered rightly if that can be said, and more."""

    losses: tuple[float, ...]
    correct: tuple[bool, ...] = ()
    values: Mapping[str, float] = {}


class TaskData(Protocol):
    """Tokenised splits; `test` is empty unless a comparison asked for it. `facts` tells what is in them, `seen` what a
    user should know of them before training."""

    @property
    def train(self) -> Sequence[Any]: ...
    @property
    def validation(self) -> Sequence[Any]: ...
    @property
    def facts(self) -> dict[str, Any]: ...
    @property
    def seen(self) -> Seen: ...


D = TypeVar("D", bound=TaskData)


class Task(Generic[D]):
    """One kind of data and model. Every method raises `InputError` for what cannot be used."""

    metrics: tuple[str, ...]
    """What an evaluation tells beside `eval_loss`."""

    def load_tokenizer(self, config: TaskConfig) -> PreTrainedTokenizerBase:
        """The model's tokenizer, with all that the data needs."""
        return load_tokenizer(config)

    def load_data(self, config: TaskConfig, tokenizer: PreTrainedTokenizerBase) -> D:
        """The `TaskData`, read, checked, split and tokenised."""
        raise NotImplementedError

    def load_model(self, config: TaskConfig, data: D, tokenizer: PreTrainedTokenizerBase, seed: int) -> PeftModel:
        """The base model with a fresh adapter."""
        raise NotImplementedError

    def arguments(self, **options: object) -> LoraPlusTrainingArguments:
        """The trainer's arguments, from those that every task has."""
        return LoraPlusTrainingArguments(**options)

    def trainer(
        self, config: TaskConfig, data: D, model: PeftModel, tokenizer: PreTrainedTokenizerBase, **options: object
    ) -> DataParallelTrainer:
        """A trainer of the data; `options` are its arguments, callbacks and optimizer."""
        raise NotImplementedError

    def facts_of_run(self, trainer: DataParallelTrainer) -> dict[str, Any]:
        """What was decided for this model, for the metrics."""
        return {}

    def outcome(self, data: D, scored: Mapping[str, Any]) -> dict[str, Any]:
        """What the metrics say beside the measures: whether anything was learnt, where that can be told."""
        return {}

    def test(self, trainer: Trainer, data: D) -> Tested:
        """Results on every test example."""
        raise NotImplementedError

    def scores(self, trainer: DataParallelTrainer, data: D) -> dict[str, Any]:
        """What the trained model's answers to the validation examples are worth, in full; empty if it gives none."""
        return {}

    def samples(
        self, count: int, model: PeftModel, data: D, tokenizer: PreTrainedTokenizerBase
    ) -> list[dict[str, str]]:
        """What base and adapted model answer to so many validation prompts; empty if they do not answer in words."""
        return []

    def is_chat(self, config: TaskConfig, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Whether the adapter is asked in turns of a chat."""
        return False

    def save_beside_adapter(self, model: PeftModel, data: D, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
        """Writes what else is needed to use the adapter."""
        tokenizer.save_pretrained(str(folder))


def task_of(config: TaskConfig) -> Task[Any]:
    """The task that --task names.

    Raises:
        InputError: as `check_task`.
    """
    check_task(config)
    if config.task == CLASSIFICATION:
        from loraplus.tasks.classification import Classification

        return Classification()
    if config.task == REGRESSION:
        from loraplus.tasks.regression import Regression

        return Regression()
    if config.task == MULTI_LABEL:
        from loraplus.tasks.multi_label import MultiLabel

        return MultiLabel()
    from loraplus.tasks.language import LanguageModelling  # here, since TRL takes seconds to import

    return LanguageModelling()
