"""One run: what is found wrong before it starts, what a step computes, and what is never saved."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_config
from transformers import BertModel

from loraplus.errors import DivergedError, InputError
from loraplus.files.output import prepare_output
from loraplus.rates import Rates
from loraplus.tasks.callbacks import DivergenceGuard, StopOnSignal
from loraplus.tasks.checks import rates_of
from loraplus.tasks.classification import load_classification
from loraplus.tasks.config import TrainConfig
from loraplus.tasks.model import load_classifier
from loraplus.tasks.pretrained import load_tokenizer
from loraplus.tasks.train import train
from loraplus.tasks.training import build_trainer, total_steps


@pytest.fixture
def config(tmp_path, model_folder, reviews_csv):
    return TrainConfig(
        model=str(model_folder), data=str(reviews_csv), output=str(tmp_path), max_steps=6, eval_steps=2, batch_size=16
    )


def trainer_of(config, *callbacks):
    tokenizer = load_tokenizer(config)
    data = load_classification(config, tokenizer)
    model = load_classifier(config, data.label_names, tokenizer, config.seed)
    rates = rates_of(config, config.lr, config.lr_ratio)
    return build_trainer(
        config, rates, data, model, tokenizer,
        seed=0, output=config.output, checkpoints=False, callbacks=callbacks,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("weight_decay", -1.0), ("weight_decay", 1e30), ("weight_decay", math.nan), ("weight_decay", math.inf),
        ("alpha", math.inf), ("alpha", math.nan), ("epochs", math.inf), ("lora_dropout", math.nan),
        ("warmup_ratio", math.nan),
    ],
)  # fmt: skip
def test_a_setting_that_no_run_can_have_is_refused_by_name(config, name, value):
    with pytest.raises(InputError, match=f"--{name.replace('_', '-')} must"):
        total_steps(dataclasses.replace(config, **{name: value, "max_steps": None}), 100)


HUGE = 10**400  # more than a float holds


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, HUGE) for name in ("rank", "batch_size", "eval_batch_size", "gradient_accumulation_steps")),
        *((name, HUGE) for name in ("max_steps", "eval_steps", "max_eval_samples", "epochs")),
        ("batch_size", 2**63),  # more than itertools counts
        ("alpha", 1e308),  # more than 32 bits hold
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_number_that_is_far_too_large_is_refused_by_name(config, name, value):
    flag = f"--{name.replace('_', '-')}"
    with pytest.raises(InputError, match=flag):
        total_steps(dataclasses.replace(config, **{name: value}), 100)


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("task", ["classification", "sft", "lm"])
def test_another_lr_is_refused_on_resuming_whatever_the_task(config, task, finished):
    before = dataclasses.replace(config, task=task, lr=1e-3)
    folder = prepare_output(config.output, dataclasses.asdict(before), overwrite=False, resume=True)
    if finished:
        (folder / "metrics.json").write_text("{}")
    with pytest.raises(InputError, match=r"lr was 0\.001, now 0\.0005; to go on with its rates add --lr 0\.001$"):
        train(dataclasses.replace(before, lr=5e-4), resume=True)


def test_parts_of_a_batch_add_up_to_the_batch(config):
    rows = []
    for parts in (1, 4):
        trainer = trainer_of(dataclasses.replace(config, gradient_accumulation_steps=parts))
        trainer.train()
        rows.append([(row["loss"], row["grad_norm"]) for row in trainer.state.log_history if "loss" in row])
    assert len(rows[0]) == 6
    torch.testing.assert_close(torch.tensor(rows[0]), torch.tensor(rows[1]), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("positions", [29, 32])
def test_padding_stays_within_the_positions(config, folder_of, tmp_path, positions):
    model = folder_of(BertModel(tiny_config(max_position_embeddings=positions)))
    data = tmp_path / "long.csv"
    words = ("good", "bad")
    data.write_text("text,label\n" + "".join(f"{words[i % 2]} {i} {'film ' * 60},{i % 2}\n" for i in range(40)))
    trainer = trainer_of(dataclasses.replace(config, model=str(model), data=str(data), max_steps=1))
    assert max(len(row["input_ids"]) for row in trainer.train_dataset) == positions
    trainer.train()


def control(**flags):
    return SimpleNamespace(**{"should_save": False, "should_log": False, "should_training_stop": False, **flags})


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_weights_are_not_saved(value):
    model = torch.nn.Linear(2, 2)
    guard, state = DivergenceGuard(Rates(1e-3)), SimpleNamespace(global_step=3, max_steps=9)
    guard.on_step_end(None, state, control(should_save=True), model=model)
    with torch.no_grad():
        model.weight[0, 0] = value
    guard.on_step_end(None, state, control(), model=model)
    with pytest.raises(DivergedError, match=f"the weight of weight became {value} at step 3 with η_A = 0.001"):
        guard.on_step_end(None, state, control(should_save=True), model=model)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_gradient_is_named_before_the_optimizer_takes_it(value):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[0].requires_grad_(False)
    model(torch.ones(1, 2)).sum().backward()
    guard, state = DivergenceGuard(Rates(1e-3)), SimpleNamespace(global_step=3, max_steps=9)
    args = SimpleNamespace(device=torch.device("cpu"))
    guard.on_pre_optimizer_step(args, state, control(), model=model)
    model[1].bias.grad[1] = value
    with pytest.raises(DivergedError, match=f"the gradient of 1.bias became {value} at step 4 with η_A"):
        guard.on_pre_optimizer_step(args, state, control(), model=model)


class StopAtStep(StopOnSignal):
    """As if the signal came in that step."""

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 1:
            self.stopped.set()


def test_a_signal_in_a_run_that_has_diverged_saves_nothing(config, tmp_path):
    config = dataclasses.replace(config, lr=1e25, lr_ratio=1e12, warmup_ratio=0.0, eval_steps=6)
    guard = DivergenceGuard(rates_of(config, config.lr, config.lr_ratio))
    with pytest.raises(DivergedError, match="at step 2"):
        trainer_of(config, StopAtStep(), guard).train()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_signal_has_the_loss_looked_at_before_it_saves():
    stop, flags = StopOnSignal(), control()
    stop.stopped.set()
    stop.on_step_end(None, SimpleNamespace(global_step=3, max_steps=9), flags)
    assert flags.should_log and flags.should_save and flags.should_training_stop
