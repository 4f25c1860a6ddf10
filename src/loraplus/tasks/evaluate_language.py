"""Loss and perplexity of an adapted language model on data kept aside, as training measures them, and of its base."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
from typing import Any

import torch
from transformers import TrainerCallback
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from loraplus.errors import InputError
from loraplus.files.commands import DATA_FILE
from loraplus.files.output import saved_config
from loraplus.files.paths import user_path
from loraplus.files.scratch import scratch_folder
from loraplus.tasks.config import LONG_EXAMPLES, LOSS_ON
from loraplus.tasks.conversations import NamedColumns, read_examples
from loraplus.tasks.encoding import Encoder, loss_on
from loraplus.tasks.language import LanguageModelling, encoded_splits, longest_within
from loraplus.tasks.language_trainer import LanguageTrainer
from loraplus.tasks.pretrained import check_tokens, padding_multiple
from loraplus.tasks.table import Table
from loraplus.tasks.target_rows import TargetRows, fit, how_to_fit

_SHORTEST, _LONGEST = 2, 2**31 - 1  # tokens


@dataclass(frozen=True)
class KeptAside:
    """Examples to be measured on, as tokens, and what is to be told of them."""

    rows: TargetRows
    max_length: int
    facts: Mapping[str, Any]
    notes: tuple[str, ...] = ()


def kept_aside(
    table: Table, adapter: str, tokenizer: Any, facts: Mapping[str, Any], named: NamedColumns, base: str
) -> KeptAside:
    """The examples of a table, encoded as those of training were.

    Args:
        table: from `read_table`.
        adapter: folder; what it says of its training decides task and columns.
        tokenizer: of the adapter, with its chat template.
        facts: of the data of training; may be empty.
        named: columns to take instead.
        base: name of the base model, for messages.

    Raises:
        InputError: data that cannot be used; the message names the file, column or line.
    """
    _check_facts(facts, adapter)
    saved = saved_config(user_path(adapter)) or {}
    task = "lm" if saved.get("task") == "lm" else "sft"
    if not any(astuple(named)):
        names = (saved.get(f"{what}_column") for what in ("text", "messages", "prompt", "completion"))
        named = NamedColumns(*(name if isinstance(name, str) and name in table.columns else None for name in names))
    examples = read_examples(table, task, named=named, as_chat=bool(tokenizer.chat_template))
    is_alike = facts.get("format", examples.kind) == examples.kind
    notes = [] if is_alike else [f"the adapter was trained on data of another kind, {facts['format']}"]
    on = loss_on(facts.get("loss_on") if is_alike else None, examples.kind)
    how = how_to_fit(facts.get("long_examples") if is_alike else None, task, examples.kind)
    (encoded,), _ = encoded_splits([examples.rows], Encoder(tokenizer, base, examples, on))
    max_length = facts.get("max_length") or longest_within(int(encoded.lengths.max()), tokenizer)
    fitted = fit(encoded, max_length, how)
    if not len(fitted.rows):
        raise InputError(f"{table.source}: no example has a token to be measured on within {max_length} tokens")
    if saved.get("load_in_4bit"):
        notes.append("the base model is in full precision here; training had it in 4 bits")
    told = {
        "format": examples.kind, "columns": examples.columns, "loss_on": on, "examples": len(table),
        "target_tokens": fitted.targets, "max_length": max_length, "longer_than_context": fitted.longer,
        "long_examples": how, "tokens_cut": fitted.cut, "examples_dropped": fitted.dropped,
        "largest_token": fitted.largest,
    }  # fmt: skip
    return KeptAside(fitted.rows.by_length(), max_length, told, tuple(notes))


def _check_facts(facts: Mapping[str, Any], adapter: str) -> None:
    """Refuses what a damaged file says of the training data."""
    length = facts.get("max_length", _SHORTEST)
    known = {"loss_on": LOSS_ON, "long_examples": LONG_EXAMPLES}
    wrong = [name for name, values in known.items() if name in facts and facts[name] not in values]
    if type(length) is not int or not _SHORTEST <= length <= _LONGEST:
        wrong.append("max_length")
    if wrong:
        raise InputError(f"{DATA_FILE} of {adapter} is damaged: {wrong[0]} is {facts[wrong[0]]!r}")


def losses(
    model: Any, tokenizer: Any, data: KeptAside, *, batch_size: int, on_batch: Callable[[int], None] | None = None
) -> dict[str, Any]:
    """Mean loss over all target tokens and its perplexity, of the adapted model and of its base.

    Args:
        model: from `load_causal`, with an adapter.
        tokenizer: from there.
        data: from `kept_aside`.
        batch_size: examples at once.
        on_batch: told how many more rows are done; there are two passes.

    Returns:
        {"loss", "perplexity", "base": {"loss", "perplexity"}}

    Raises:
        InputError: tokens that the model does not know.
        NoLoraFactorsError: the adapter is none of LoRA.
    """
    check_tokens(model, data.facts["largest_token"], "this model")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.set_adapter(model.active_adapter)  # as in training: a trainer of a model that trains nothing is refused
    pad, multiple = tokenizer.pad_token_id, padding_multiple(data.max_length, tokenizer)
    with scratch_folder() as scratch:
        trainer = LanguageTrainer(
            model=model,
            train_dataset=data.rows,
            eval_dataset=data.rows,
            data_collator=DataCollatorForLanguageModeling(pad or 0, pad_to_multiple_of=multiple),
            processing_class=tokenizer,
            packing=None,
            args=LanguageModelling().arguments(
                output_dir=scratch,
                per_device_eval_batch_size=batch_size,
                use_cpu=not torch.accelerator.is_available(),
                report_to="none",
                disable_tqdm=True,
            ),
            callbacks=[_Rows(on_batch, batch_size, len(data.rows))] if on_batch else [],
        )
        adapted = trainer.answers(data.rows).metrics
        with model.disable_adapter():
            base = trainer.answers(data.rows).metrics
    return {**_figures(adapted), "base": _figures(base)}


def _figures(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: metrics[f"eval_{name}"] for name in ("loss", "perplexity")}


class _Rows(TrainerCallback):
    """Tells how many more rows were evaluated; a last batch may be smaller."""

    def __init__(self, on_batch: Callable[[int], None], batch_size: int, rows: int) -> None:
        self._on_batch, self._batch_size, self._rows = on_batch, batch_size, rows
        self._left = rows

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        done = min(self._batch_size, self._left)
        self._left = self._left - done or self._rows  # another pass
        self._on_batch(done)
