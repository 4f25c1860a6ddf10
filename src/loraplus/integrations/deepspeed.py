"""LoRA+ under DeepSpeed: which configurations would take the rates over, and what to do instead.

DeepSpeed's JSON can name an optimizer and a scheduler. The optimizer is then built by DeepSpeed over one list of
parameters, without groups; most of its schedulers set one rate for all groups. Both end LoRA+ without a word.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loraplus.errors import InputError, TrainerSetupError

KEEPS_THE_RATIO = frozenset({"WarmupCosineLR"})
"""DeepSpeed's schedulers that multiply each group's own rate; the others give all groups the same one."""


def check_deepspeed_config(config: Mapping[str, Any] | str | Path) -> None:
    """Refuses a DeepSpeed configuration under which A and B would not keep their rates.

    Args:
        config: the configuration, or the path of its JSON file.

    Raises:
        TrainerSetupError: it has an "optimizer", or a "scheduler" that sets one rate for all groups.
        InputError: the file cannot be read.

    Example:
        >>> check_deepspeed_config({"zero_optimization": {"stage": 2}})

    Source: github.com/deepspeedai/DeepSpeed, deepspeed/runtime/engine.py and lr_schedules.py (0.19).
    """
    content = config if isinstance(config, Mapping) else _read(Path(config))
    if content.get("optimizer"):
        raise TrainerSetupError(
            f'the DeepSpeed configuration has an "optimizer" ({_type(content["optimizer"])}), which replaces the one '
            "with LoRA+ groups; remove that block: the trainer's optim and learning_rate are used, or in a loop of "
            "your own deepspeed.initialize(optimizer=loraplus.create_optimizer(...))"
        )
    scheduler = content.get("scheduler")
    if scheduler and _type(scheduler) not in KEEPS_THE_RATIO:
        raise TrainerSetupError(
            f'the DeepSpeed configuration has the "scheduler" {_type(scheduler)}, which gives A and B the same rate; '
            "remove that block: the trainer's lr_scheduler_type is used, or in a loop of your own "
            "deepspeed.initialize(lr_scheduler=...) with a scheduler of torch; WarmupCosineLR may stay"
        )


def check_plugin(accelerator: Any) -> None:
    """`check_deepspeed_config` for what an Accelerator or Trainer was set up with, if that is DeepSpeed.

    Raises:
        TrainerSetupError: see `check_deepspeed_config`.
    """
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is not None:
        check_deepspeed_config(plugin.deepspeed_config)


def _type(block: Any) -> str:
    return str(block.get("type", "unnamed")) if isinstance(block, Mapping) else str(block)


def _read(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read the DeepSpeed configuration {path}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, Mapping):
        raise InputError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content
