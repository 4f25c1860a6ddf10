"""LoRA+ in Lightning's CLI: the optimizer that the YAML names is built over LoRA+ groups, and its scheduler over those.

The ratio stands where it is verified: with `LoraPlusCallback` under `trainer.callbacks`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from lightning.pytorch import cli
from torch import nn

from loraplus.errors import TrainerSetupError
from loraplus.groups import groups_for
from loraplus.integrations.lightning import LoraPlusCallback
from loraplus.integrations.proof import prove
from loraplus.notices import told_once
from loraplus.optimizer import check_class, finish
from loraplus.rates import Rates
from loraplus.roles import trainable_parameters


class LoraPlusCLI(cli.LightningCLI):
    """`LightningCLI` whose `optimizer` and `lr_scheduler` have LoRA+ groups; takes what `LightningCLI` takes.

    A module with a `configure_optimizers` of its own, and no `optimizer` in the YAML, is left alone; it calls
    `loraplus.create_optimizer` itself.

    Raises:
        TrainerSetupError: the YAML has an optimizer and no `LoraPlusCallback`; else as `loraplus.create_optimizer`.

    Example:
        >>> LoraPlusCLI(Module)  # doctest: +SKIP

    Source: Lightning, `pytorch/cli.py` (2.6).
    """

    def _add_configure_optimizers_method_to_model(self, subcommand: str | None) -> None:
        plain = cli.instantiate_class

        def with_groups(args: Any, init: dict[str, Any]) -> Any:
            built = plain(args, init)
            if isinstance(built, torch.optim.Optimizer):
                give_groups(self.model, built, self._rates())
            return built

        cli.instantiate_class = with_groups  # Lightning builds the scheduler at once, so the groups must stand before
        try:
            super()._add_configure_optimizers_method_to_model(subcommand)
        finally:
            cli.instantiate_class = plain

    def _rates(self) -> Rates:
        # The trainer is made after the optimizer.
        places = self._get(self.config_init, "trainer", {}), self.trainer_defaults
        callbacks = [each for place in places for each in _listed(place.get("callbacks"))]
        asked = [callback.asked for callback in callbacks if isinstance(callback, LoraPlusCallback)]
        if len(asked) != 1:
            raise TrainerSetupError(
                f"LoraPlusCLI takes the rates from one LoraPlusCallback, and trainer.callbacks has {len(asked)}; list "
                "loraplus.integrations.lightning.LoraPlusCallback with init_args: {loraplus_lr_ratio: 16}"
            )
        return asked[0]


def _listed(callbacks: Any) -> list[Any]:
    return [] if callbacks is None else callbacks if isinstance(callbacks, list) else [callbacks]


def give_groups(model: nn.Module, optimizer: torch.optim.Optimizer, rates: Rates) -> None:
    """Gives an optimizer that was just built over a model's parameters LoRA+ groups, and verifies them.

    Args:
        model: whose parameters it holds, in one group.
        optimizer: keeps its class and all options; its lr is η_A.
        rates: without lr.

    Raises:
        The errors of `loraplus.create_optimizer`.
    """
    (own,) = optimizer.param_groups
    rates = dataclasses.replace(rates, lr=float(own["lr"]))
    check_class(model, type(optimizer))
    with told_once():
        groups = groups_for(trainable_parameters(model), rates, None)
        optimizer.param_groups[:] = [{**own, **group} for group in groups]
        finish(model, optimizer)
        prove(model, optimizer, rates)
