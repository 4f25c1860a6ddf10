r"""How far one optimizer step moves what each adapted layer puts out, and whether A or B is stuck.

`feature_updates` tries one step beside the training, `UpdateMonitor` watches those of the training. Both give a
`FeatureUpdates`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from loraplus.errors import InputError
from loraplus.groups import rate_of_group
from loraplus.optimizer import create_optimizer
from loraplus.rates import DEFAULT_LR_RATIO
from loraplus.steps.group_rates import in_form_of
from loraplus.steps.layer_updates import FeatureUpdates
from loraplus.steps.movement import adapted_layers, factors, movements
from loraplus.steps.recorder import Recorder
from loraplus.steps.step_watcher import StepWatcher, torch_optimizer
from loraplus.steps.twin import step_of, twin_over


def feature_updates(
    model: nn.Module,
    batch: Mapping[str, Any],
    optimizer: torch.optim.Optimizer | None = None,
    *,
    lr: float = 2e-4,
    lr_ratio: float = DEFAULT_LR_RATIO,
    steps: int | None = None,
    loss: Callable[[nn.Module, Mapping[str, Any]], torch.Tensor] | None = None,
) -> FeatureUpdates:
    """Measures δ1, δ2 and δ3 of one optimizer step in every adapted layer, and takes the step back.

    δ1 = s·RMS(B ΔA x) / RMS(y), δ2 = s·RMS(ΔB A x) / RMS(y), δ3 = s·RMS(ΔB ΔA x) / RMS(y)

    Weights, buffers (BatchNorm's statistics), gradients, optimizer and random numbers are as before afterwards.

    Args:
        model: a PEFT model with trainable factors, in training or fresh.
        batch: keyword arguments of the model, on its device.
        optimizer: the one in use: its next step at its present rates (those of `AutoRates`, where it sets them) is
            measured. None: a new AdamW.
        lr: η_A of the new AdamW.
        lr_ratio: λ of the new AdamW.
        steps: steps taken on the batch, of which the last is measured. Default: 1 with an optimizer, else 5: in a
            fresh adapter B is zero, and A cannot move before B has.
        loss: takes (model, batch), returns a scalar. Default: `model(**batch).loss`.

    Returns:
        A `FeatureUpdates`: print it, or take `.to_dict()`.

    Raises:
        NoLoraFactorsError: no layer to measure.
        TrainerSetupError: `optimizer` is no torch optimizer.
        InputError: the batch gives no loss, or `steps` is below 1.

    Example:
        >>> print(loraplus.feature_updates(model, batch, optimizer))  # doctest: +SKIP

    Source: Hayou, Ghosh, Yu, arXiv 2402.12354, section 3.
    """
    layers = adapted_layers(model)
    steps = (1 if optimizer is not None else 5) if steps is None else steps
    if steps < 1:
        raise InputError(f"steps must be 1 or more, got {steps}")
    twin = create_optimizer(model, lr=lr, lr_ratio=lr_ratio) if optimizer is None else _twin_in_place(optimizer)
    recorder = Recorder(model, layers)
    before: list[torch.Tensor] = []
    with torch.random.fork_rng(), _model_kept(model), recorder.alone():
        try:
            for step in range(steps):
                recorder.on = step == steps - 1
                before = [weight.detach().clone() for weight in factors(layers)]
                twin.zero_grad()
                with torch.enable_grad():
                    value = loss(model, batch) if loss else getattr(model(**batch), "loss", None)
                    if value is None:
                        raise InputError("the model gives no loss for this batch; add its labels, or pass loss=")
                    value.backward()
                step_of(twin)
            moved = movements(layers, recorder.samples, before)
        finally:
            recorder.remove()
    return FeatureUpdates.from_movements(layers, moved, _at_rest(twin))


class UpdateMonitor(StepWatcher):
    """Measures δ1, δ2 and δ3 of the steps that training takes, every so many; the rates are left alone.

    Args:
        model: a PEFT model.
        optimizer: the one that trains it.
        every: steps from one measurement to the next.

    Raises:
        NoLoraFactorsError: no layer to measure.
        InputError: `every` is below 1.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, every: int = 50) -> None:
        if every < 1:
            raise InputError(f"a measurement every {every} steps cannot be made; give 1 or more")
        super().__init__(model, optimizer)
        self.updates: FeatureUpdates | None = None
        self._every, self._steps = every, 0
        self._before: list[torch.Tensor] = []
        self._recorder.on = True

    def _before_step(self) -> None:
        if self._recorder.on:
            self._before = [weight.detach().clone() for weight in factors(self._layers)]

    def _after_step(self) -> None:
        if self._before:
            moved = movements(self._layers, self._recorder.samples, self._before)
            if moved:
                self.updates = FeatureUpdates.from_movements(self._layers, moved, _at_rest(self._optimizer))
        self._before = []
        self._recorder.forget()
        self._steps += 1
        self._recorder.on = self._steps % self._every == 0


def _at_rest(optimizer: torch.optim.Optimizer) -> set[int]:
    """The ids of the parameters whose rate is 0 now."""
    groups = (group for group in optimizer.param_groups if rate_of_group(optimizer, group) == 0)
    return {id(parameter) for group in groups for parameter in group["params"]}


def _twin_in_place(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """A twin over the same parameters, with a state of its own, at the rates of this moment."""
    optimizer = torch_optimizer(optimizer)
    twin = twin_over(optimizer, {p: p for group in optimizer.param_groups for p in group["params"]})
    groups = [group for group in optimizer.param_groups if group["params"]]
    for group, own in zip(twin.param_groups, groups, strict=True):
        group["lr"] = in_form_of(own["lr"], rate_of_group(optimizer, own) or 0.0)
    return twin


@contextmanager
def _model_kept(model: nn.Module) -> Iterator[None]:
    kept = [(p, p.detach().clone(), p.grad) for p in model.parameters() if p.requires_grad]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    for parameter, _, _ in kept:
        parameter.grad = None
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value, gradient in kept:
                parameter.copy_(value)
                parameter.grad = gradient
            for buffer, value in buffers:
                buffer.copy_(value)
