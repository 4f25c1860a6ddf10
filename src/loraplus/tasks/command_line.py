"""The command line that runs a configuration or a command, to be copied."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from loraplus.errors import visible
from loraplus.rates import AUTO
from loraplus.tasks.config import CompareConfig, TaskConfig, TrainConfig, TuneConfig

_CONFIGS: Mapping[str, type[TaskConfig]] = {"train": TrainConfig, "compare": CompareConfig, "tune": TuneConfig}


def command_line(*words: str, **flags: object) -> str:
    """The command line of a command with these flags.

    What a terminal would obey is spelled out, so that pasting it does nothing else.

    Args:
        words: the command, and what follows it without a flag.
        flags: {name: value}, in this order; None leaves one out.

    Example:
        >>> command_line("merge", adapter="runs/my run", output="merged", model=None, trust_remote_code=True)
        "loraplus merge --adapter 'runs/my run' --output merged --trust-remote-code"
    """
    line = ["loraplus", *words]
    for name, value in flags.items():
        flag = name.replace("_", "-")
        if value is True or value is False:
            line.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            line += [f"--{flag}", json.dumps(value) if isinstance(value, dict) else _written(value)]
    return visible(shlex.join(line), kept="")


def _written(value: object) -> str:
    return str(value).removesuffix(".0") if isinstance(value, float) else str(value)


def command_of_settings(command: str, settings: Mapping[str, Any]) -> str:
    """A command with the flags that are not at their defaults; the rates of `train` are always among them.

    Args:
        command: train, compare or tune.
        settings: as saved; what the command has no flag for is left out.

    Example:
        >>> settings = {"model": "m", "data": "my reviews.csv", "output": "o", "seeds": 5, "rank": 4}
        >>> command_of_settings("compare", settings)
        "loraplus compare --model m --data 'my reviews.csv' --output o --rank 4"
    """
    flags = {}
    for spec in fields(_CONFIGS[command]):
        value = settings.get(spec.name)
        if command == "train" and spec.name in ("lr", "lr_ratio"):
            is_shown = spec.name == "lr" or settings.get("lr") != AUTO
        else:
            is_shown = value != (None if spec.default is MISSING else spec.default)
        if is_shown:
            flags[spec.name] = value
    return command_line(command, **flags)
