"""ms-swift's plugin, against the interface that its 4.6 publishes: a registry, a callback, and who calls it when."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

import pytest
from stacks.models import Tokens, classifier
from transformers import Trainer, TrainingArguments

import loraplus
from loraplus.errors import ResumeMismatchError, TrainerSetupError

pytestmark = pytest.mark.plugin("ms-swift")


class OptimizerCallback:
    """ms-swift's base class."""

    def __init__(self, args: Any, trainer: Any) -> None:
        self.args, self.trainer = args, trainer

    def create_optimizer_and_scheduler(self, num_training_steps: int) -> None:
        self.trainer.optimizer = self.create_optimizer()
        self.trainer.scheduler = self.create_scheduler(num_training_steps, self.trainer.optimizer)

    def create_optimizer(self, model: Any = None) -> Any:
        return Trainer.create_optimizer(self.trainer, *([] if model is None else [model]))

    def create_scheduler(self, num_training_steps: int, optimizer: Any) -> Any:
        return Trainer.create_scheduler(self.trainer, num_training_steps, optimizer)


class SwiftTrainer(Trainer):
    """Makes its callback before itself, hands its methods on to it, and takes empty groups out."""

    def __init__(self, model: Any, args: Any, **kwargs: Any) -> None:
        from swift.optimizers import optimizers_map  # type: ignore[import-not-found]

        self.optimizer_callback = optimizers_map["loraplus"](args, self)
        super().__init__(model, args, **kwargs)

    def create_optimizer_and_scheduler(self, num_training_steps: int) -> None:
        self.optimizer_callback.create_optimizer_and_scheduler(num_training_steps)

    def create_optimizer(self, model: Any = None) -> Any:
        self.optimizer = self.optimizer_callback.create_optimizer(model=model)
        self.optimizer.param_groups = [group for group in self.optimizer.param_groups if group["params"]]
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        self.lr_scheduler = self.optimizer_callback.create_scheduler(num_training_steps, optimizer or self.optimizer)
        return self.lr_scheduler


@pytest.fixture
def make(monkeypatch, tmp_path):
    swift, optimizers = ModuleType("swift"), ModuleType("swift.optimizers")
    optimizers.OptimizerCallback, optimizers.optimizers_map = OptimizerCallback, {}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "swift", swift)
    monkeypatch.setitem(sys.modules, "swift.optimizers", optimizers)
    monkeypatch.delitem(sys.modules, "loraplus.integrations.ms_swift", raising=False)
    importlib.import_module("loraplus.integrations.ms_swift")

    def trainer(**options: Any) -> SwiftTrainer:
        args = TrainingArguments(str(tmp_path), **{
            "learning_rate": 1e-3, "weight_decay": 0.1, "max_steps": 2, "report_to": [], "use_cpu": True,
            "disable_tqdm": True, "label_names": ["labels"], "save_steps": 1, "logging_steps": 1, **options,
        })  # fmt: skip
        return SwiftTrainer(classifier(), args, train_dataset=Tokens())

    yield trainer
    sys.modules.pop("loraplus.integrations.ms_swift", None)


def test_published_interface_training_has_the_ratio_of_optim_args_and_logs_it(make):
    trainer = make(optim_args="ratio=4")
    trainer.train()
    loraplus.verify(trainer.model, trainer.optimizer, lr=1e-3, lr_ratio=4)
    assert trainer.state.log_history[0]["lr/lora_B"] == pytest.approx(4e-3)
    assert type(trainer).__name__ == "SwiftTrainer" and "train" not in vars(trainer)


def test_published_interface_the_ratio_of_ms_swifts_tuner_counts(make):
    trainer = make()
    trainer.model.peft_config["default"].lorap_lr_ratio = 2.0
    trainer.train()
    loraplus.verify(trainer.model, trainer.optimizer, lr=1e-3, lr_ratio=2)


@pytest.mark.parametrize("how", ["create_optimizer", "create_optimizer_and_scheduler"])
def test_published_interface_who_does_not_call_train_gets_the_ratio_too(make, how):
    trainer = make()
    getattr(trainer, how)(**({"num_training_steps": 4} if how.endswith("scheduler") else {}))
    loraplus.verify(trainer.model, trainer.optimizer, lr=1e-3, lr_ratio=16)
    if how.endswith("scheduler"):
        assert len(trainer.lr_scheduler.base_lrs) == len(trainer.optimizer.param_groups)


def test_published_interface_another_ratio_is_refused_on_resume(make):
    make(optim_args="ratio=4").train()
    with pytest.raises(ResumeMismatchError, match=r"4.*2"):
        make(optim_args="ratio=2").train(resume_from_checkpoint=True)


def test_published_interface_two_ratios_are_refused(make):
    trainer = make(optim_args="ratio=4")
    trainer.model.peft_config["default"].lorap_lr_ratio = 2.0
    with pytest.raises(TrainerSetupError, match="set the rates in one of them"):
        trainer.train()
