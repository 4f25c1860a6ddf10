"""Settings of a Trainer count when they are used: in a search, after a change of `args`, for each new model and run."""

from __future__ import annotations

import warnings

import optuna
import pytest
import torch
from pytorch_optimizer import Lookahead
from stacks.models import classifier
from transformers import Trainer, TrainerCallback, TrainingArguments

import loraplus
from integrations.test_transformers import Tokens, adapted, common, weights
from loraplus import LoraPlusTrainer, LoraPlusTrainingArguments
from loraplus.errors import InvalidRateError, LoraPlusWarning, ResumeMismatchError, TrainerSetupError

optuna.logging.set_verbosity(optuna.logging.ERROR)


class Seen(TrainerCallback):
    """What every run trained with, and whether its hooks were off again before the next."""

    def __init__(self):
        self.runs = []

    def on_train_begin(self, args, state, control, optimizer=None, model=None, **_):
        rates = {group["name"].removesuffix("_no_decay"): group["initial_lr"] for group in optimizer.param_groups}
        decay = max(group["weight_decay"] for group in optimizer.param_groups)
        self.runs.append({"args": args.to_dict(), "rates": rates, "decay": decay, "kind": type(optimizer.optimizer)})
        assert all(id(p) in {id(q) for q in model.parameters()} for g in optimizer.param_groups for p in g["params"])


def factors(model=None):
    return adapted(target_modules=["query", "value"])


def searched(folder, kind=LoraPlusTrainer, **more):
    seen = Seen()
    arguments = LoraPlusTrainingArguments if kind is LoraPlusTrainer else TrainingArguments
    args = arguments(**common(folder, **{"max_steps": 2, "warmup_steps": 0, **more}))
    trainer = kind(None, args, train_dataset=Tokens(16), eval_dataset=Tokens(8), model_init=factors, callbacks=[seen])
    return trainer, seen


def search(trainer, values):
    """Tries the first value of every name, then the second, …"""
    tried = [dict(zip(values, those, strict=True)) for those in zip(*values.values(), strict=True)]
    sampler = optuna.samplers.GridSampler({"trial": list(range(len(tried)))}, seed=0)

    def space(trial):
        return tried[trial.suggest_categorical("trial", list(range(len(tried))))]

    trainer.hyperparameter_search(space, n_trials=len(tried), direction="minimize", sampler=sampler)


def test_every_setting_that_is_searched_reaches_its_run(tmp_path):
    trainer, seen = searched(tmp_path)
    search(trainer, {
        "loraplus_lr_ratio": [2.0, 4.0, 64.0],
        "learning_rate": [1e-3, 2e-3, 3e-3],
        "loraplus_lr_head": [1e-4, 5e-4, 2e-4],
        "weight_decay": [0.0, 0.1, 0.2],
        "optim": ["sgd", "adamw_torch", "rmsprop"],
        "loraplus_lr_overrides": ['{"query": 0.5}', '{"layer.1": 2.0}', "{}"],
        "loraplus_lr_ratio_overrides": [{}, {}, {"value": 8.0}],
    })  # fmt: skip
    assert len({run["args"]["loraplus_lr_ratio"] for run in seen.runs}) == 3
    for run in seen.runs:
        lr, ratio = run["args"]["learning_rate"], run["args"]["loraplus_lr_ratio"]
        assert run["rates"]["lora_A"] == lr and run["rates"]["lora_B"] == pytest.approx(ratio * lr)
        assert run["rates"]["head"] == run["args"]["loraplus_lr_head"]
        assert run["decay"] == run["args"]["weight_decay"]
        others = {name: rate for name, rate in run["rates"].items() if name not in ("lora_A", "lora_B", "head")}
        expected = {
            2.0: {"lora_A_x0.5": lr / 2, "lora_B_x0.5": lr},
            4.0: {"lora_A_x2": 2 * lr, "lora_B_x2": 8 * lr},
            64.0: {"lora_B_ratio8": 8 * lr},
        }[ratio]
        assert others == pytest.approx(expected)
    assert {run["kind"] for run in seen.runs} == {torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop}


