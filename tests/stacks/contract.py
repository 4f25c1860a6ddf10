"""What a training stack is asked to do, and what it gives back; every stack of the suite is one function of this form.

A stack trains a tiny adapter for six steps of eight examples at LR, with a linear schedule and two steps of warm-up,
on its own optimizer (`lr_ratio=None`) or with LoRA+.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

LR = 5e-3
RATIO = 16.0
STEPS = 6
WARMUP = 2
BATCH = 8
EXAMPLES = 24  # three steps an epoch
SAVE_AT = 3
FACTORS = [0, 0.5, 1, 0.75, 0.5, 0.25]  # what the schedule multiplies LR by at each step


@dataclass(frozen=True)
class Setup:
    """One run: `lr_ratio` None is the stack without LoRA+; `resume` goes on from the checkpoint in `folder`."""

    folder: Path
    lr_ratio: float | None = RATIO
    lr: float = LR
    weight_decay: float | None = 0.1
    accumulation: int = 1
    clip: float = 0.0
    resume: bool = False

    @property
    def micro_batch(self) -> int:
        return BATCH // self.accumulation


@dataclass
class Run:
    """What is left of a run; `steps` are filled in by `watched`, not by the stack."""

    model: torch.nn.Module
    optimizer: Any
    logs: list[dict[str, float]] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}


@dataclass(frozen=True)
class Step:
    """Rates by group and the norm of all gradients, as an optimizer saw them when it took a step."""

    rates: dict[str, float]
    grad_norm: float


@dataclass(frozen=True)
class Stack:
    """A way to train. `needs` are the optional packages; `splits_decay`: its own optimizer keeps decay off biases."""

    name: str
    run: Callable[[Setup], Run]
    needs: tuple[str, ...] = ()
    splits_decay: bool = True

    def __call__(self, setup: Setup) -> Run:
        for package in self.needs:
            pytest.importorskip(package, reason=f"{package} is not installed")
        torch.manual_seed(0)
        with watched() as steps:
            run = self.run(setup)
        run.steps = steps
        return run


@contextmanager
def watched() -> Iterator[list[Step]]:
    """Notes every step that any torch optimizer takes, whatever the stack says of it.

    After the step: Lightning computes the gradients inside it.
    """
    steps: list[Step] = []

    def note(optimizer: Any, args: Any, kwargs: Any) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients))
        names = [group.get("name", str(index)) for index, group in enumerate(optimizer.param_groups)]
        steps.append(Step({n: float(g["lr"]) for n, g in zip(names, optimizer.param_groups, strict=True)}, norm))

    handle = register_optimizer_step_post_hook(note)
    try:
        yield steps
    finally:
        handle.remove()


def expected_lr(name: str, ratio: float = RATIO) -> float:
    """The rate of a parameter, told from its name by other means than the library's."""
    return LR * ratio if ".lora_B." in name else LR


def expected_decay(name: str) -> float:
    return 0.0 if name.endswith("bias") else 0.1
