"""LoRA+ in LLaMA-Factory: `python -m loraplus.integrations.llamafactory train.yaml`, and its own `loraplus_lr_ratio`.

The command stands in place of `llamafactory-cli train`. LLaMA-Factory makes the optimizer of every stage (sft, pt, dpo,
kto, rm, ppo) in one function, and this module puts another in its place; everything else stays LLaMA-Factory's.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from loraplus.errors import TrainerSetupError
from loraplus.integrations.optimizer_factory import LoraPlusCallback
from loraplus.integrations.proof import prove
from loraplus.integrations.pytorch import guard_resume
from loraplus.integrations.trainer_settings import in_optim_args
from loraplus.notices import told_once
from loraplus.optimizer import create_optimizer
from loraplus.rates import Rates

_FUNCTION = "_create_loraplus_optimizer"
_DEFAULT_LR_EMBEDDING = 1e-6
"""LLaMA-Factory's, at which an embedding does not train; it is there whether it was asked for or not."""


def create_loraplus_optimizer(model: nn.Module, training_args: Any, finetuning_args: Any) -> torch.optim.Optimizer:
    """The optimizer that LLaMA-Factory's arguments ask for, with LoRA+ groups.

    η_A = learning_rate, η_B = loraplus_lr_ratio·learning_rate

    Args:
        model: with LoRA factors.
        training_args: class and options of the optimizer; further rates in `optim_args`, as in "lr_head=1e-4".
        finetuning_args: `loraplus_lr_ratio`, and `loraplus_lr_embedding` unless it has its default of 1e-6.

    Returns:
        The optimizer, verified; it refuses a checkpoint of other rates.

    Raises:
        TrainerSetupError: another ratio in `optim_args`; else as `loraplus.create_optimizer`.

    Source: LLaMA-Factory, `train/trainer_utils.py` (0.9.5).
    """
    named, rest = in_optim_args(training_args.optim_args)
    ratio, embedding = float(finetuning_args.loraplus_lr_ratio), finetuning_args.loraplus_lr_embedding
    if named.get("lr_ratio", ratio) != ratio:
        raise TrainerSetupError(
            f"loraplus_lr_ratio is {ratio:g}, optim_args asks for {named['lr_ratio']:g}; give one of them"
        )
    settings: dict[str, Any] = {**named, "lr_ratio": ratio}
    if embedding not in (None, _DEFAULT_LR_EMBEDDING):
        settings["lr_embedding"] = float(embedding)
    rates = Rates(training_args.learning_rate, **settings)
    given = training_args.optim_args
    try:
        training_args.optim_args = rest
        optimizer_cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(training_args, model)  # type: ignore[arg-type]
    finally:
        training_args.optim_args = given
    options = {"weight_decay": training_args.weight_decay, **kwargs}
    del options["lr"]
    with told_once():
        optimizer = create_optimizer(model, optimizer_cls, rates, **options)
        prove(model, optimizer, rates, told_by="llamafactory.loraplus")
    guard_resume(optimizer, model)
    return optimizer


def install() -> None:
    """Has LLaMA-Factory make the optimizer of `loraplus_lr_ratio` with `create_loraplus_optimizer`, in this process.

    Raises:
        TrainerSetupError: this version of LLaMA-Factory makes it in another way.
    """
    utils = importlib.import_module("llamafactory.train.trainer_utils")
    if not hasattr(utils, _FUNCTION):
        raise TrainerSetupError(
            f"this version of LLaMA-Factory has no {_FUNCTION} in train/trainer_utils.py, so LoRA+ cannot take its "
            "place; 0.9.5 has it"
        )
    setattr(utils, _FUNCTION, create_loraplus_optimizer)


class _WithLoraPlus(LoraPlusCallback):
    def on_train_begin(self, *args: Any, optimizer: Any = None, **kwargs: Any) -> None:
        if not any("name" in group for group in optimizer.param_groups):
            raise TrainerSetupError(
                "LLaMA-Factory's settings have no loraplus_lr_ratio, or another optimizer stands before it (galore, "
                "apollo), so this run would have no LoRA+; set loraplus_lr_ratio, or use llamafactory-cli train"
            )
        super().on_train_begin(*args, optimizer=optimizer, **kwargs)


def run_exp(args: dict[str, Any] | None = None, callbacks: list[Any] | None = None) -> None:
    """LLaMA-Factory's `run_exp` with LoRA+: trains, logs every group's rate, writes the rates into each checkpoint.

    Args:
        args: LLaMA-Factory's settings; None takes them from the command line, a YAML file as its first word.
        callbacks: further ones.

    Raises:
        TrainerSetupError: see `install`; or the settings have no loraplus_lr_ratio.
    """
    install()
    importlib.import_module("llamafactory.train.tuner").run_exp(args, [*(callbacks or []), _WithLoraPlus()])


if __name__ == "__main__":
    run_exp()
