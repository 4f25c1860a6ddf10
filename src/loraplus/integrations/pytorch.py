"""LoRA+ in a training loop of your own: every group's rate for the log, and a guard on loading a checkpoint."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from loraplus.errors import LoraPlusWarning, ResumeMismatchError
from loraplus.groups import rate_of_group
from loraplus.integrations.checkpoints import LOOP_WAY, OF_PARAMETERS_SHAPE, refuse_other_parameters
from loraplus.steps.group_rates import Groups, base_rate, group_labels, reference_group
from loraplus.steps.wrappers import unwrapped
from loraplus.watching.watch import watch_rates

_RELATIVE_TOLERANCE = 1e-6
_RECORD = "loraplus"  # in the optimizer's state, beside torch's "state" and "param_groups"


def rates_for_log(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Every group's rate at this moment, under the names that all stacks log: `lr/lora_A`, `lr/lora_B`, …

    Args:
        optimizer: with named groups, wrapped or not.

    Returns:
        Each rate by its name in the logs. Call it before the scheduler moves on, for the rates of the step just taken.
        Groups of one name are told apart by a number, `lr/lora_A`, `lr/lora_A.2`, in the order in which they stand.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> rates_for_log(torch.optim.SGD([{"params": [weight], "name": "lora_B", "lr": 0.016}]))
        {'lr/lora_B': 0.016}
    """
    groups = optimizer.param_groups
    return {
        f"lr/{label}": rate_of_group(optimizer, group) or 0.0
        for label, group in zip(group_labels(groups), groups, strict=True)
    }


