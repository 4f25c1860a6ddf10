"""Cases of the scoreboard in transformers' Trainer: its own hooks, a search, a schedule, and saving.

PEFT has no hook in Trainer; its users build the optimizer themselves and give it to Trainer's `optimizers`, which is
what its column does.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft.optimizers import create_loraplus_optimizer as peft_optimizer
from stacks_cases import CannotRun, adapted
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import loraplus

LR, RATIO = 1 / 64, 16.0
DATA = [{"input_ids": list(range(8)), "labels": index % 2} for index in range(8)]
QUIET = {
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
    "save_strategy": "no",
    "per_device_train_batch_size": 2,
}

Seen = tuple[str, str]
"""(right, wrong, …, what was seen)"""


class Rates(TrainerCallback):
    """The rate of every parameter at the start of each run, and λ at each of its steps."""

    def __init__(self) -> None:
        self.runs: list[dict[str, float]] = []
        self.ratios: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any):
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.runs.append(self._of(optimizer, "initial_lr"))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any):
        rates = self._of(optimizer, "lr")
        self.ratios.append(_mean(rates, "lora_B") / _mean(rates, "lora_A"))

    def _of(self, optimizer: Any, key: str) -> dict[str, float]:
        return {
            self.names.get(id(p), "the loss's"): float(group.get(key, group["lr"]))
            for group in optimizer.param_groups
            for p in group["params"]
        }


def _mean(rates: dict[str, float], part: str) -> float:
    of_part = [rate for name, rate in rates.items() if part in name]
    return sum(of_part) / len(of_part)


class LossWithWeight(Trainer):
    """In the manner of sentence-transformers: the loss has a parameter, which `get_optimizer_cls_and_kwargs` adds."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.scale = nn.Parameter(torch.ones(()))

    def get_optimizer_cls_and_kwargs(self, args: Any, model: Any = None) -> Any:  # type: ignore[override]
        mine = [p for p in self.model.parameters() if p.requires_grad]
        return torch.optim.SGD, {"lr": args.learning_rate, "optimizer_dict": [{"params": mine}, {"params": self.scale}]}

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return model(**inputs).loss * self.scale


class LayerWise(Trainer):
    """The lower layer at half the rate of the upper one."""

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            trained = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
            self.optimizer = torch.optim.SGD([
                {"params": [p for name, p in trained if "layer.0" in name], "lr": LR / 2},
                {"params": [p for name, p in trained if "layer.0" not in name], "lr": LR},
            ])  # fmt: skip
        return self.optimizer


def trained(who: str, kind: type[Trainer] = Trainer, *, optimizer_cls: Any = None, **arguments: Any) -> Any:
    """A trainer of this kind with LoRA+, after its run, and what its callback saw."""
    rates = Rates()
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(folder, **{**QUIET, "max_steps": 2, "learning_rate": LR, "optim": "sgd", **arguments})
        model, options = adapted(), {}
        if who == "PEFT":
            options["optimizers"] = (peft_optimizer(model, torch.optim.SGD, lr=LR, loraplus_lr_ratio=RATIO), None)  # type: ignore[arg-type]
        if optimizer_cls is not None:
            options["optimizer_cls_and_kwargs"] = optimizer_cls
        try:
            trainer = kind(model, args, train_dataset=DATA, eval_dataset=DATA, callbacks=[rates], **options)  # type: ignore[arg-type]
        except RuntimeError as error:
            raise CannotRun(f"Trainer: {error}") from None
        (trainer if who == "PEFT" else loraplus.attach(trainer, lr_ratio=RATIO)).train()
    return trainer, rates


def judged(rates: dict[str, float], base: Callable[[str], float]) -> Seen:
    for name, rate in rates.items():
        asked = base(name) * (RATIO if re.search(r"lora_B", name) else 1)
        if not math.isclose(rate, asked, rel_tol=1e-6):
            return "wrong", f"{name.removeprefix('base_model.model.')} at {rate:g} instead of {asked:g}"
    return "right", f"{len(rates)} parameters"


