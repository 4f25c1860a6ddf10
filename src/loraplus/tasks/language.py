"""Language models: conversations, prompts with completions, or texts → splits → token ids → TRL's SFTTrainer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from loraplus.errors import InputError
from loraplus.files.single import read_template
from loraplus.integrations.transformers import LoraPlusTrainingArguments
from loraplus.tasks.checks import check_task
from loraplus.tasks.config import ON_ALL, TaskConfig
from loraplus.tasks.conversations import (
    COMPLETION,
    CONVERSATION,
    Example,
    LanguageExamples,
    NamedColumns,
    read_examples,
)
from loraplus.tasks.data_parallel import DataParallelTrainer
from loraplus.tasks.encoding import Encoder, loss_on
from loraplus.tasks.language_trainer import LanguageTrainer, LanguageTrainingArguments
from loraplus.tasks.model import load_language_model
from loraplus.tasks.packing import PackingCollator, keeps_apart
from loraplus.tasks.pretrained import check_tokens, checked_length, load_tokenizer, padding_multiple
from loraplus.tasks.samples import answers
from loraplus.tasks.seen import (
    Seen,
    doubts_of_encoding,
    length_row,
    longer_ones,
    repeats,
    repeats_row,
    source_row,
    split_row,
)
from loraplus.tasks.splits import split
from loraplus.tasks.streamed import Made, in_parts
from loraplus.tasks.table import Table, read_table
from loraplus.tasks.target_rows import Encoded, Fitted, TargetRows, fit, how_to_fit
from loraplus.tasks.task import Task, Tested
from loraplus.tasks.token_rows import AT_ONCE

_LENGTH_CAP = 1024  # TRL's default
_COVERS = f"the longest example within the model and {_LENGTH_CAP:,}"


@dataclass(frozen=True)
class LanguageData:
    """Tokenised splits. `test` is empty unless a comparison asked for it; `held_out` are the validation examples."""

    train: TargetRows
    validation: TargetRows
    test: TargetRows
    held_out: Sequence[Example]
    encoder: Encoder
    max_length: int
    facts: dict[str, Any]
    largest_token: int
    seen: Seen


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
    named = NamedColumns(config.text_column, config.messages_column, config.prompt_column, config.completion_column)

    def examples(source: str) -> tuple[Table, LanguageExamples]:
        table = read_table(source, encoding=config.encoding)
        return table, read_examples(table, config.task, named=named, as_chat=bool(tokenizer.chat_template))

    table, data = examples(config.data)
    on = loss_on(config.loss_on, data.kind)
    how = how_to_fit(config.long_examples, config.task, data.kind)
    encoder = Encoder(tokenizer, config.model, data, on)

    def read(source: str, option: str) -> LanguageExamples:
        _, aside = examples(source)
        if aside.kind != data.kind:
            raise InputError(f"{source} is of the kind {aside.kind}, but {config.data} is of the kind {data.kind}")
        return aside

    train, validation, test, removed, unused = split(data, config, read)
    encoded, fingerprint = encoded_splits((train.rows, validation.rows, test.rows), encoder)
    max_length = checked_length(config, longest_within(int(encoded[0].lengths.max()), tokenizer), tokenizer)
    fitted = [fit(rows, max_length, how) for rows in encoded]
    for name, part in zip(("training", "validation", "test"), fitted, strict=True):
        if not part.rows and (name != "test" or len(test)):
            raise InputError(
                f"{config.data}: no {name} example has a token to learn within {max_length} tokens; raise --max-length"
            )
    facts = {
        "source": config.data,
        "format": data.kind,
        "loss_on": on,
        "train_examples": len(train),
        "validation_examples": len(validation),
        "test_examples": len(test),
        "duplicates_removed": removed,
        "max_length": max_length,
        **_facts_of_tokens(fitted, how),
        "split_seed": config.seed,
        "sha256": fingerprint,
    }
    return LanguageData(
        train=fitted[0].rows,
        validation=fitted[1].rows.by_length(),
        test=fitted[2].rows.by_length(),
        held_out=validation.rows,
        encoder=encoder,
        max_length=max_length,
        facts=facts,
        largest_token=fitted[0].largest,
        seen=_seen(config, table, data, facts, int(encoded[0].lengths.max()), unused),
    )


def _facts_of_tokens(splits: Sequence[Fitted], how: str) -> dict[str, Any]:
    """What stands in the training, validation and test split, and what was done with longer examples."""
    train, validation, test = splits
    return {
        "longer_than_context": sum(split.longer for split in splits),
        "long_examples": how,
        "tokens_cut": sum(split.cut for split in splits),
        "examples_dropped": sum(split.dropped for split in splits),
        "train_rows": len(train.rows),
        "train_tokens": int(train.rows.lengths.sum(dtype=np.int64)),
        "train_target_tokens": train.targets,
        "validation_target_tokens": validation.targets,
        "test_target_tokens": test.targets,
    }


def _seen(
    config: TaskConfig, table: Table, data: LanguageExamples, facts: dict[str, Any], longest: int, unused: int
) -> Seen:
    target = facts["train_target_tokens"]
    rows = {
        "data": source_row(table),
        "columns": f"{data.columns}: {data.kind}{' as a chat' if data.are_chats and data.kind == COMPLETION else ''}",
        "loss on": f"{facts['loss_on']}: {target:,} of {facts['train_tokens']:,} training tokens are learnt",
        "duplicates": repeats_row(repeats(data.contents()), facts["duplicates_removed"]),
        "split": split_row(
            facts["train_examples"],
            facts["validation_examples"],
            facts["test_examples"],
            unused,
            config.max_eval_samples is not None,
        ),
        "length": length_row(facts["max_length"], config.max_length is not None, longest, _COVERS),
        "cut": longer_ones(facts) if facts["longer_than_context"] else "nothing",
    }
    doubts = doubts_of_encoding(table)
    if data.kind == CONVERSATION and facts["loss_on"] == ON_ALL:
        doubts.append(
            "the user's turns are learnt, too: the loss is on all tokens (TRL's default); --loss-on assistant learns "
            "the answers alone"
        )
    if facts["examples_dropped"]:
        doubts.append(
            f"{facts['examples_dropped']:,} examples are left out, since nothing of them is to be learnt within "
            f"{facts['max_length']} tokens; raise --max-length"
        )
    return Seen(rows, tuple(doubts))


def longest_within(longest: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """The length of the longest example, within what TRL and the model take."""
    return max(2, min(longest, _LENGTH_CAP, tokenizer.model_max_length))


def encoded_splits(splits: Sequence[Made[Example]], encoder: Encoder) -> tuple[list[TargetRows], str]:
    """(splits as tokens, hash of all tokens and labels as JSON).

    The hash tells edited data, and another template, when a run is resumed.
    """
    hashed = hashlib.sha256()

    def parts(rows: Made[Example]) -> Iterator[list[Encoded]]:
        for number, part in enumerate(in_parts(rows, AT_ONCE, lambda row: len(row.content))):
            encoded = encoder(part)
            text = json.dumps([[row.ids, row.labels] for row in encoded])
            hashed.update(((", " if number else "") + text[1:-1]).encode())
            yield encoded

    encoded = []
    for place, rows in enumerate(splits):
        hashed.update(b", [" if place else b"[[")
        encoded.append(TargetRows.of(parts(rows), len(rows)))
        hashed.update(b"]")
    hashed.update(b"]")
    return encoded, hashed.hexdigest()


class LanguageModelling(Task[LanguageData]):
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
        check_tokens(model, data.largest_token, config.model)
        return model

    def arguments(self, **options: object) -> LoraPlusTrainingArguments:
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
        **options: object,
    ) -> DataParallelTrainer:
        """SFTTrainer; packs training batches where the model keeps the examples of a row apart."""
        # Attention over a packed row costs the square of its length, which a CPU's kernels do not skip.
        wanted = torch.accelerator.is_available() if config.packing is None else config.packing
        packs = wanted and keeps_apart(model)
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

    def facts_of_run(self, trainer: DataParallelTrainer) -> dict[str, Any]:
        """Whether batches were packed."""
        return {"packing": isinstance(trainer, LanguageTrainer) and trainer.packing is not None}

    def test(self, trainer: Any, data: LanguageData) -> Tested:
        """Each test example's summed loss over the mean number of target tokens: their mean is the loss a token."""
        output = trainer.predict(data.test)
        losses = output.predictions / output.label_ids.mean()
        return Tested(tuple(round(float(loss), 6) for loss in losses))

    def is_chat(self, config: TaskConfig, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Where there is a template, but for plain texts."""
        return config.task != "lm" and bool(tokenizer.chat_template)

    def samples(
        self, count: int, model: PeftModel, data: LanguageData, tokenizer: PreTrainedTokenizerBase
    ) -> list[dict[str, str]]:
        """As `answers`, for the first validation examples."""
        return answers(model, tokenizer, data.encoder, data.held_out, count)