def test_automatic_rates_are_on_in_the_runs_that_ask_for_them_only(tmp_path):
    trainer, seen = searched(tmp_path, max_steps=3, logging_steps=1)
    search(trainer, {"loraplus_auto_rates": [True, False, True], "learning_rate": [1e-3, 2e-3, 3e-3]})
    assert len(seen.runs) == 3
    trainer.args.loraplus_auto_rates = False
    trainer.train()
    assert trainer.loraplus_auto is None and not hasattr(trainer.optimizer.optimizer, "loraplus_auto")
    loraplus.verify(trainer.model, trainer.optimizer, lr_ratio=16, lr=trainer.args.learning_rate)


def test_an_attached_trainer_can_be_searched_over_its_own_arguments(tmp_path):
    trainer, seen = searched(tmp_path, Trainer)
    loraplus.attach(trainer, lr_ratio=8)
    search(trainer, {"learning_rate": [1e-3, 4e-3], "weight_decay": [0.0, 0.3]})
    for run in seen.runs:
        lr = run["args"]["learning_rate"]
        assert run["rates"] == {"lora_A": lr, "lora_B": 8 * lr, "head": lr}
        assert run["decay"] == run["args"]["weight_decay"]
    assert {run["args"]["learning_rate"] for run in seen.runs} == {1e-3, 4e-3}


def test_a_hyperparameter_that_reaches_nothing_is_refused(tmp_path):
    trainer, seen = searched(tmp_path, Trainer)
    with pytest.raises(
        TrainerSetupError, match="loraplus_lr_ratio is searched, but is no field of TrainingArguments.*L"
    ):
        search(loraplus.attach(trainer), {"loraplus_lr_ratio": [1.0, 4.0]})
    with pytest.raises(TrainerSetupError, match="lr_ratio is searched, but is no field of LoraPlusTrainingArguments"):
        search(searched(tmp_path)[0], {"lr_ratio": [1.0, 4.0]})
    with pytest.raises(TrainerSetupError, match="learning_rate is searched, but loraplus.attach was given lr"):
        search(loraplus.attach(searched(tmp_path, Trainer)[0], lr=1e-3), {"learning_rate": [1e-3, 4e-3]})
    assert not seen.runs


def test_a_hyperparameter_of_the_models_own_is_none_of_our_business(tmp_path):
    trainer, seen = searched(tmp_path)
    trainer.model_init = lambda trial=None: adapted(
        r=trial.suggest_categorical("rank", [2]) if trial else 4, target_modules=["query"]
    )
    trainer.hyperparameter_search(
        lambda trial: {"rank": trial.suggest_categorical("rank", [2])}, n_trials=1, direction="minimize"
    )
    assert len(seen.runs) == 1


@pytest.mark.parametrize("changed", [{"learning_rate": 1e-4}, {"weight_decay": 0.3}, {"optim": "sgd"}])
def test_arguments_changed_after_attaching_count(tmp_path, changed):
    seen = Seen()
    args = TrainingArguments(**common(tmp_path, max_steps=2))
    trainer = loraplus.attach(Trainer(factors(), args, train_dataset=Tokens(16), callbacks=[seen]), lr_ratio=4)
    for name, value in changed.items():
        setattr(args, name, value)
    trainer.train()
    run, lr = seen.runs[0], args.learning_rate
    assert run["rates"] == {"lora_A": lr, "lora_B": 4 * lr, "head": lr}
    assert run["decay"] == args.weight_decay and (run["kind"] is torch.optim.SGD) == (args.optim == "sgd")


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"loraplus_lr_ratio": 2.0}, {"lora_A": 5e-3, "lora_B": 1e-2, "head": 5e-3}),
        ({"loraplus_lr_head": 1e-4}, {"lora_A": 5e-3, "lora_B": 8e-2, "head": 1e-4}),
        ({"learning_rate": 1e-3}, {"lora_A": 1e-3, "lora_B": 1.6e-2, "head": 1e-3}),
        ({"loraplus_lr_overrides": '{"lora_B": 0.5}'}, {"lora_A": 5e-3, "lora_B_x0.5": 4e-2, "head": 5e-3}),
    ],
)  # fmt: skip
def test_arguments_changed_before_train_and_between_two_count(tmp_path, changed, expected):
    def trainer(**more):
        args = LoraPlusTrainingArguments(**common(tmp_path, max_steps=2, **more))
        return LoraPlusTrainer(factors(), args, train_dataset=Tokens(16), callbacks=[seen := Seen()]), seen

    changed_at_once, seen = trainer()
    for name, value in changed.items():
        setattr(changed_at_once.args, name, value)
    changed_at_once.train()
    assert seen.runs[0]["rates"] == pytest.approx(expected)
    changed_later, seen = trainer()
    changed_later.train()
    for name, value in changed.items():
        setattr(changed_later.args, name, value)
    changed_later.train()
    assert [run["rates"] for run in seen.runs[:1]] == [{"lora_A": 5e-3, "lora_B": 8e-2, "head": 5e-3}]
    assert seen.runs[1]["rates"] == pytest.approx(expected)


