"""What `hyperparameter_search` may search in a trainer with LoRA+: names that reach something, and no others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from loraplus.errors import TrainerSetupError


def checked_space(trainer: Any, hp_space: Callable[[Any], Any], trial: Any) -> Any:
    """A trial's hyperparameters, if all of them reach something.

    Args:
        trainer: with LoRA+.
        hp_space: of the user.
        trial: given to it.

    Raises:
        TrainerSetupError: names one that reaches nothing.
    """
    by_model = dict(getattr(trial, "params", {}))  # what `model_init` has asked the trial for
    space = hp_space(trial)
    for name in space.get("parameters", space):  # a sweep of W&B has them one level down
        args = type(trainer.args).__name__
        if not (hasattr(trainer.args, name) or name in by_model):
            ours = name.startswith("loraplus_")
            raise TrainerSetupError(
                f"{name} is searched, but is no field of {args}, so it would reach nothing; "
                + ("use LoraPlusTrainer with LoraPlusTrainingArguments" if ours else "leave it out of the search space")
            )
        check_searched(trainer, name)
    return space


def check_searched(trainer: Any, name: str) -> None:
    """Refuses the search over a training argument that something else stands before.

    Raises:
        TrainerSetupError: says what that is.
    """
    settings = trainer.loraplus_settings
    if name == "learning_rate" and "lr" in settings.rates.own_rates():
        why = "loraplus.attach was given lr, so it would reach nothing; leave lr out"
    elif name.startswith("loraplus_") and trainer._given is not None and trainer._given.rates.is_given:
        why = (
            "loraplus.attach was given the rates, so it would reach nothing; call loraplus.attach(trainer) without them"
        )
    elif name in ("loraplus_lr_ratio", "loraplus_lr_ratio_overrides") and settings.auto:
        why = "automatic rates set the ratio, so it would reach nothing; leave it out of the search space"
    else:
        return
    raise TrainerSetupError(f"{name} is searched, but {why}")