def loss_with_weight(who: str) -> Seen:
    trainer, rates = trained(who, LossWithWeight)
    if trainer.scale.item() == 1:
        return "wrong", "the loss's parameter is not trained"
    return judged(rates.runs[0], lambda name: LR)


def layer_wise(who: str) -> Seen:
    return judged(trained(who, LayerWise)[1].runs[0], lambda name: LR / 2 if "layer.0" in name else LR)


def own_lr(who: str) -> Seen:
    _, rates = trained(who, optimizer_cls=(torch.optim.SGD, {"lr": LR / 4}))
    return judged(rates.runs[0], lambda name: LR / 4)


def least_rate(who: str) -> Seen:
    plateau = {"patience": 0, "threshold": 1e9, "min_lr": LR / 4}
    _, rates = trained(
        who, lr_scheduler_type="reduce_lr_on_plateau", lr_scheduler_kwargs=plateau, eval_strategy="steps", eval_steps=1,
        max_steps=6,
    )  # fmt: skip
    off = [index for index, ratio in enumerate(rates.ratios) if not math.isclose(ratio, RATIO, rel_tol=1e-6)]
    if off:
        return "wrong", f"λ = {rates.ratios[off[-1]]:g} from step {off[0]} on"
    return "right", f"{len(rates.ratios)} steps"


def search(who: str) -> Seen:
    """The ratio and the rate, by `hyperparameter_search`."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    rates, asked = Rates(), []
    options: dict[str, Any] = {"train_dataset": DATA, "eval_dataset": DATA, "callbacks": [rates]}
    with tempfile.TemporaryDirectory() as folder:
        arguments = {**QUIET, "max_steps": 2, "optim": "sgd"}
        if who == "PEFT":
            model = adapted()
            own = peft_optimizer(model, torch.optim.SGD, lr=LR, loraplus_lr_ratio=RATIO)  # type: ignore[arg-type]
            try:
                Trainer(
                    args=TrainingArguments(folder, **arguments),
                    model_init=lambda: adapted(),
                    optimizers=(own, None),
                    **options,
                )  # type: ignore[arg-type]
            except RuntimeError as error:
                raise CannotRun(f"Trainer: {error}") from None
            return "wrong", "taken, though it is over another model"
        args = loraplus.LoraPlusTrainingArguments(folder, **arguments)
        trainer = loraplus.LoraPlusTrainer(None, args, model_init=lambda: adapted(), **options)

        def space(trial: Any) -> dict[str, Any]:
            asked.append((4.0**trial.number, LR / 2**trial.number))
            return dict(zip(("loraplus_lr_ratio", "learning_rate"), asked[-1], strict=True))

        trainer.hyperparameter_search(space, n_trials=3, direction="minimize")
    for (ratio, lr), of_run in zip(asked, rates.runs, strict=True):
        if not math.isclose(_mean(of_run, "lora_B"), ratio * lr) or not math.isclose(_mean(of_run, "lora_A"), lr):
            return "wrong", f"asked for {ratio:g}, trained at {_mean(of_run, 'lora_B') / _mean(of_run, 'lora_A'):g}"
    return "right", f"{len(asked)} trials"


def saved_after_merge(who: str) -> Seen:
    trainer, _ = trained(who)
    trainer.model = trainer.model.merge_and_unload()
    with tempfile.TemporaryDirectory() as folder:
        trainer.save_model(folder)
        return ("right" if list(Path(folder).glob("*.safetensors")) else "wrong"), "saved"


TRAINER: dict[str, Callable[[str], Seen]] = {
    "Trainer whose loss has a parameter (get_optimizer_cls_and_kwargs)": loss_with_weight,
    "Trainer with rates by layer (create_optimizer)": layer_wise,
    "Trainer with optimizer_cls_and_kwargs at a rate of its own": own_lr,
    "Trainer, reduce_lr_on_plateau with min_lr": least_rate,
    "Trainer, hyperparameter_search over ratio and rate": search,
    "Trainer, saving after merge_and_unload": saved_after_merge,
}