def test_a_second_train_goes_on_with_the_optimizer_as_trainer_does(tmp_path):
    def twice(ratio):
        args = TrainingArguments(**common(tmp_path, max_steps=3))
        trainer = Trainer(adapted(), args, train_dataset=Tokens(32))
        if ratio is not None:
            loraplus.attach(trainer, lr_ratio=ratio)
        trainer.train()
        first = trainer.optimizer
        trainer.train()
        return trainer, first

    plain, _ = twice(None)
    ours, first = twice(1)
    assert ours.optimizer is first
    assert all(torch.equal(value, weights(plain.model)[name]) for name, value in weights(ours.model).items())
    faster, _ = twice(16)
    loraplus.verify(faster.model, faster.optimizer, lr_ratio=16, lr=5e-3)


class Anew(Trainer):
    """Builds an optimizer whenever it is asked for one, as many overrides do."""

    def create_optimizer(self, model=None):
        self.optimizer = torch.optim.SGD([p for p in self.model.parameters() if p.requires_grad], lr=0.1)


class WrapsAgain(Trainer):
    """Wraps what is there already, when it is asked a second time."""

    def create_optimizer(self, model=None):
        self.optimizer = Lookahead(super().create_optimizer(), k=2)


@pytest.mark.parametrize("kind", [Anew, WrapsAgain])
def test_a_hook_that_builds_anew_for_each_train_does_so(tmp_path, kind):
    def twice(ratio):
        args = TrainingArguments(**common(tmp_path, max_steps=2))
        trainer = kind(adapted(), args, train_dataset=Tokens(32))
        if ratio is not None:
            loraplus.attach(trainer, lr_ratio=ratio)
        trainer.train()
        trainer.train()
        return trainer

    plain, ours = twice(None), twice(1)
    assert all(torch.equal(value, weights(plain.model)[name]) for name, value in weights(ours.model).items())
    faster = twice(16)
    loraplus.verify(faster.model, faster.optimizer, lr_ratio=16, lr=0.1 if kind is Anew else 5e-3)


def test_automatic_rates_go_on_in_a_second_train(tmp_path):
    args = TrainingArguments(**common(tmp_path, max_steps=4, warmup_steps=0, logging_steps=1))
    trainer = loraplus.attach(Trainer(factors(), args, train_dataset=Tokens(32)), lr="auto")
    trainer.train()
    first = trainer.loraplus_auto.lr_b
    assert trainer.loraplus_auto.steps == 4 and not trainer.model._forward_hooks
    trainer.train()
    assert trainer.loraplus_auto.steps == 8 and trainer.loraplus_auto.lr_b != first
    torch.save(trainer.model, tmp_path / "model.pt")  # no hook is left in it
    rates = trainer.loraplus_auto
    loraplus.verify(trainer.model, trainer.optimizer, lr_ratio=rates.lr_b / rates.lr_a, lr_head=5e-3)


def test_every_model_of_model_init_is_trained_with_its_rates(tmp_path):
    for kind in (Trainer, LoraPlusTrainer):
        trainer, seen = searched(tmp_path, kind)
        if kind is Trainer:
            loraplus.attach(trainer)
        models = []
        for _ in range(3):
            trainer.train()
            models.append(trainer.model)
            loraplus.verify(trainer.model, trainer.optimizer, lr_ratio=16, lr=5e-3)
        assert len({id(model) for model in models}) == 3 and len(seen.runs) == 3


