"""An ordinary torch optimizer whose parameter groups carry LoRA+ rates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from loraplus.errors import InvalidRateError
from loraplus.groups import param_groups
from loraplus.rates import DEFAULT_LR_RATIO


def create_optimizer(
    model: nn.Module,
    optimizer_cls: type[torch.optim.Optimizer] = torch.optim.AdamW,
    *,
    lr: float,
    lr_ratio: float = DEFAULT_LR_RATIO,
    weight_decay: float | None = None,
    lr_embedding: float | None = None,
    lr_head: float | None = None,
    lr_magnitude: float | None = None,
    lr_overrides: Mapping[str, float] | None = None,
    **optimizer_kwargs: Any,
) -> torch.optim.Optimizer:
    """Builds `optimizer_cls` over the trainable parameters with η_A = lr and η_B = lr_ratio·lr.

    With lr_ratio = 1 and no other rate it is plain `optimizer_cls`, bit for bit.

    Args:
        model: a model with LoRA factors.
        optimizer_cls: any optimizer class that takes parameter groups with an `lr`.
        lr: η_A, in the optimizer's own unit.
        lr_ratio: λ = η_B / η_A.
        weight_decay: decay of all but biases and norms. None: the optimizer's own default, on every parameter.
        lr_embedding, lr_head, lr_magnitude, lr_overrides: as in `param_groups`.
        **optimizer_kwargs: passed on (betas, eps, fused, …).

    Returns:
        An instance of `optimizer_cls`.

    Raises:
        The errors of `param_groups`.

    Example:
        >>> optimizer = loraplus.create_optimizer(model, torch.optim.AdamW, lr=2e-4, lr_ratio=16.0)  # doctest: +SKIP

    Source: Hayou, Ghosh, Yu, arXiv 2402.12354.
    """
    groups = param_groups(
        model, lr, lr_ratio, weight_decay,
        lr_embedding=lr_embedding, lr_head=lr_head, lr_magnitude=lr_magnitude, lr_overrides=lr_overrides,
    )  # fmt: skip
    return optimizer_cls(groups, lr=lr, **optimizer_kwargs)  # type: ignore[call-arg]


def create_loraplus_optimizer(
    model: nn.Module,
    optimizer_cls: type[torch.optim.Optimizer],
    *,
    lr: float,
    loraplus_lr_ratio: float,
    loraplus_lr_embedding: float | None = None,
    loraplus_weight_decay: float | None = None,
    weight_decay: float | None = None,
    **optimizer_kwargs: Any,
) -> torch.optim.Optimizer:
    """PEFT's `create_loraplus_optimizer`, to be adopted by changing the import.

    It differs from PEFT's where that is wrong by measurement: only B gets B's rate (not norms, biases or DoRA
    magnitudes), embedding factors learn at `lr` (not 1e-6), no group is empty, and `weight_decay` is honoured.

    Args:
        model: a model with LoRA factors.
        optimizer_cls: the optimizer class.
        lr: η_A.
        loraplus_lr_ratio: λ = η_B / η_A.
        loraplus_lr_embedding: rate of embedding factors and rows. Default: lr.
        loraplus_weight_decay: PEFT's name for weight_decay; 0 if neither is given, as in PEFT.
        weight_decay: decay of all but biases and norms.
        **optimizer_kwargs: passed on to the optimizer.

    Returns:
        An instance of `optimizer_cls`.

    Raises:
        InvalidRateError: `weight_decay` and `loraplus_weight_decay` are both given and differ; else as `param_groups`.
    """
    if weight_decay is not None and loraplus_weight_decay not in (None, weight_decay):
        raise InvalidRateError(
            f"weight_decay = {weight_decay} and loraplus_weight_decay = {loraplus_weight_decay} contradict; give one"
        )
    decay = next((value for value in (weight_decay, loraplus_weight_decay) if value is not None), 0.0)
    return create_optimizer(
        model, optimizer_cls, lr=lr, lr_ratio=loraplus_lr_ratio, weight_decay=decay,
        lr_embedding=loraplus_lr_embedding, **optimizer_kwargs,
    )  # fmt: skip
