"""Puts several examples into one row, each as if alone: its positions start at 0, and attention stays within it.

TRL packs the whole data set and lays a batch out as one row, which only attention kernels for rows of unequal length
take at linear cost. Here the examples of a batch are packed, into rows of at most the longest length: a step has the
examples, and the loss, that it would have without packing, and any attention kernel will do.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from loraplus.tasks.target_rows import IGNORED

_CHECKED = 6  # tokens of an example in the check
_CLOSE = 1e-4


def best_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Best fit decreasing: the longest first, each into the fullest row that has room for it.

    Args:
        lengths: of the examples, none above `room`.
        room: of a row.

    Returns:
        The indices of the examples in each row.

    Example:
        >>> best_fit([2, 5, 3], room=5)
        [[1], [2, 0]]
    """
    rows: list[list[int]] = []
    left: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = [row for row, space in enumerate(left) if space >= lengths[index]]
        if not fits:
            rows.append([])
            left.append(room)
            fits = [len(rows) - 1]
        row = min(fits, key=lambda row: left[row])
        rows[row].append(index)
        left[row] -= lengths[index]
    return rows


class PackingCollator(DataCollatorForLanguageModeling):
    """TRL's collator for rows of several examples. Their positions start at 0, which keeps them apart.

    Args:
        room: tokens of a row.
        pad_token_id: fills rows up.
        pad_to_multiple_of: of the batch's width.
    """

    def __init__(self, room: int, pad_token_id: int, pad_to_multiple_of: int | None) -> None:
        super().__init__(pad_token_id, return_position_ids=True, pad_to_multiple_of=pad_to_multiple_of)
        self.room = room

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch of packed rows; padding stands at position 0, so it is a sequence of its own.

        Args:
            examples: {"input_ids", "labels"}, lists of token ids of one length.

        Returns:
            {"input_ids", "labels", "position_ids"}, each (rows, longest row).
        """
        rows = []
        for row in best_fit([len(example["input_ids"]) for example in examples], self.room):
            chosen = [examples[i] for i in row]
            rows.append(
                {
                    "input_ids": [token for example in chosen for token in example["input_ids"]],
                    "labels": [label for example in chosen for label in [IGNORED, *example["labels"][1:]]],
                    "seq_lengths": [len(example["input_ids"]) for example in chosen],
                }
            )
        batch = super().torch_call(rows)
        del batch["attention_mask"]  # a model looks at the positions only if there is none
        return batch


@torch.no_grad()
def keeps_apart(model: Any) -> bool:
    """Tries whether a model keeps the examples of a packed row apart.

    Not every model does: some attention layers and all recurrent ones look at the row as a whole.

    Args:
        model: a causal language model.
    """
    if "position_ids" not in inspect.signature(model.get_base_model().forward).parameters:
        return False
    training = model.training
    model.eval()
    try:
        generator = torch.Generator().manual_seed(0)
        size = (2, _CHECKED)
        first, other, second = (
            torch.randint(model.config.get_text_config().vocab_size, size, generator=generator) for _ in range(3)
        )
        after_first, after_other = (_after(model, before, second) for before in (first, other))
        alone = model(input_ids=second.to(model.device), use_cache=False).logits.float()
        scale = alone.abs().max().item() or 1.0
        # Both runs have an example in front: a run without one would have other shapes, and so other rounding.
        leaks = (after_first - after_other).abs().max().item() > _CLOSE * scale
        differs = (after_first - alone).abs().max().item() > _rounding(model) * scale
        return not (leaks or differs)
    finally:
        model.train(training)


def _after(model: Any, before: torch.Tensor, example: torch.Tensor) -> torch.Tensor:
    """What the model makes of examples that stand behind others in their rows.

    Args:
        model: causal language model.
        before, example: token ids (rows, checked tokens).

    Returns:
        Logits of `example` (rows, checked tokens, vocabulary).
    """
    positions = torch.arange(_CHECKED).repeat(2).expand(len(before), -1)
    row = torch.cat([before, example], dim=1)
    logits = model(input_ids=row.to(model.device), position_ids=positions.to(model.device), use_cache=False).logits
    return logits[:, _CHECKED:].float()


def _rounding(model: nn.Module) -> float:
    """How far rounding may move a logit, relative to the largest one."""
    return 1e-3 if model.dtype == torch.float32 and not getattr(model, "is_loaded_in_4bit", False) else 5e-2
