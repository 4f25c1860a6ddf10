"""The command line that runs a configuration, to be copied."""

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


def command_line(command: str, settings: Mapping[str, Any]) -> str:
    r"""A command with the flags that are not at their defaults; the rates of `train` are always among them.

    What a terminal would obey is spelled out, so that pasting it does nothing else.

    Args:
        command: train, compare or tune.
        settings: as saved; what the command has no flag for is left out.

    Example:
        >>> command_line("compare", {"model": "m", "data": "my reviews.csv", "output": "o", "seeds": 5, "rank": 4})
        "loraplus compare --model m --data 'my reviews.csv' --output o --rank 4"
    """
    words = ["loraplus", command]
    for spec in fields(_CONFIGS[command]):
        if spec.name not in settings:
            continue
        value, flag = settings[spec.name], "--" + spec.name.replace("_", "-")
        default = None if spec.default is MISSING else spec.default
        if value is True or value is False:
            words += [flag if value else "--no-" + flag.removeprefix("--")] if value is not default else []
        elif command == "train" and spec.name in ("lr", "lr_ratio"):
            words += [flag, str(value)] if spec.name == "lr" or settings.get("lr") != AUTO else []
        elif value is not None and value != default:
            words += [flag, json.dumps(value) if isinstance(value, dict) else str(value)]
    return visible(shlex.join(words), kept="")
