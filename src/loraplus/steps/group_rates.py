"""Rates as they stand in an optimizer's groups, as numbers or in tensors, and what the groups are called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch

from loraplus.parts import Role

Groups = Sequence[Mapping[str, Any]]


def in_form_of(given: Any, rate: Any) -> Any:
    """A rate as a number, or in a new tensor where one is in a tensor (capturable and compiled optimizers).

    Args:
        given: a number, or a tensor of one element.
        rate: the value; of a tensor's shape, device and dtype afterwards (float, where that one holds integers).
    """
    if isinstance(given, torch.Tensor):
        dtype = given.dtype if given.is_floating_point() else torch.get_default_dtype()
        return torch.full_like(given, float(rate), dtype=dtype, requires_grad=False)
    return rate


def group_labels(groups: Groups) -> list[str]:
    """The groups' names, made distinct: `lora_A`, `lora_B`, `lora_A.2`, …; "group <index>" where there is none.

    Example:
        >>> group_labels([{"name": "lora_A"}, {"name": "lora_A"}, {}])
        ['lora_A', 'lora_A.2', 'group 2']
    """
    labels: list[str] = []
    for index, group in enumerate(groups):
        name = label = str(group.get("name", f"group {index}"))
        number = 1
        while label in labels:
            number += 1
            label = f"{name}.{number}"
        labels.append(label)
    return labels


def reference_group(labels: Sequence[str]) -> int:
    """Index of the group that the others' rates are compared with: the first of A by name, else the first."""
    return next((index for index, label in enumerate(labels) if Role.A in label), 0)


def rate_as_number(rate: object) -> float | None:
    """A group's rate, in a tensor or not; None for what is no number (an optimizer that finds its own)."""
    if isinstance(rate, torch.Tensor):
        rate = rate.item()
    return float(rate) if isinstance(rate, Real) else None


def base_rate(group: Mapping[str, Any]) -> float | None:
    """The rate that a scheduler multiplies, or the present one where there is none."""
    return rate_as_number(group.get("initial_lr", group.get("lr")))
