"""One run of a setting: the same loop, start and order of data, whatever sets the rates."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytorch_optimizer
import torch
from rates_problems import Problem, problem
from rates_settings import Setting
from transformers.optimization import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

import loraplus
from loraplus.rates import DEFAULT_LR
from loraplus.reproduce.small_training import LR_HEAD, WARMUP
from loraplus.study.records import CurvePoint, Record, Run

SCHEDULES: dict[str, Callable[..., Any]] = {
    "linear": get_linear_schedule_with_warmup,
    "cosine": get_cosine_schedule_with_warmup,
    "constant": lambda optimizer, warmup, steps: get_constant_schedule_with_warmup(optimizer, warmup),
}
Method = Callable[[Problem, Setting], list[torch.optim.Optimizer]]
"""Makes what steps a problem's parameters. An optimizer with `own_schedule` set has no scheduler."""


def base_optimizer(setting: Setting) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """The setting's optimizer and its options."""
    if setting.optimizer == "sgd":
        return torch.optim.SGD, {"momentum": 0.9}
    if setting.optimizer == "lion":
        return pytorch_optimizer.Lion, {}
    return torch.optim.AdamW, {"betas": setting.betas, "fused": True}


def beside(problem: Problem, setting: Setting) -> dict[str, float]:
    """The rates of what is no factor, the same in all arms: 2e-3 for a head, 3e-4 for DoRA's magnitudes."""
    rates = {"lr_head": LR_HEAD} if problem.has_head else {}
    return {**rates, "lr_magnitude": DEFAULT_LR} if setting.dora else rates


def fixed(lr: float | str, lr_ratio: float | None = None) -> Method:
    """η_A = lr, η_B = lr_ratio·lr; or automatic rates."""

    def method(problem: Problem, setting: Setting) -> list[torch.optim.Optimizer]:
        cls, options = base_optimizer(setting)
        ratio = {} if lr_ratio is None else {"lr_ratio": lr_ratio}
        optimizer = loraplus.create_optimizer(
            problem.model, cls, lr=lr, weight_decay=setting.weight_decay, **ratio, **beside(problem, setting), **options
        )
        return [optimizer]

    return method


def order(examples: int, batch: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of indices; what is left of a pass that fills no batch is left out."""
    generator, left = torch.Generator().manual_seed(seed), []
    while True:
        if len(left) < batch:
            left = torch.randperm(examples, generator=generator).tolist()
        yield left[:batch]
        left = left[batch:]


def run(setting: Setting, seed: int, method: Method, *, steps: int | None = None, evaluations: int = 1) -> Record:
    """Trains once and evaluates after the last step; a run whose loss is not finite ends with an infinite loss.

    Args:
        setting: what to train.
        seed: of initialisation, data order and dropout.
        method: makes the optimizer.
        steps: other than the setting's own.
        evaluations: at equal distances, the last time after the last step.
    """
    steps = setting.steps if steps is None else steps
    task = problem(setting, seed)
    optimizers = method(task, setting)
    scheduled = [optimizer for optimizer in optimizers if not hasattr(optimizer, "own_schedule")]
    schedulers = [SCHEDULES[setting.schedule](one, math.ceil(WARMUP * steps), steps) for one in scheduled]
    scaler = torch.amp.GradScaler("cpu", enabled=setting.precision == "float16")
    trained = [parameter for parameter in task.model.parameters() if parameter.requires_grad]
    evaluate_at = {round(steps * (i + 1) / evaluations) for i in range(evaluations)}
    curve, judged = [], (math.inf, 0.0)
    batches = order(task.examples, setting.batch, seed)
    part = setting.batch // setting.accumulation
    started = time.perf_counter()
    task.model.train()
    _tell(optimizers, "train")
    for step in range(1, steps + 1):
        indices, mean = next(batches), 0.0
        for first in range(0, setting.batch, part):
            with _precision(setting):
                loss = task.loss(indices[first : first + part]) / setting.accumulation
            scaler.scale(loss).backward()
            mean += loss.item()
        if setting.clip:
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(trained, setting.clip)
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        for optimizer in optimizers:
            optimizer.zero_grad()
        for scheduler in schedulers:
            scheduler.step()
        if not math.isfinite(mean):
            return Record(Run({}), "diverged", values={"eval_loss": math.inf})
        if step in evaluate_at:
            _tell(optimizers, "eval")
            with _precision(setting):
                judged = task.evaluate()
            _tell(optimizers, "train")
            if not math.isfinite(judged[0]):
                return Record(Run({}), "diverged", values={"eval_loss": math.inf})
            curve.append(CurvePoint(step, judged[0]))
    values = {"eval_loss": judged[0], "eval_accuracy": judged[1]}
    return Record(Run({}), "done", curve=tuple(curve), seconds=time.perf_counter() - started, values=values)


def untrained(setting: Setting, seed: int) -> float:
    """The loss before the first step."""
    task = problem(setting, seed)
    task.model.eval()
    with _precision(setting):
        return task.evaluate()[0]


def _precision(setting: Setting) -> Any:
    if setting.precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast("cpu", dtype=getattr(torch, setting.precision))


def _tell(optimizers: list[torch.optim.Optimizer], mode: str) -> None:
    """Schedule-free optimizers put averaged weights into the model for evaluation."""
    for optimizer in optimizers:
        getattr(optimizer, mode, lambda: None)()