class TooLarge(Trainer):
    """Runs out of memory at the first batch size, in its second step."""

    seen = 0

    def training_step(self, model, inputs, *args, **kwargs):
        self.seen += 1
        if len(inputs["labels"]) == 8 and self.seen == 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().training_step(model, inputs, *args, **kwargs)


@pytest.mark.parametrize("given", [{"lr_ratio": 16}, {"lr_ratio": 4, "lr_head": 1e-4}, {"lr": "auto"}])
def test_the_rates_hold_when_a_smaller_batch_size_is_tried(tmp_path, given):
    args = TrainingArguments(
        **common(tmp_path, max_steps=4, auto_find_batch_size=True, logging_steps=1, warmup_steps=0)
    )
    trainer = loraplus.attach(TooLarge(factors(), args, train_dataset=Tokens(64)), **given)
    trainer.train()
    assert trainer._train_batch_size < 8 and trainer.state.global_step == 4
    auto = trainer.loraplus_auto
    ratio = auto.lr_b / auto.lr_a if auto else given["lr_ratio"]
    loraplus.verify(trainer.model, trainer.optimizer, lr_ratio=ratio, lr_head=given.get("lr_head", 5e-3))
    rows = [row for row in trainer.state.log_history if "lr/lora_A" in row]
    assert len(rows) == 4 and rows[0]["lr/head"] == given.get("lr_head", 5e-3)


def test_settings_are_given_once(tmp_path):
    def trainer(**more):
        args = LoraPlusTrainingArguments(**common(tmp_path, max_steps=1, **more))
        return Trainer(factors(), args, train_dataset=Tokens(16))

    said = trainer(loraplus_lr_ratio=4.0)
    assert loraplus.attach(said).loraplus_rates.lr_ratio == 4  # nothing was given to attach
    said.args.loraplus_lr_ratio = 8.0
    loraplus.verify(said.model, said.create_optimizer(), lr_ratio=8)
    assert loraplus.attach(trainer(), lr_ratio=4).loraplus_rates.lr_ratio == 4  # nothing in the arguments
    with pytest.raises(TrainerSetupError, match=r"training arguments ask for lr_ratio = 4.0, loraplus.attach for 2"):
        loraplus.attach(trainer(loraplus_lr_ratio=4.0), lr_ratio=2)


def test_a_setting_that_cannot_be_used_is_refused_when_it_is_used(tmp_path):
    args = LoraPlusTrainingArguments(**common(tmp_path, max_steps=1))
    trainer = LoraPlusTrainer(factors(), args, train_dataset=Tokens(16))
    args.loraplus_lr_ratio = -1.0
    with pytest.raises(InvalidRateError, match="lr_ratio must be a positive"):
        trainer.train()
    args.loraplus_lr_ratio, args.loraplus_lr_overrides = 2.0, {"nowhere": 2.0}
    with pytest.raises(InvalidRateError, match="'nowhere' matches no trainable parameter"):
        trainer.train()
    args.loraplus_lr_overrides = None
    trainer.train()
    loraplus.verify(trainer.model, trainer.optimizer, lr_ratio=2)


@pytest.mark.parametrize("lr", [5e-3, 0.1])
def test_a_rate_of_the_trainers_own_hook_is_compared_on_resuming(tmp_path, lr):
    class Own(Trainer):
        def get_optimizer_cls_and_kwargs(self, args, model=None):
            return torch.optim.SGD, {"lr": lr}

    def trainer(ratio=16, steps=4):
        args = TrainingArguments(**common(tmp_path, max_steps=steps, save_strategy="steps", save_steps=2))
        return loraplus.attach(Own(factors(), args, train_dataset=Tokens(16)), lr_ratio=ratio)

    trainer(steps=2).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error", LoraPlusWarning)
        again = trainer()
        again.train(resume_from_checkpoint=True)
    loraplus.verify(again.model, again.optimizer, lr_ratio=16, lr=lr)
    with pytest.raises(ResumeMismatchError, match=r"lr_ratio = 16.*asks for 2"):
        trainer(ratio=2).train(resume_from_checkpoint=True)