def guard_resume(optimizer: torch.optim.Optimizer, model: nn.Module | None = None) -> RemovableHandle:
    """Makes `optimizer.load_state_dict` refuse a state that was trained at another ratio or lr, or of other parameters.

    torch takes the rates of the state that it loads, so a run resumed under others would go on at the old ones. Where
    no scheduler notes the base rates, another lr may be another point of a schedule set by hand: that is a warning.
    And torch tells parameters by their number, so other layers of the same count would be given each other's state.

    Args:
        optimizer: with named groups, as `loraplus.create_optimizer` makes them.
        model: whose parameters' names are kept in the optimizer's state, and compared. Not needed for an optimizer that
            loraplus built; without names, the groups and the parameters' number and shapes are compared.

    Returns:
        A handle whose `.remove()` takes the guard off.

    Raises:
        ResumeMismatchError: from `load_state_dict`; groups of other names, other parameters in them, or groups at other
            rates.

    Example:
        >>> optimizer = loraplus.create_optimizer(model, lr=2e-4, lr_ratio=16)  # doctest: +SKIP
        >>> guard_resume(optimizer)  # doctest: +SKIP
        >>> optimizer.load_state_dict(checkpoint["optimizer"])  # doctest: +SKIP
    """
    watch = watch_rates(model, optimizer)
    names = {} if watch is None else watch.members.names()

    def keep(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        places = _places(_names(optimizer.param_groups, names), optimizer.param_groups)
        if places is not None:
            state[_RECORD] = {"parameters": places}

    def refuse(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
        groups, saved = optimizer.param_groups, state["param_groups"]
        _refuse_other_groups(groups, saved)
        record = state.get(_RECORD)
        was = record["parameters"] if record else _places([group.get("param_names") for group in saved], saved)
        here = _places(_names(groups, names), groups)
        if was is not None and here is not None:
            refuse_other_parameters(was, here, "the checkpoint", LOOP_WAY)
        _refuse_other_shapes(groups, state)
        _refuse_other_rates(groups, saved)

    if not hasattr(optimizer, "_optimizer_load_state_dict_pre_hooks"):
        optimizer = unwrapped(optimizer)
    loading, saving = optimizer._optimizer_load_state_dict_pre_hooks, optimizer._optimizer_state_dict_post_hooks
    handle = RemovableHandle(loading, extra_dict=saving)  # one for both
    loading[handle.id], saving[handle.id] = refuse, keep
    return handle


def _names(groups: Groups, names: Mapping[int, str]) -> list[Any]:
    """The parameters' names, group by group; None for a group with one that is not known."""
    by_group = [group.get("param_names") or [names.get(id(member)) for member in group["params"]] for group in groups]
    return [None if None in members else members for members in by_group]


def _places(members: Sequence[Sequence[str] | None], groups: Groups) -> dict[str, str] | None:
    """{name of a parameter: label of its group}, if all are known."""
    places: dict[str, str] = {}
    for label, names in zip(group_labels(groups), members, strict=True):
        if names is None:
            return None
        places |= dict.fromkeys(names, label)
    return places


def _refuse_other_groups(groups: Groups, saved_groups: Groups) -> None:
    now, saved = group_labels(groups), group_labels(saved_groups)
    if now != saved:
        raise ResumeMismatchError(
            f"the checkpoint's optimizer has the groups {', '.join(saved)}, this run's has {', '.join(now)}; resume "
            f"with the settings that it was trained with, {LOOP_WAY}"
        )
    for label, group, saved_group in zip(now, groups, saved_groups, strict=True):
        here, there = len(group["params"]), len(saved_group["params"])
        if here != there:
            raise ResumeMismatchError(
                f"the checkpoint was trained with {there} parameters in {label}, this run has {here}; resume with the "
                f"adapter, target modules and frozen parameters that it was trained with, {LOOP_WAY}"
            )


def _refuse_other_shapes(groups: Groups, state: Mapping[str, Any]) -> None:
    """Parameters that cannot be those of the checkpoint, told from the states of their own shape."""
    wrong, count = [], 0
    for label, group, saved in zip(group_labels(groups), groups, state["param_groups"], strict=True):
        for index, (parameter, key) in enumerate(zip(group["params"], saved["params"], strict=True)):
            values = state["state"].get(key) or {}
            shapes = [tuple(values[n].shape) for n in OF_PARAMETERS_SHAPE if isinstance(values.get(n), torch.Tensor)]
            count += 1
            if shapes and tuple(parameter.shape) not in shapes:
                wrong.append(f"number {index} of {label}, {shapes[0]} there and {tuple(parameter.shape)} here")
    if wrong:
        raise ResumeMismatchError(
            f"{len(wrong)} of {count} parameters have another shape in the checkpoint (first: {wrong[0]}); resume with "
            f"the adapter, rank and target modules that it was trained with, {LOOP_WAY}"
        )


def _refuse_other_rates(groups: Groups, saved_groups: Groups) -> None:
    labels = group_labels(groups)
    now, saved = ([base_rate(group) or 0.0 for group in each] for each in (groups, saved_groups))
    lr, old_lr = now[reference_group(labels)], saved[reference_group(labels)]
    if not (lr and old_lr):  # in a warm-up set by hand, without initial_lr: a rate of 0 says nothing of the ratio
        return
    for label, rate, old_rate in zip(labels, now, saved, strict=True):
        if not math.isclose(rate / lr, old_rate / old_lr, rel_tol=_RELATIVE_TOLERANCE):
            raise ResumeMismatchError(
                f"the checkpoint was trained with {label} at {old_rate / old_lr:.6g} times A's rate, this run asks for "
                f"{rate / lr:.6g}; resume with {old_rate / old_lr:.6g}, {LOOP_WAY}"
            )
    if not math.isclose(lr, old_lr, rel_tol=_RELATIVE_TOLERANCE):
        # OneCycleLR notes a base rate of its own, which this run may not have yet.
        if all("initial_lr" in group and "max_lr" not in group for group in saved_groups):
            raise ResumeMismatchError(
                f"the checkpoint was trained with lr = {old_lr:.6g}, this run asks for {lr:.6g}; resume with "
                f"lr = {old_lr:.6g}, {LOOP_WAY}"
            )
        warnings.warn(
            f"the checkpoint stood at lr = {old_lr:.6g}, this run at {lr:.6g}: unless your loop sets the rate at every "
            f"step, it goes on at {old_lr:.6g}",
            LoraPlusWarning,
            stacklevel=5,
        )
