"""LoRA+ in a loop with Accelerate: rates in every `save_state`, refused by `load_state` if they differ.

For the log: `accelerator.log(rates_for_log(optimizer), step=step)`, before the scheduler's step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import torch
from torch import nn

from loraplus.auto import AutoRates
from loraplus.errors import ResumeMismatchError, TrainerSetupError
from loraplus.integrations.checkpoints import (
    LOOP_WAY,
    RATES_FILE,
    auto_rates,
    check_record,
    rates_in_use,
    rates_record,
    read_record,
    up_to_date,
    write_rates,
)
from loraplus.integrations.deepspeed import check_plugin
from loraplus.integrations.pytorch import rates_for_log
from loraplus.notices import renamed
from loraplus.rates import Rates
from loraplus.watching.watch import watch_rates

__all__ = ["guard_resume", "rates_for_log"]


@overload
def guard_resume(
    accelerator: Any, model: nn.Module, optimizer: torch.optim.Optimizer, *, name: str | None = None
) -> Rates: ...
@overload
def guard_resume(
    accelerator: Any, model: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer
) -> dict[str, Rates]: ...
def guard_resume(
    accelerator: Any,
    model: nn.Module | Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    *,
    name: str | None = None,
) -> Rates | dict[str, Rates]:
    """Records the rates in every `accelerator.save_state`, and has `load_state` refuse a run at others.

    Call it after `accelerator.prepare` (and after `AutoRates`, whose state is then part of the checkpoint), for each of
    several models. The rates are those of this call: what is merged, frozen or disabled later is saved with them.

    Args:
        accelerator: an `accelerate.Accelerator`.
        model: the prepared model, or {name: model} of several in one optimizer.
        optimizer: the prepared optimizer.
        name: what the model is called in the checkpoint, where there are several. Default: "model", "model_1", … in the
            order of the calls, as Accelerate numbers them.

    Returns:
        The rates as found in the optimizer; of several models, by name.

    Raises:
        TrainerSetupError: a DeepSpeed configuration that would take the rates over, or a name that is taken.
        ResumeMismatchError: from `load_state`, before anything is loaded; other rates, other models or parameters.

    Example:
        >>> optimizer = loraplus.create_optimizer(model, lr=2e-4, lr_ratio=16)  # doctest: +SKIP
        >>> model, optimizer, loader = accelerator.prepare(model, optimizer, loader)  # doctest: +SKIP
        >>> guard_resume(accelerator, model, optimizer)  # doctest: +SKIP
    """
    check_plugin(accelerator)
    if isinstance(model, Mapping):
        return {part: _register(accelerator, each, optimizer, part) for part, each in model.items()}
    return _register(accelerator, model, optimizer, name)


@dataclass(frozen=True)
class _Registered:
    rates: Rates
    record: dict[str, Any]
    auto: AutoRates | None


def _register(accelerator: Any, model: nn.Module, optimizer: Any, name: str | None) -> Rates:
    models: dict[str, _Registered] | None = getattr(accelerator, "loraplus_models", None)
    if models is None:
        models = accelerator.loraplus_models = {}
        _hook(accelerator, models)
    name = name or ("model" if not models else f"model_{len(models)}")
    if name in models:
        raise TrainerSetupError(f"guard_resume has a model called {name} already; give each a name of its own")
    rates, auto = rates_in_use(model, optimizer), auto_rates(optimizer, model)
    if auto is not None and all(other.auto is not auto for other in models.values()):
        accelerator.register_for_checkpointing(auto)
    models[name] = _Registered(rates, rates_record(rates, model, auto), auto)
    watch_rates(model, optimizer)
    return rates


def _hook(accelerator: Any, models: Mapping[str, _Registered]) -> None:
    def save(_: Any, weights: Any, output_dir: str) -> None:
        if accelerator.is_main_process:
            records = {name: up_to_date(each.record, each.auto) for name, each in models.items()}
            # One model's record stands by itself, as in all other stacks.
            write_rates(Path(output_dir), {"models": records} if len(records) > 1 else next(iter(records.values())))

    def load(_: Any, input_dir: str) -> None:
        saved = read_record(Path(input_dir), LOOP_WAY)
        of_several = saved.get("models") if saved is not None else None
        if not isinstance(of_several, Mapping):
            of_several = {next(iter(models)): saved}
        if of_several.keys() != models.keys():
            raise ResumeMismatchError(
                f"{input_dir} was trained with the models {', '.join(of_several)}, this run has registered "
                f"{', '.join(models)}; register the same ones under the same names, {LOOP_WAY}"
            )
        for name, each in models.items():
            where = input_dir if len(models) == 1 else f"{name} in {input_dir}"
            check_record(
                of_several[name], each.rates, where, LOOP_WAY, auto=each.auto is not None, roles=each.record["roles"],
                shapes=each.record["shapes"], missing=f"has no {RATES_FILE}",
            )  # fmt: skip

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def _log_rates(accelerator: Any, optimizer: torch.optim.Optimizer, step: int) -> dict[str, float]:
    """Sends `rates_for_log` to the accelerator's trackers, and returns it."""
    rates = rates_for_log(optimizer)
    accelerator.log(rates, step=step)
    return rates


def __getattr__(name: str) -> Any:
    renamed(__name__, name, {"register_rates": "guard_resume", "log_rates": "rates_for_log, given to accelerator.log,"})
    return guard_resume if name == "register_rates" else _log_rates
