"""Parameters that are different objects on one memory: views, transposes, ties that a library made by hand.

PEFT's `ensure_weight_tying` makes `lora_embedding_A` of the embedding the transpose of `lora_B` of the output layer.
Each has a gradient of its own, and a step of either moves both.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch


class _Span(NamedTuple):
    place: int
    tensor: torch.Tensor
    first: int  # byte in its storage
    last: int


def overlapping(tensors: Sequence[torch.Tensor]) -> list[list[int]]:
    """Places of tensors that have an element in common, in groups of two and more, each in order.

    Tensors without memory of their own (meta, ZeRO-3's and FSDP's empty ones, some quantised ones) overlap with none;
    of a DTensor the local part counts.

    Args:
        tensors: of any shapes and strides.

    Example:
        >>> one = torch.zeros(4, 2)
        >>> overlapping([one, torch.zeros(2, 4), one.T, one[:2]])
        [[0, 2, 3]]
        >>> overlapping([one[:, :1], one[:, 1:]])
        []
    """
    by_storage: dict[tuple[torch.device, int], list[_Span]] = defaultdict(list)
    for place, tensor in enumerate(tensors):
        span = _span(place, tensor)
        if span is not None:
            storage = span.tensor.untyped_storage()
            by_storage[span.tensor.device, storage.data_ptr()].append(span)
    groups: list[set[int]] = []
    for spans in by_storage.values():
        for index, one in enumerate(spans):
            for other in spans[index + 1 :]:
                if _overlap(one, other):
                    joined = {one.place, other.place}
                    apart = [group for group in groups if not group & joined]
                    groups = [*apart, joined.union(*(group for group in groups if group & joined))]
    return sorted(sorted(group) for group in groups)


def _span(place: int, tensor: torch.Tensor) -> _Span | None:
    """The bytes that a tensor of any shape (…) reaches over in its storage; None if it has no memory of its own."""
    local = getattr(tensor, "_local_tensor", tensor)
    try:
        if local.is_meta or not local.numel() or not local.untyped_storage().data_ptr():
            return None
        first = int(local.storage_offset())
        reach = sum((int(size) - 1) * int(stride) for size, stride in zip(local.shape, local.stride(), strict=True))
    except (RuntimeError, NotImplementedError):  # a subclass without storage
        return None
    return _Span(place, local, first * local.element_size(), (first + reach + 1) * local.element_size())


def _overlap(one: _Span, other: _Span) -> bool:
    if one.last <= other.first or other.last <= one.first:
        return False
    if one.tensor.element_size() != other.tensor.element_size():
        return True
    # Columns of one matrix lie between each other without meeting, so the elements themselves are looked at.
    size = one.tensor.element_size()
    first = min(one.first, other.first)
    mask = torch.zeros((max(one.last, other.last) - first) // size, dtype=torch.bool)

    def elements(span: _Span) -> torch.Tensor:  # of the span's own shape (…)
        return mask.as_strided(span.tensor.shape, span.tensor.stride(), (span.first - first) // size)

    elements(one).fill_(True)
    return bool(elements(other).any())
