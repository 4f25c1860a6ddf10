"""LLaMA-Factory's plugin, against the interface that its 0.9.5 publishes: who calls which function with what."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from stacks.models import Tokens, classifier
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

import loraplus
from loraplus.errors import ResumeMismatchError, TrainerSetupError
from loraplus.integrations.llamafactory import create_loraplus_optimizer, install, run_exp

pytestmark = pytest.mark.plugin("LLaMA-Factory")


@dataclass
class FinetuningArguments:
    loraplus_lr_ratio: float | None = None
    loraplus_lr_embedding: float = 1e-6


@pytest.fixture
def factory(monkeypatch, tmp_path):
    """Its modules; `run_exp` trains as its sft stage does."""
    utils, tuner = ModuleType("llamafactory.train.trainer_utils"), ModuleType("llamafactory.train.tuner")

    def custom(model: Any, training_args: Any, finetuning_args: Any) -> Any:
        if finetuning_args.loraplus_lr_ratio is not None:
            return utils._create_loraplus_optimizer(model, training_args, finetuning_args)  # type: ignore[attr-defined]
        return None

    class CustomSeq2SeqTrainer(Seq2SeqTrainer):
        def __init__(self, finetuning_args: Any, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.finetuning_args = finetuning_args

        def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
            if self.optimizer is None:
                self.optimizer = custom(self.model, self.args, self.finetuning_args)
            return super().create_optimizer(*args, **kwargs)

    def run(args: dict[str, Any], callbacks: list[Any]) -> None:
        training = {name: value for name, value in args.items() if not name.startswith("loraplus")}
        tuning = FinetuningArguments(**{name: args[name] for name in args if name.startswith("loraplus")})
        resume = training.pop("resume_from_checkpoint", None)
        made = Seq2SeqTrainingArguments(str(tmp_path), **{
            "learning_rate": 1e-3, "weight_decay": 0.1, "max_steps": 2, "report_to": [], "use_cpu": True,
            "disable_tqdm": True, "label_names": ["labels"], "save_steps": 1, "logging_steps": 1, **training,
        })  # fmt: skip
        trainer = CustomSeq2SeqTrainer(
            tuning, model=classifier(), args=made, train_dataset=Tokens(), callbacks=callbacks
        )
        tuner.trainer = trainer  # type: ignore[attr-defined]
        trainer.train(resume_from_checkpoint=resume)

    utils._create_loraplus_optimizer, tuner.run_exp = None, run  # type: ignore[attr-defined]
    package = {"": ModuleType("llamafactory"), ".train": ModuleType("llamafactory.train")}
    for name, module in (package | {".train.trainer_utils": utils, ".train.tuner": tuner}).items():
        monkeypatch.setitem(sys.modules, f"llamafactory{name}", module)
    return SimpleNamespace(utils=utils, tuner=tuner)


def test_published_interface_the_yamls_ratio_is_that_of_the_step_and_of_logs_and_checkpoint(factory, tmp_path):
    run_exp({"loraplus_lr_ratio": 4, "optim_args": "lr_head=5e-4"})
    trainer = factory.tuner.trainer
    loraplus.verify(trainer.model, trainer.optimizer, lr=1e-3, lr_ratio=4, lr_head=5e-4)
    decays = {entry.role: entry.weight_decay for entry in loraplus.explain(trainer.model, trainer.optimizer).entries}
    assert decays["lora_A"] == decays["lora_B"] == 0.1
    assert trainer.state.log_history[0]["lr/lora_B"] == pytest.approx(4e-3)
    assert (tmp_path / "checkpoint-1" / "loraplus.json").exists()


def test_published_interface_another_ratio_is_refused_on_resume(factory):
    run_exp({"loraplus_lr_ratio": 4})
    with pytest.raises(ResumeMismatchError, match=r"4 times.*asks for 2"):
        run_exp({"loraplus_lr_ratio": 2, "resume_from_checkpoint": True})


def test_published_interface_a_run_without_a_ratio_is_refused(factory):
    with pytest.raises(TrainerSetupError, match="no loraplus_lr_ratio"):
        run_exp({})


def test_published_interface_two_ratios_are_refused(factory):
    with pytest.raises(TrainerSetupError, match=r"is 4, optim_args asks for 2"):
        run_exp({"loraplus_lr_ratio": 4, "optim_args": "ratio=2"})
    with pytest.raises(TrainerSetupError, match=r"is 4, optim_args asks for 16"):
        run_exp({"loraplus_lr_ratio": 4, "optim_args": "ratio=16"})


def test_published_interface_an_embeddings_rate_counts_unless_it_is_the_default():
    args = Seq2SeqTrainingArguments("out", learning_rate=1e-3, weight_decay=0.1, report_to=[], use_cpu=True)
    model = classifier(target_modules=["query", "word_embeddings"])
    for given, rate in ((1e-6, 1e-3), (1e-4, 1e-4)):
        optimizer = create_loraplus_optimizer(model, args, FinetuningArguments(4, given))
        loraplus.verify(model, optimizer, lr=1e-3, lr_ratio=4, lr_embedding=rate)


def test_published_interface_a_version_without_the_function_is_refused(factory):
    del factory.utils._create_loraplus_optimizer
    with pytest.raises(TrainerSetupError, match="has no _create_loraplus_optimizer"):
        install()