def test_a_search_or_a_change_over_what_attach_was_given_is_refused(tmp_path):
    args = LoraPlusTrainingArguments(**common(tmp_path))
    trainer = loraplus.attach(Trainer(None, args, train_dataset=Tokens(), model_init=factors), 4)
    with pytest.raises(TrainerSetupError, match="loraplus_lr_ratio is searched, but loraplus.attach was given the rat"):
        trainer.hyperparameter_search(lambda trial: {"loraplus_lr_ratio": 8.0}, n_trials=1, backend="optuna")
    args.loraplus_lr_ratio = 64.0
    with pytest.raises(TrainerSetupError, match="ask for lr_ratio = 64.0, loraplus.attach for 4"):
        trainer.train()


def test_trainers_own_space_holds_a_rate_that_attach_was_given(tmp_path):
    trainer = Trainer(None, TrainingArguments(**common(tmp_path)), train_dataset=Tokens(), model_init=factors)
    with pytest.raises(TrainerSetupError, match="learning_rate is searched"):
        loraplus.attach(trainer, lr=1e-3).hyperparameter_search(n_trials=1, backend="optuna")


class ByLayer(Trainer):
    """Rates of its own for query and value."""

    of_value = 1e-4

    def create_optimizer(self, model=None):
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        rates = {"query": 1e-3, "value": self.of_value}
        groups = [{"params": [p for name, p in named if part in name], "lr": lr} for part, lr in rates.items()]
        self.optimizer = torch.optim.AdamW(groups)
        return self.optimizer


def test_resuming_at_another_rate_of_the_trainers_own_is_refused(tmp_path):
    def by_layer(kind, folder, steps):
        args = TrainingArguments(**common(folder, max_steps=steps, save_strategy="steps", save_steps=2))
        return loraplus.attach(kind(factors(), args, train_dataset=Tokens()), 16)

    by_layer(ByLayer, tmp_path / "a", 2).train()
    checkpoint = str(tmp_path / "a" / "checkpoint-2")
    by_layer(ByLayer, tmp_path / "b", 4).train(resume_from_checkpoint=checkpoint)
    changed = type("Changed", (ByLayer,), {"of_value": 5e-4})
    with pytest.raises(ResumeMismatchError, match=r"lr_overrides\[.*value.* = 0\.1, this run asks for 0\.5"):
        by_layer(changed, tmp_path / "c", 4).train(resume_from_checkpoint=checkpoint)


def test_an_optimizer_that_a_later_callback_puts_in_place_is_refused(tmp_path):
    trainer = loraplus.attach(Trainer(factors(), TrainingArguments(**common(tmp_path)), train_dataset=Tokens()), 16)

    class Replaces(TrainerCallback):
        def on_train_begin(self, args, state, control, **_):
            trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1)

    trainer.add_callback(Replaces())
    with pytest.raises(TrainerSetupError, match="an optimizer that LoRA. did not split"):
        trainer.train()


def test_evaluation_only_needs_no_rate(tmp_path):
    args = TrainingArguments(**common(tmp_path, learning_rate=0.0))
    assert "eval_loss" in loraplus.attach(Trainer(factors(), args, eval_dataset=Tokens(8))).evaluate()


@pytest.mark.plugin("optim_args")
def test_optim_args_give_the_rates_and_the_optimizer_gets_the_rest(tmp_path):
    args = TrainingArguments(
        str(tmp_path), optim="sgd", optim_args="ratio=4, momentum=0.5, lr_head=1e-3", learning_rate=1e-2, report_to=[],
        use_cpu=True,
    )  # fmt: skip
    trainer = loraplus.attach(Trainer(classifier(), args, train_dataset=Tokens()))
    optimizer = trainer.create_optimizer()
    loraplus.verify(trainer.model, optimizer, lr=1e-2, lr_ratio=4, lr_head=1e-3)
    assert {group["momentum"] for group in optimizer.param_groups} == {0.5}
    assert args.optim_args == "ratio=4, momentum=0.5, lr_head=1e-3"


