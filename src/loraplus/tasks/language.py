"""Language models: conversations, prompts with completions, or texts → splits → token ids → TRL's SFTTrainer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedTokenizerBase
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from loraplus.errors import InputError
from loraplus.integrations.transformers import LoraPlusTrainer, LoraPlusTrainingArguments
from loraplus.tasks.checks import check_task
from loraplus.tasks.config import CompareConfig, TaskConfig
from loraplus.tasks.conversations import Example, Examples, read_examples
from loraplus.tasks.encoding import Encoded, Encoder, Fitted, fit, how_to_fit, longest_of, loss_on
from loraplus.tasks.files import read_template
from loraplus.tasks.language_trainer import LanguageTrainer, LanguageTrainingArguments
from loraplus.tasks.lengths import most_validation_examples
from loraplus.tasks.model import load_language_model
from loraplus.tasks.packing import PackingCollator, keeps_apart
from loraplus.tasks.pretrained import check_tokens, checked_length, load_tokenizer, padding_multiple
from loraplus.tasks.samples import answers
from loraplus.tasks.splits import check_seed, stratified_sample, stratified_split, without_duplicates
from loraplus.tasks.table import read_table

_LENGTH_CAP = 1024  # TRL's default


@dataclass(frozen=True)
class LanguageData:
    """Tokenised splits. `test` is empty unless a comparison asked for it; `held_out` are the validation examples."""

    train: Dataset
    validation: Dataset
    test: Dataset
    held_out: list[Example]
    encoder: Encoder
    max_length: int
    facts: dict[str, Any]


def load_language_data(config: TaskConfig, tokenizer: PreTrainedTokenizerBase) -> LanguageData:
    """Reads, checks, splits and tokenises the data of a run.

    Examples of the training split that also stand in the validation or test split are removed and counted. The split is
    fixed by `config.seed`. Examples longer than the length are counted, and cut, dropped or split as `long_examples`
    says.

    Args:
        config: a `CompareConfig` also gets a test split.
        tokenizer: of the model, with the chat template to use.

    Returns:
        The splits as token ids and labels; validation and test sorted by length, so that batches hold little padding.

    Raises:
        InputError: data that cannot be used; the message names the file, column or line.
    """
    check_task(config)
    check_seed(config)
    train = read_examples(read_table(config.data), config.task, config.text_column)
    on = loss_on(config.loss_on, train.kind)
    how = how_to_fit(config.long_examples, config.task, train.kind)
    encoder = Encoder(tokenizer, config.model, train, on)

    test: list[Example] = []
    rows = train.rows
    if isinstance(config, CompareConfig):
        rows, test = _hold_out(
            rows, train.kind, config.test_data, config.test_fraction, config.max_test_samples, config
        )  # fmt: skip
    most = most_validation_examples(config, len(rows))
    rows, validation = _hold_out(rows, train.kind, config.eval_data, config.eval_fraction, most, config)
    rows, removed = _without_duplicates(rows, [*validation, *test])
    validation, removed_validation = _without_duplicates(validation, test)
    if not rows or not validation:
        raise InputError(f"{config.data}: nothing is left to train on after examples of the held-out data were removed")

    encoded = [encoder(split) for split in (rows, validation, test)]
    max_length = checked_length(config, _max_length(longest_of(encoded[0]), tokenizer), tokenizer)
    fitted = [fit(split, max_length, how) for split in encoded]
    for name, split in zip(("training", "validation", "test"), fitted, strict=True):
        if not split.rows and (name != "test" or test):
            raise InputError(
                f"{config.data}: no {name} example has a token to learn within {max_length} tokens; raise --max-length"
            )
    facts = {
        "source": config.data,
        "format": train.kind,
        "loss_on": on,
        "train_examples": len(rows),
        "validation_examples": len(validation),
        "test_examples": len(test),
        "duplicates_removed": removed + removed_validation,
        "max_length": max_length,
        "longer_than_context": sum(split.longer for split in fitted),
        "long_examples": how,
        "tokens_cut": sum(split.cut for split in fitted),
        "examples_dropped": sum(split.dropped for split in fitted),
        "train_rows": len(fitted[0].rows),
        "train_tokens": sum(len(row.ids) for row in fitted[0].rows),
        "train_target_tokens": _targets(fitted[0]),
        "validation_target_tokens": _targets(fitted[1]),
        "test_target_tokens": _targets(fitted[2]),
        "split_seed": config.seed,
        "sha256": _fingerprint(encoded),
    }
    return LanguageData(
        train=_dataset(fitted[0].rows),
        validation=_dataset(sorted(fitted[1].rows, key=_length)),
        test=_dataset(sorted(fitted[2].rows, key=_length)),
        held_out=validation,
        encoder=encoder,
        max_length=max_length,
        facts=facts,
    )


def _hold_out(
    rows: list[Example], kind: str, source: str | None, fraction: float, at_most: int | None, config: TaskConfig
) -> tuple[list[Example], list[Example]]:
    """(rest, held out): from a file of its own, or a part of `rows`."""
    if source is not None:
        found = read_examples(read_table(source), config.task, config.text_column)
        _check_kind(found, kind, source, config.data)
        rest, held_out = rows, found.rows
    elif len(rows) < 2:
        raise InputError(f"{config.data}: one example is too few to keep any aside; add some, or name held-out data")
    else:
        kept, held = stratified_split([""] * len(rows), fraction, config.seed)
        rest, held_out = [rows[i] for i in kept], [rows[i] for i in held]
    if at_most is not None and at_most < len(held_out):
        held_out = [held_out[i] for i in stratified_sample([""] * len(held_out), at_most, config.seed)]
    return rest, held_out


def _check_kind(found: Examples, kind: str, source: str, data: str) -> None:
    if found.kind != kind:
        raise InputError(f"{source} is of the kind {found.kind}, but {data} is of the kind {kind}")


def _without_duplicates(rows: list[Example], held_out: list[Example]) -> tuple[list[Example], int]:
    kept, removed = without_duplicates([row.content for row in rows], [row.content for row in held_out])
    return [rows[i] for i in kept], removed


def _max_length(longest: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """Takes in the longest example, within what TRL and the model take."""
    return max(2, min(longest, _LENGTH_CAP, tokenizer.model_max_length))


def _targets(split: Fitted) -> int:
    return sum(row.targets for row in split.rows)


def _fingerprint(splits: Sequence[Sequence[Encoded]]) -> str:
    """Hash of all tokens and targets as JSON, so that a run is not resumed on edited data or with another template."""
    found = hashlib.sha256()
    for place, split in enumerate(splits):
        found.update(b", [" if place else b"[[")
        for number, row in enumerate(split):
            found.update(((", " if number else "") + json.dumps([row.ids, row.labels])).encode())
        found.update(b"]")
    found.update(b"]")
    return found.hexdigest()


def _dataset(rows: Sequence[Encoded]) -> Dataset:
    return Dataset.from_dict({"input_ids": [row.ids for row in rows], "labels": [row.labels for row in rows]})


def _length(row: Encoded) -> int:
    return len(row.ids)


class LanguageModelling:
    """The tasks sft and lm."""

    metrics: tuple[str, ...] = ("eval_perplexity",)

    def load_tokenizer(self, config: TaskConfig) -> PreTrainedTokenizerBase:
        """The model's tokenizer, with the chat template of --chat-template if there is one."""
        tokenizer = load_tokenizer(config)
        if config.chat_template is not None:
            tokenizer.chat_template = read_template(config.chat_template)
        return tokenizer

    def load_data(self, config: TaskConfig, tokenizer: PreTrainedTokenizerBase) -> LanguageData:
        """As `load_language_data`."""
        return load_language_data(config, tokenizer)

    def load_model(
        self, config: TaskConfig, data: LanguageData, tokenizer: PreTrainedTokenizerBase, seed: int
    ) -> PeftModel:
        """As `load_language_model`."""
        model = load_language_model(config, tokenizer, seed)
        check_tokens(model, max(map(max, data.train["input_ids"])), config.model)
        return model

    def arguments(self, **options: Any) -> LoraPlusTrainingArguments:
        """SFTTrainer's arguments; the rows it gets are tokenised, and packed by our collator."""
        return LanguageTrainingArguments(
            dataset_kwargs={"skip_prepare_dataset": True}, max_length=None, packing=False, **options
        )

    def trainer(
        self,
        config: TaskConfig,
        data: LanguageData,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        **options: Any,
    ) -> LoraPlusTrainer:
        """SFTTrainer; packs training batches where the model keeps the examples of a row apart."""
        packs = config.packing is not False and keeps_apart(model)
        if config.packing and not packs:
            raise InputError(f"--packing: {config.model} does not keep the examples of a row apart; leave it out")
        pad: Any = tokenizer.pad_token_id
        multiple = padding_multiple(data.max_length, tokenizer)
        trainer = LanguageTrainer(
            model=model,
            train_dataset=data.train,
            eval_dataset=data.validation,
            data_collator=DataCollatorForLanguageModeling(pad, pad_to_multiple_of=multiple),
            processing_class=tokenizer,
            packing=PackingCollator(data.max_length, pad, multiple) if packs else None,
            **options,
        )
        for parameter in model.parameters():
            if parameter.requires_grad:  # TRL keeps those of a 4-bit base in bfloat16, which loses small steps
                parameter.data = parameter.data.float()
        return trainer

    def facts_of_run(self, trainer: LanguageTrainer) -> dict[str, Any]:
        """Whether batches were packed."""
        return {"packing": trainer.packing is not None}

    def test(self, trainer: Any, data: LanguageData) -> tuple[tuple[float, ...], tuple[bool, ...]]:
        """Each test example's summed loss over the mean number of target tokens: their mean is the loss a token."""
        output = trainer.predict(data.test)
        losses = output.predictions / output.label_ids.mean()
        return tuple(round(float(loss), 6) for loss in losses), ()

    def samples(
        self, count: int, model: PeftModel, data: LanguageData, tokenizer: PreTrainedTokenizerBase
    ) -> list[dict[str, str]]:
        """As `answers`, for the first validation examples."""
        return answers(model, tokenizer, data.encoder, data.held_out, count)

    def save_beside_adapter(
        self, model: PeftModel, data: LanguageData, tokenizer: PreTrainedTokenizerBase, folder: Path
    ) -> None:
        """The tokenizer with its chat template."""
        tokenizer.save_pretrained(str(folder))
