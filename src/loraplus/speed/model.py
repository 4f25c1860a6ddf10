"""Which modules of a model change to which faster class, and back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from loraplus.errors import InputError
from loraplus.speed.choices import CHOICES, Change, Judged
from loraplus.speed.fast import make_slow
from loraplus.speed.loss import ChunkedLoss

ALL_LEVERS = tuple(CHOICES)
"""What `speed_up` can do, each by itself."""
LEVERS = tuple(name for name in ALL_LEVERS if name != "graphs")
"""What it does unless told otherwise. "graphs" is for GPUs and batches of one shape, and takes memory of its own."""


@dataclass
class SpeedReport:
    """What `speed_up` replaced, and what it left alone.

    Args:
        replaced: {name of a module: what it does now}.
        left: {name of a module: why it stays as it was}.
    """

    replaced: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{count} × {what}" for what, count in Counter(self.replaced.values()).items()]
        lines += [f"left alone: {count} × {why}" for why, count in Counter(self.left.values()).items()]
        return "\n".join(lines) or "nothing to speed up"

    def to_dict(self) -> dict[str, dict[str, str]]:
        """As plain data, for JSON."""
        return {"replaced": dict(self.replaced), "left": dict(self.left)}


def speed_up(model: nn.Module, *, levers: Collection[str] = LEVERS) -> SpeedReport:
    """Makes a model's forward and backward pass faster and leaner, in place.

    The gradients are the same, to rounding; parameters, state dict and saved adapters stay what they are. Under
    `torch.compile` the model computes as before, since the compiler does as much.

    Args:
        model: with adapters of PEFT, wrapped or not.
        levers: which of `ALL_LEVERS` to use.

    Returns:
        What was replaced and what was left alone, and why. What has been replaced before is listed again.

    Raises:
        InputError: an unknown lever.

    Example:
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
        >>> model = get_peft_model(model, LoraConfig(r=2, target_modules=["0"]))
        >>> print(speed_up(model))
        1 × LoRA in one step
        >>> slow_down(model)
        1
    """
    unknown = [name for name in levers if name not in ALL_LEVERS]
    if unknown:
        raise InputError(f"there is no lever {unknown[0]!r}; there are {', '.join(ALL_LEVERS)}")
    report, judged = SpeedReport(), Judged()
    for name, module in list(model.named_modules()):
        for lever in levers:
            for verdict in CHOICES[lever](module, judged):
                if isinstance(verdict, Change):
                    verdict.make()
                    report.replaced[name] = verdict.fast.what
                else:
                    report.left[name] = verdict
    return report


def slow_down(model: nn.Module) -> int:
    """Undoes `speed_up`.

    Args:
        model: any.

    Returns:
        How many modules were changed back.
    """
    module: Any
    for module in model.modules():
        chunked = vars(module).get("_loss_function")
        if isinstance(chunked, ChunkedLoss):
            del module._loss_function
            if module.loss_function is not chunked.own:
                module.loss_function = chunked.own
    return sum(make_slow(module) for module in list(model.modules()))
