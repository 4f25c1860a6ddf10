"""Every trainer that TRL exports, experimental ones included, trains at the ratio, or has `attach` refuse it."""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
from typing import Any

import pytest
from datasets import Dataset
from stacks.models import language_model, tokenizer
from stacks.trainers import BAD, GOOD, PROMPTS, longest_completion, rows_for
from transformers import Trainer, TrainingArguments

import loraplus
from loraplus.errors import TrainerSetupError

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
trl = pytest.importorskip("trl", reason="trl is not installed")

pytestmark = pytest.mark.plugin("TRL's trainers")

ELSEWHERE = {"SFTTrainer", "DPOTrainer", "KTOTrainer", "GRPOTrainer", "RewardTrainer"}
"""tests/stacks trains them."""
WITH_A_SERVER = {"AsyncGRPOTrainer", "AsyncDistillationTrainer", "ServerDistillationTrainer"}
"""They want a vLLM server."""


def exported() -> dict[str, type]:
    """{name: class} of all trainers."""
    import trl.experimental

    modules = [trl]
    modules += [
        importlib.import_module(f"trl.experimental.{m.name}") for m in pkgutil.iter_modules(trl.experimental.__path__)
    ]
    found = {}
    for module in modules:
        for name in dir(module):
            kind = getattr(module, name)
            if name.endswith("Trainer") and not name.startswith("_") and inspect.isclass(kind):
                found[name if module is trl else f"{module.__name__.rpartition('.')[2]}.{name}"] = kind
    return found


TEACHER = {"teacher_model": "teacher"}
REWARD = {"reward_funcs": longest_completion}
GENERATES = {"num_generations": 4, "max_completion_length": 4, "generation_batch_size": 8}
MESSAGES = [
    [{"role": "user", "content": p}, {"role": "assistant", "content": g}] for p, g in zip(PROMPTS, GOOD, strict=True)
]
# what each is given beside a model and data: (keywords, options, rows)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], Any]] = {
    "RLOOTrainer": (REWARD, GENERATES, rows_for("GRPO")),
    "gmpo.GMPOTrainer": (REWARD, GENERATES, rows_for("GRPO")),
    "a2po.A2POTrainer": (REWARD, {}, rows_for("GRPO")),
    "cpo.CPOTrainer": ({}, {"max_length": 16}, rows_for("DPO")),
    "orpo.ORPOTrainer": ({}, {"max_length": 16}, rows_for("DPO")),
    "tpo.TPOTrainer": (
        {},
        {},
        Dataset.from_dict({"prompt": PROMPTS, "chosen": GOOD, "rejected": BAD, "reference": GOOD}),
    ),
    "bema_for_ref_model.DPOTrainer": ({}, {"max_length": 16}, rows_for("DPO")),
    "kto.KTOTrainer": ({}, {"max_length": 16, "loss_type": "apo_zero_unpaired"}, rows_for("KTO")),
    "DistillationTrainer": (TEACHER, {"max_completion_length": 4}, rows_for("GRPO")),
    "distillation.DistillationTrainer": (TEACHER, {"max_completion_length": 4}, rows_for("GRPO")),
    "gkd.GKDTrainer": (TEACHER, {"max_new_tokens": 4}, Dataset.from_dict({"messages": MESSAGES})),
    "gold.GOLDTrainer": (
        TEACHER,
        {"max_completion_length": 4, "use_extended_uld": False},
        Dataset.from_dict({"messages": MESSAGES}),
    ),
    "iw_opd.IWOPDTrainer": (TEACHER, {"max_completion_length": 4}, Dataset.from_dict({"messages": MESSAGES})),
    "online_dpo.OnlineDPOTrainer": (REWARD, {"max_new_tokens": 4}, rows_for("GRPO")),
    "sdft.SDFTTrainer": (
        {},
        {"max_completion_length": 4, "distillation_topk": 4},
        Dataset.from_dict({"prompt": PROMPTS, "privileged_context": GOOD}),
    ),
    "sdpo.SDPOTrainer": (REWARD, GENERATES, rows_for("GRPO")),
}