@pytest.mark.parametrize("text", ["ratio=much", "ratio=2,lr_ratio=3", "lr_overrides=1"])
def test_optim_args_that_say_no_number_are_refused(tmp_path, text):
    args = TrainingArguments(str(tmp_path), optim_args=text, report_to=[], use_cpu=True)
    with pytest.raises(TrainerSetupError, match="optim_args has"):
        loraplus.attach(Trainer(classifier(), args, train_dataset=Tokens()))


@pytest.mark.parametrize(("ratio", "text"), [(2, "ratio=4"), (16, "ratio=4"), (4, "ratio=16")])
def test_optim_args_beside_another_ratio_are_refused_be_it_the_default(tmp_path, ratio, text):
    common = {"output_dir": str(tmp_path), "optim_args": text, "report_to": [], "use_cpu": True}
    with pytest.raises(TrainerSetupError, match=rf"lr_ratio = {ratio}.*optim_args for {text.partition('=')[2]}"):
        LoraPlusTrainer(
            classifier(), LoraPlusTrainingArguments(loraplus_lr_ratio=ratio, **common), train_dataset=Tokens()
        )
    trainer = Trainer(classifier(), TrainingArguments(**common), train_dataset=Tokens())
    with pytest.raises(TrainerSetupError, match=rf"lr_ratio = {text.partition('=')[2]}.*attach for {ratio}"):
        loraplus.attach(trainer, lr_ratio=ratio)
    loraplus.attach(trainer, lr_ratio=float(text.partition("=")[2]))  # the same twice is no matter


def test_a_ratio_of_the_arguments_beside_another_of_attach_is_refused_be_it_the_default(tmp_path):
    args = LoraPlusTrainingArguments(**common(tmp_path), loraplus_lr_ratio=16)
    with pytest.raises(TrainerSetupError, match=r"ask for lr_ratio = 16.*attach for 4.*set the rates in one of them"):
        loraplus.attach(Trainer(factors(), args, train_dataset=Tokens()), lr_ratio=4)
    left_out = LoraPlusTrainingArguments(**common(tmp_path))
    trainer = loraplus.attach(Trainer(factors(), left_out, train_dataset=Tokens()), lr_ratio=4)
    assert trainer.loraplus_rates.lr_ratio == 4


def test_attach_that_asks_for_logs_alone_leaves_the_rates_to_the_arguments(tmp_path):
    args = TrainingArguments(**common(tmp_path), optim_args="ratio=4, lr_head=1e-3")
    trainer = loraplus.attach(Trainer(factors(), args, train_dataset=Tokens()), log_updates=10)
    assert trainer.loraplus_settings.log_updates == 10
    assert (trainer.loraplus_rates.lr_ratio, trainer.loraplus_rates.lr_head) == (4, 1e-3)
    ours = LoraPlusTrainingArguments(**common(tmp_path), loraplus_lr_ratio=8, loraplus_log_updates=5)
    with pytest.raises(TrainerSetupError, match="ask for log_updates = 5, loraplus.attach for 10"):
        loraplus.attach(Trainer(factors(), ours, train_dataset=Tokens()), log_updates=10)


@pytest.mark.parametrize("ratio", [4, 16])
def test_a_ratio_beside_automatic_rates_is_refused_be_it_the_default(tmp_path, ratio):
    told = "lr_ratio is not used with automatic rates, which set the ratio; leave it out, or give lr as a number"
    trainer = Trainer(factors(), TrainingArguments(**common(tmp_path)), train_dataset=Tokens())
    with pytest.raises(InvalidRateError, match=told):
        loraplus.attach(trainer, lr="auto", lr_ratio=ratio)
    args = LoraPlusTrainingArguments(**common(tmp_path), loraplus_auto_rates=True, loraplus_lr_ratio=ratio)
    with pytest.raises(InvalidRateError, match=told):
        LoraPlusTrainer(factors(), args, train_dataset=Tokens())
    with pytest.raises(InvalidRateError, match=told):
        loraplus.create_optimizer(factors(), lr="auto", lr_ratio=ratio)
    with pytest.raises(InvalidRateError, match=told):
        loraplus.create_optimizer(factors(), rates=loraplus.Rates("auto", ratio))
