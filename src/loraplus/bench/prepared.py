"""Model and data of a comparison: the examples that every arm trains on, and fresh models.

Length grouping makes batches of a pool. Sorted by length they are cut into parts, and one of each part is run. Arms
that do not group draw random batches from the same examples. So all arms train on the same examples, and their lengths
are those of the pool.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from loraplus.tasks.config import CLASSIFICATION, DEFAULT_LR, TaskConfig

_POOL = 50  # batches; as many as transformers sorts together at most


@dataclass
class Prepared:
    """What the arms have in common.

    Args:
        config: Model, data, adapter, batch.
        task: Of --task.
        tokenizer: Of the model.
        data: The task's.
        pool: Batches of rows, as length grouping makes them.
        tokens_of: Tokens of each row of the data.
        batches: Of a turn, at most.
        lr: η_A.
    """

    config: TaskConfig
    task: Any
    tokenizer: Any
    data: Any
    pool: list[list[int]]
    tokens_of: Sequence[int]
    batches: int
    lr: float = DEFAULT_LR

    @property
    def order(self) -> list[int]:
        """Rows of a turn, batch by batch: of each part of the pool, sorted by tokens, the batch nearest to its mean."""
        ends = [i * len(self.pool) // self.batches for i in range(self.batches + 1)]
        parts = [self.pool[start:end] for start, end in itertools.pairwise(ends) if start < end]
        return [row for part in parts for row in self._nearest_to_mean(part)]

    def _nearest_to_mean(self, part: list[list[int]]) -> list[int]:
        tokens = [sum(self.tokens_of[row] for row in batch) for batch in part]
        mean = sum(tokens) / len(tokens)
        return part[min(range(len(part)), key=lambda place: abs(tokens[place] - mean))]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row of `order`."""
        return [int(self.tokens_of[row]) for row in self.order]

    def with_batches(self, batches: int) -> Prepared:
        """The same with shorter turns."""
        return replace(self, batches=max(1, batches))

    @property
    def examples(self) -> int:
        """Of a turn."""
        return len(self.order)

    @property
    def tokens(self) -> int:
        """Of a turn; padding does not count."""
        return sum(self.lengths)

    @property
    def steps(self) -> int:
        """Of a turn."""
        return -(-self.examples // self.config.batch_size)

    def rows(self, *, grouped: bool) -> Any:
        """The examples of a turn; in the order of their batches, or in that of the data."""
        order, rows = self.order if grouped else sorted(self.order), self.data.train
        return rows.select(order) if hasattr(rows, "select") else [rows[i] for i in order]

    def model(self, *, dropout: bool, lora_dropout: float) -> Any:
        """A fresh model with its adapter: the same weights every time."""
        from loraplus.tasks.model import without_dropout

        config = replace(self.config, lora_dropout=lora_dropout)
        model = self.task.load_model(config, self.data, self.tokenizer, self.config.seed)
        if not dropout:
            without_dropout(model)
        return model

    def collator(self) -> Any:
        """Pads each batch to its longest text."""
        if self.config.task == CLASSIFICATION:
            from transformers import DataCollatorWithPadding

            return DataCollatorWithPadding(self.tokenizer)
        from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

        return DataCollatorForLanguageModeling(self.tokenizer.pad_token_id)


def prepare(config: TaskConfig, batches: int) -> Prepared:
    """Reads the data of a run, and chooses the examples of a turn.

    Args:
        config: Model and data.
        batches: Of a turn, at most.

    Raises:
        InputError: as `loraplus train` does.
    """
    from loraplus.tasks.data_parallel import OrderByPass
    from loraplus.tasks.task import task_of
    from loraplus.tasks.training import total_steps

    task = task_of(config)
    tokenizer = task.load_tokenizer(config)
    data = task.load_data(config, tokenizer)
    total_steps(config, len(data.train))
    known = getattr(data.train, "lengths", None)
    lengths = [len(ids) for ids in data.train["input_ids"]] if known is None else known
    size = config.batch_size
    order = list(OrderByPass(lengths, size, lambda: config.seed))[: _POOL * size]
    whole = [order[i : i + size] for i in range(0, len(order) - size + 1, size)] or [order]
    whole.sort(key=lambda batch: -sum(lengths[row] for row in batch))
    return Prepared(config, task, tokenizer, data, whole, lengths, max(1, batches))