def made(name: str, folder: Any) -> Any:
    kind = exported()[name]
    keywords, options, rows = CASES[name]
    module = importlib.import_module("trl" if "." not in name else f"trl.experimental.{name.split('.')[0]}")
    config = getattr(module, kind.__name__.replace("Trainer", "Config"), trl.DPOConfig)
    common = {
        "learning_rate": 1e-3, "weight_decay": 0.1, "max_steps": 1, "report_to": [], "use_cpu": True,
        "disable_tqdm": True, "per_device_train_batch_size": 8, "logging_steps": 1, "bf16": False,
        "gradient_checkpointing": False, "save_strategy": "no",
    }  # fmt: skip
    texts = tokenizer()
    texts.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    if name.startswith(("gold", "iw_opd")):  # which load the teacher's tokenizer themselves
        teacher = language_model("none").unload()
        teacher.save_pretrained(folder / "teacher")
        texts.save_pretrained(folder / "teacher")
        options = {**options, "teacher_tokenizer_name_or_path": str(folder / "teacher")}
        keywords = {**keywords, "teacher_model": str(folder / "teacher")}
    known = set(inspect.signature(config).parameters)
    args = config(str(folder), **{name: value for name, value in {**common, **options}.items() if name in known})
    keywords = {key: language_model("none") if value == "teacher" else value for key, value in keywords.items()}
    return kind(model=language_model("none"), args=args, train_dataset=rows, processing_class=texts, **keywords)


@pytest.mark.parametrize("name", CASES)
def test_a_trainer_of_trl_trains_at_the_ratio(name, tmp_path):
    trainer = loraplus.attach(made(name, tmp_path), lr_ratio=4)
    trainer.train()
    loraplus.verify(trainer.model, trainer.optimizer, lr=1e-3, lr_ratio=4)
    assert trainer.state.log_history[0]["lr/lora_B"] == pytest.approx(4e-3)


def test_what_is_not_trained_here_makes_its_optimizer_as_trainer_does():
    rest = set(exported()) - set(CASES) - ELSEWHERE
    for name in rest:
        kind = exported()[name]
        own = [each for each in kind.__mro__ if each.__module__.startswith("trl.")]
        hooks = {"create_optimizer", "create_optimizer_and_scheduler", "get_optimizer_cls_and_kwargs"}
        assert issubclass(kind, Trainer) and not any(hooks & vars(each).keys() for each in own), name
        assert "create_optimizer" not in inspect.getsource(kind.__init__), name
    assert {name.rpartition(".")[2] for name in rest} >= WITH_A_SERVER


class PPOTrainer(Trainer):
    """What TRL's had until 1.0: it makes optimizer and scheduler while it is made itself."""

    def __init__(self, *args: Any, optimizers: Any = (None, None), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.optimizer, self.lr_scheduler = optimizers
        self.create_optimizer_and_scheduler(num_training_steps=4)


def ppo(folder: Any, **more: Any) -> PPOTrainer:
    args = TrainingArguments(str(folder), learning_rate=1e-3, report_to=[], use_cpu=True)
    return PPOTrainer(model=language_model(), args=args, train_dataset=rows_for("SFT"), **more)


def test_published_interface_of_ppo_which_has_its_optimizer_already_is_refused_and_left_as_it_was(tmp_path):
    trainer = ppo(tmp_path)
    groups = [dict(group) for group in trainer.optimizer.param_groups]
    with pytest.raises(TrainerSetupError, match=r"has an optimizer already.*optimizers=\(loraplus.create_optimizer"):
        loraplus.attach(trainer, lr_ratio=4)
    assert type(trainer) is PPOTrainer
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [group["lr"] for group in groups]


def test_published_interface_of_ppo_takes_an_optimizer_with_the_ratio(tmp_path):
    model = language_model()
    optimizer = loraplus.create_optimizer(model, lr=1e-3, lr_ratio=4)
    args = TrainingArguments(str(tmp_path), learning_rate=1e-3, report_to=[], use_cpu=True)
    trainer = PPOTrainer(model=model, args=args, train_dataset=rows_for("SFT"), optimizers=(optimizer, None))
    assert trainer.optimizer is optimizer
    loraplus.verify(model, trainer.optimizer, lr=1e-3, lr_ratio=4)
    assert len(trainer.lr_scheduler.base_lrs) == len(optimizer.param_groups)
