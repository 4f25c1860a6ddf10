"""Command lines that can be copied: quoted where paths need it."""

from __future__ import annotations

import shlex
from dataclasses import fields
from typing import Any

_ALWAYS = ("lr", "lr_ratio")


def command_line(name: str, config: Any) -> str:
    """The command line of a configuration; what is at its default is left out, the rates never.

    Args:
        name: of the command.
        config: dataclass whose fields are its flags.

    Example:
        >>> from loraplus.tasks.config import TrainConfig
        >>> command_line("train", TrainConfig(model="m", data="my d.csv", output="o", lr=1e-3, lr_ratio=4.0))
        "loraplus train --model m --data 'my d.csv' --output o --lr 0.001 --lr-ratio 4.0"
    """
    values = ((spec, getattr(config, spec.name)) for spec in fields(config))
    given = {spec.name: value for spec, value in values if spec.name in _ALWAYS or value != spec.default}
    return command(name, **given)


def command(*words: str, **flags: Any) -> str:
    """The command line of a command with flags; None leaves one out.

    Example:
        >>> command("merge", adapter="runs/my run", output="-merged", model=None)
        "loraplus merge --adapter 'runs/my run' --output ./-merged"
    """
    line = ["loraplus", *words]
    for name, value in flags.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            line.append(flag)
        elif value is False:
            line.append("--no-" + flag.removeprefix("--"))
        elif value is not None:
            text = str(value)
            line += [flag, f"./{text}" if text.startswith("-") else text]  # a path that looks like a flag
    return shlex.join(line)
