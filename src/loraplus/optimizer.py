"""An ordinary torch optimizer whose parameter groups carry LoRA+ rates."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from loraplus.auto import install
from loraplus.errors import InvalidRateError, OptimizerSetupError
from loraplus.existing_groups import Groups, split_groups
from loraplus.groups import param_groups
from loraplus.notices import told_once
from loraplus.paper import LR_EMBEDDING, paper_groups
from loraplus.parts import EMBEDDINGS
from loraplus.rate_keywords import takes_rates
from loraplus.rates import Rates
from loraplus.roles import read_once, trainable_parameters
from loraplus.steps.group_rates import in_form_of
from loraplus.steps.step_probe import refusal, try_step, warn_unproved
from loraplus.watching.watch import watch_rates


@told_once()
@read_once()
@takes_rates(needed=["lr"])
def create_optimizer(
    model: nn.Module,
    optimizer_cls: type[torch.optim.Optimizer] = torch.optim.AdamW,
    *,
    rates: Rates,
    weight_decay: float | None = None,
    groups: Groups | None = None,
    prefix: str = "",
    **optimizer_kwargs: object,
) -> torch.optim.Optimizer:
    """Builds `optimizer_cls` over the trainable parameters with η_A = lr and η_B = lr_ratio·lr.

    With lr_ratio = 1 and no other rate it is plain `optimizer_cls`, bit for bit. bitsandbytes' 8-bit optimizers keep
    the states of embeddings in 32 bits, as bitsandbytes advises.

    With lr = "auto" the optimizer comes with `AutoRates`, which sets η_A and η_B while the model trains; it is the
    optimizer's `loraplus_auto`, and part of its state. A head then learns at 2e-3 and all else that is no factor at
    3e-4, unless given a rate.

    Args:
        model: a model with LoRA factors.
        optimizer_cls: any optimizer class that takes parameter groups with an `lr`.
        rates: a `Rates`, or its fields as keywords. A rate that is a tensor gives every group a tensor of its own.
        weight_decay: decay of all but biases and norms. None: the optimizer's own default, on every parameter.
        groups: parameter groups that exist already, to be split by role (`split_groups`); `lr` and `weight_decay` are
            then for groups that have none of their own.
        prefix: the model's name, put before the names of the groups.
        **optimizer_kwargs: passed on (betas, eps, fused, …).

    Returns:
        An instance of `optimizer_cls`.

    Raises:
        OptimizerSetupError: the class takes one group only (LBFGS), its step does not follow the rates of its groups
            (Prodigy, D-Adaptation), or it cannot train some parameter (Muon).
        InvalidRateError: groups beside lr = "auto".
        The errors of `param_groups`, of `split_groups` with groups, and of `AutoRates` with lr = "auto".

    Example:
        >>> optimizer = loraplus.create_optimizer(model, torch.optim.AdamW, lr=2e-4, lr_ratio=16.0)  # doctest: +SKIP
        >>> rates = loraplus.Rates(lr=2e-4, lr_ratio=16.0)  # the same as one object  # doctest: +SKIP
        >>> optimizer = loraplus.create_optimizer(model, torch.optim.AdamW, rates)  # doctest: +SKIP

    Source: Hayou, Ghosh, Yu, arXiv 2402.12354.
    """
    asked = rates
    if asked.auto:
        if groups is not None:
            raise InvalidRateError(
                'lr="auto" makes groups of its own, and groups= has rates of its own; give lr as a number, or leave '
                "groups out"
            )
        rates = asked.beside_automatic({entry.role for entry in trainable_parameters(model)})
    lr = in_form_of(rates.tensor, rates.lr_a)
    if groups is None:
        split = param_groups(model, rates, weight_decay, prefix=prefix)
    else:
        split = split_groups(model, groups, rates, prefix=prefix)
        if weight_decay is not None:
            optimizer_kwargs["weight_decay"] = weight_decay
    optimizer = build(model, optimizer_cls, split, lr=lr, **optimizer_kwargs)
    if asked.auto:
        install(model, optimizer, asked)
    return optimizer


def build(
    model: nn.Module, optimizer_cls: type[torch.optim.Optimizer], groups: list[dict[str, Any]], **kwargs: Any
) -> torch.optim.Optimizer:
    """Builds `optimizer_cls` over groups that are made already; `create_optimizer` without the making.

    Args:
        model: whose parameters the groups hold.
        optimizer_cls: the optimizer class.
        groups: of `param_groups`, `groups_for`, `split_groups` or `paper_groups`.
        **kwargs: passed on to the optimizer.

    Returns:
        An instance of `optimizer_cls`, with 32-bit states for embeddings if it has 8-bit ones. Where its groups have
        different rates its step is tried (`step_probe`).

    Raises:
        OptimizerSetupError: the class cannot take these groups, or its step does not follow their rates.
    """
    check_class(model, optimizer_cls)
    if getattr(optimizer_cls, "takes_model", False):  # it steps A and B together, and groups do not say which belong so
        kwargs["factors_of"] = model
    try:
        optimizer = optimizer_cls(groups, **kwargs)
    except (TypeError, ValueError) as error:
        name = getattr(optimizer_cls, "__name__", repr(optimizer_cls))
        raise OptimizerSetupError(f"{name} cannot be built over groups with these options: {error}") from error
    finish(model, optimizer)
    return optimizer


def finish(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """What `build` does with an optimizer that it has made; for one that somebody else made, over LoRA+ groups.

    Raises:
        OptimizerSetupError: its step does not follow the rates of its groups.
    """
    _keep_embeddings_in_32_bits(model, optimizer)
    trial = try_step(optimizer, {index: float(group["lr"]) for index, group in enumerate(optimizer.param_groups)})
    if trial.follows is False:
        raise OptimizerSetupError(refusal(optimizer, trial))
    if trial.follows is None:
        warn_unproved(optimizer, trial)
    watch_rates(model, optimizer)


def check_class(model: nn.Module, optimizer_cls: object) -> None:
    """Refuses classes that cannot take groups of several rates, or the model's parameters.

    Raises:
        OptimizerSetupError: see `build`.
    """
    if not isinstance(optimizer_cls, type):  # a factory: what it builds is tried
        return
    if issubclass(optimizer_cls, torch.optim.LBFGS):
        raise OptimizerSetupError(
            "LBFGS takes one parameter group, so A and B cannot have their own rates; use an optimizer that takes "
            "several, such as torch.optim.AdamW"
        )
    muon = getattr(torch.optim, "Muon", None)
    if muon is not None and issubclass(optimizer_cls, muon):
        others = [entry.name for entry in trainable_parameters(model) if entry.parameter.ndim != 2]
        if others:
            raise OptimizerSetupError(
                f"Muon trains matrices only, and {len(others)} trainable parameters are none (first: {others[0]}); "
                "freeze them, or give Muon the groups of loraplus.param_groups that hold matrices and AdamW the others "
                "(docs/optimizers.md)"
            )


def _keep_embeddings_in_32_bits(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Rows are seen rarely, and what 8 bits round off of their states does not average out."""
    if getattr(getattr(optimizer, "args", None), "optim_bits", 32) != 8:
        return
    from bitsandbytes.optim import GlobalOptimManager  # type: ignore[import-not-found]

    embeddings = [entry.parameter for entry in trainable_parameters(model) if entry.role in EMBEDDINGS]
    if embeddings:
        GlobalOptimManager.get_instance().override_config(embeddings, "optim_bits", 32)


