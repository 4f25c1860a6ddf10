"""LoRA+ in LeRobot: `python -m loraplus.integrations.lerobot --loraplus.lr_ratio=16 …` in place of `lerobot-train …`.

A policy's preset, or `--optimizer`, makes the optimizer that it always makes. Its groups with their own rates (XVLA's)
are then split by role; LeRobot's scheduler multiplies each.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import Any

import torch
from torch import nn

from loraplus.errors import TrainerSetupError
from loraplus.existing_groups import split_groups
from loraplus.integrations.proof import prove
from loraplus.integrations.pytorch import guard_resume
from loraplus.notices import told_once
from loraplus.optimizer import finish
from loraplus.rate_keywords import takes_rates
from loraplus.rates import Rates

_NAME = "make_optimizer_and_scheduler"


@takes_rates("lr_ratio", left_out=["lr"])
def make_optimizer_and_scheduler(cfg: Any, policy: nn.Module, *, rates: Rates) -> tuple[torch.optim.Optimizer, Any]:
    """LeRobot's function of this name, with LoRA+ groups.

    η_A = lr of the parameter's own group, η_B = lr_ratio times that

    Args:
        cfg: LeRobot's `TrainPipelineConfig`: optimizer, scheduler, steps, `use_policy_training_preset`.
        policy: wrapped with PEFT.
        rates: a `Rates`, or `lr_ratio` and `lr_ratio_overrides` as keywords; `lr_ratio` also by position.

    Returns:
        (optimizer, scheduler or None). The optimizer is verified, and refuses the state of a run at other rates.

    Raises:
        TrainerSetupError: no optimizer, or several (`multi_adam`); else as `loraplus.split_groups`.

    Source: LeRobot, `optim/factory.py` (0.4.4).
    """
    if cfg.optimizer is None:
        raise TrainerSetupError("LeRobot's configuration has no optimizer; give --optimizer.type, or use the preset")
    params = policy.get_optim_params() if cfg.use_policy_training_preset else policy.parameters()  # type: ignore[operator]
    optimizer = cfg.optimizer.build(params)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TrainerSetupError(
            f"{type(cfg.optimizer).__name__} builds several optimizers, and LoRA+ needs one over the whole policy; "
            "choose another --optimizer.type"
        )
    own = [{**group, "params": [p for p in group["params"] if p.requires_grad]} for group in optimizer.param_groups]
    own = [group for group in own if group["params"]]  # a policy lists what is frozen, too
    with told_once():
        optimizer.param_groups[:] = split_groups(policy, own, rates)
        finish(policy, optimizer)
        prove(policy, optimizer, rates, groups=own)
    handle = guard_resume(optimizer, policy)
    optimizer._optimizer_state_dict_post_hooks.pop(handle.id)  # LeRobot writes tensors only; the groups say enough
    return optimizer, None if cfg.scheduler is None else cfg.scheduler.build(optimizer, cfg.steps)


def install(rates: Rates) -> Any:
    """Has LeRobot's training script make its optimizer with these rates, in this process, and returns the script.

    Raises:
        TrainerSetupError: this version of LeRobot makes it in another way.
    """
    script = importlib.import_module("lerobot.scripts.lerobot_train")
    if not hasattr(script, _NAME):
        raise TrainerSetupError(
            f"this version of LeRobot has no {_NAME} in scripts/lerobot_train.py, so LoRA+ cannot take its place; "
            "0.4.4 has it"
        )
    setattr(script, _NAME, lambda cfg, policy: make_optimizer_and_scheduler(cfg, policy, rates))
    return script


def main() -> None:
    """Takes `--loraplus.lr_ratio` out of the command line, and runs LeRobot's script with the rest."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--loraplus.lr_ratio", dest="lr_ratio", type=float, default=Rates().lr_ratio)
    given, rest = parser.parse_known_args()
    unknown = [word for word in rest if word.startswith("--loraplus.")]
    if unknown:
        parser.error(f"{unknown[0]} is no setting; there is --loraplus.lr_ratio")
    sys.argv[1:] = rest
    install(Rates(lr_ratio=given.lr_ratio)).main()


if __name__ == "__main__":
    main()