@told_once()
@read_once()
def create_loraplus_optimizer(
    model: nn.Module,
    optimizer_cls: type[torch.optim.Optimizer],
    *,
    lr: float,
    loraplus_lr_ratio: float,
    loraplus_lr_embedding: float | None = None,
    loraplus_weight_decay: float | None = None,
    weight_decay: float | None = None,
    paper_compatible: bool = False,
    **optimizer_kwargs: object,
) -> torch.optim.Optimizer:
    """PEFT's `create_loraplus_optimizer`, to be adopted by changing the import.

    It differs from PEFT's where that is wrong by measurement: only B gets B's rate (not norms, biases or DoRA
    magnitudes), embedding factors learn at `lr` (not 1e-6), no group is empty, and `weight_decay` is honoured.
    `paper_compatible` gives the authors' and PEFT's grouping instead, for runs that must be comparable with theirs.

    Args:
        model: a model with LoRA factors.
        optimizer_cls: the optimizer class.
        lr: η_A.
        loraplus_lr_ratio: λ = η_B / η_A.
        loraplus_lr_embedding: rate of embedding factors and rows. Default: lr; the authors' 1e-6 if paper_compatible.
            As in PEFT it may be given for a model that has none, so that one configuration serves several.
        loraplus_weight_decay: PEFT's name for weight_decay; 0 if neither is given, as in PEFT.
        weight_decay: decay of all but biases and norms.
        paper_compatible: group exactly as the authors do (`paper.paper_groups`).
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
    if paper_compatible:
        lr_embedding = LR_EMBEDDING if loraplus_lr_embedding is None else loraplus_lr_embedding
        groups = paper_groups(model, lr, loraplus_lr_ratio, decay, lr_embedding)
        return build(model, optimizer_cls, groups, lr=lr, **optimizer_kwargs)
    rates = Rates(lr, loraplus_lr_ratio, loraplus_lr_embedding)  # refused where it cannot be used, in use or not
    if not any(entry.role in EMBEDDINGS for entry in trainable_parameters(model)):
        rates = Rates(lr, loraplus_lr_ratio)
    return create_optimizer(model, optimizer_cls, rates, weight_decay=decay, **optimizer_kwargs)
