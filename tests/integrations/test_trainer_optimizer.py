"""What a trainer's own hooks build is kept: at ratio 1 bit for bit, at another with B that many times faster."""

from __future__ import annotations

import functools
import re

import pytest
import torch
from pytorch_optimizer import Lookahead
from torch import nn
from transformers import Trainer, TrainingArguments

import loraplus
from integrations.test_transformers import Tokens, adapted, common, weights
from loraplus import LoraPlusTrainer, LoraPlusTrainingArguments
from loraplus.errors import InvalidRateError, OptimizerSetupError, ParameterGroupError, TrainerSetupError


def trained_of(trainer):
    return [(name, p) for name, p in trainer.model.named_parameters() if p.requires_grad]


class LossWithWeight(Trainer):
    """As sentence-transformers does: the loss owns parameters, and the model's come through it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.loss = nn.Module()
        self.loss.scale, self.loss.bias = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(()))
        self.loss.model = self.model

    def compute_loss(self, model, inputs, return_outputs=False, **_):
        output = model(**inputs)
        loss = output.loss * self.loss.scale + self.loss.bias.square()
        return (loss, output) if return_outputs else loss

    def get_optimizer_cls_and_kwargs(self, args, model=None):
        optimizer_cls, kwargs = super().get_optimizer_cls_and_kwargs(args, self.loss)
        decaying = self.get_decay_parameter_names(self.loss)
        named = [(name, p) for name, p in self.loss.named_parameters() if p.requires_grad]
        kwargs["optimizer_dict"] = [
            {"params": [p for name, p in named if name in decaying], "weight_decay": args.weight_decay},
            {"params": [p for name, p in named if name not in decaying], "weight_decay": 0.0},
        ]
        return optimizer_cls, kwargs


class Momentum(Trainer):
    @staticmethod
    def get_optimizer_cls_and_kwargs(args, model=None):
        return torch.optim.SGD, {"lr": 7 * args.learning_rate, "momentum": 0.5}


class TwoLosses(LossWithWeight):
    """The loss's parameters in a group of their own, at a rate of their own."""

    def get_optimizer_cls_and_kwargs(self, args, model=None):
        mine = [self.loss.scale, self.loss.bias]
        groups = [{"params": [p for _, p in trained_of(self)]}, {"params": mine, "lr": 0.3}]
        return torch.optim.SGD, {"lr": args.learning_rate, "optimizer_dict": groups}


class NoDecayOnA(Trainer):
    def get_decay_parameter_names(self, model):
        return [name for name in super().get_decay_parameter_names(model) if "lora_A" not in name]


class LayerWise(Trainer):
    """Every layer at half the rate of the one above it, all built here."""

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            layers: dict[str, list] = {}
            for name, p in trained_of(self):
                layers.setdefault("0" if "layer.0" in name else "1" if "layer.1" in name else "top", []).append(p)
            rates = {"top": 1.0, "1": 0.5, "0": 0.25}
            groups = [
                {"params": ps, "lr": self.args.learning_rate * rates[layer], "weight_decay": 0.01 * rates[layer]}
                for layer, ps in layers.items()
            ]
            self.optimizer = torch.optim.AdamW(groups, betas=(0.8, 0.95))
        return self.optimizer


class OwnNames(Trainer):
    """Groups that have names, one of them without factors."""

    def create_optimizer(self, model=None):
        trained = trained_of(self)
        groups = [
            {"params": [p for name, p in trained if "classifier" not in name], "name": "encoder", "lr": 2e-3},
            {"params": [p for name, p in trained if "classifier" in name], "name": "top", "lr": 7e-3},
        ]
        self.optimizer = torch.optim.Adamax(groups)


class Wrapped(Trainer):
    def create_optimizer(self):
        if self.optimizer is None:
            self.optimizer = Lookahead(super().create_optimizer(), k=2)
        return self.optimizer


class AddsGroup(LossWithWeight):
    def get_optimizer_cls_and_kwargs(self, args, model=None):
        return Trainer.get_optimizer_cls_and_kwargs(args, model)

    def create_optimizer(self, model=None):
        super().create_optimizer(model)
        self.optimizer.add_param_group({"params": [self.loss.scale], "lr": 0.05, "name": "loss"})
        return self.optimizer


class Named(Trainer):
    """All parameters, frozen ones too, under their names, as torch takes them."""

    def create_optimizer(self, model=None):
        self.optimizer = torch.optim.NAdam(self.model.named_parameters(), lr=2e-3)


class TwoInOne(torch.optim.Optimizer):
    """SGD for some and AdamW for the others, as Muon's packages do; its groups are put together when asked for."""

    def __init__(self, some, others, lr):
        super().__init__([*some, *others], {"lr": lr})
        self.parts = [torch.optim.SGD(some, lr=lr), torch.optim.AdamW(others, lr=lr)]
        del self.param_groups

    @property
    def param_groups(self):
        return [group for part in self.parts for group in part.param_groups]

    @param_groups.setter
    def param_groups(self, groups):
        pass

    @param_groups.deleter
    def param_groups(self):
        pass

    def add_param_group(self, param_group):
        pass

    def step(self, closure=None):
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none=True):
        for part in self.parts:
            part.zero_grad()


class Factory:
    def __call__(self, model, lr):
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        return TwoInOne([p for n, p in named if "layer.0" in n], [p for n, p in named if "layer.0" not in n], lr)


def with_class(*how):
    return functools.partial(Trainer, optimizer_cls_and_kwargs=how)


TRAINERS = {
    "loss in the groups": LossWithWeight,
    "loss in a group of its own": TwoLosses,
    "static": Momentum,
    "decay names": NoDecayOnA,
    "layer-wise": LayerWise,
    "groups with names": OwnNames,
    "Lookahead": Wrapped,
    "a group added": AddsGroup,
    "named parameters": Named,
    "class with its own lr": with_class(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "class with its default lr": with_class(torch.optim.RMSprop, {}),
    "partial": with_class(functools.partial(torch.optim.AdamW, betas=(0.5, 0.6), lr=1.0), {"lr": 3e-3}),
    "factory": with_class(Factory, {"lr": 4e-3}),
    "factory as a partial": with_class(functools.partial(Factory), {"lr": 4e-3}),
}


def make(how, folder, **more):
    trainer = TRAINERS[how] if isinstance(how, str) else how
    args = TrainingArguments(**common(folder, **{"max_steps": 3, "warmup_steps": 0, **more}))
    return trainer(model=adapted(bias="lora_only"), args=args, train_dataset=Tokens(24))


def options_of(trainer):
    """{name of a parameter, of the loss too: the options of its group}"""
    names = {id(p): name for name, p in (*getattr(trainer, "loss", trainer.model).named_parameters(),)}
    names |= {id(p): name for name, p in trainer.model.named_parameters()}
    return {
        names[id(p)]: {key: value for key, value in group.items() if key not in ("params", "param_names", "name")}
        for group in trainer.optimizer.param_groups
        for p in group["params"]
    }


def plain(how, folder):
    """A trainer of transformers 5.24 builds nothing from a partial of a class; the class then stands in for it."""
    if how == "partial":
        return make(with_class(torch.optim.AdamW, {"betas": (0.5, 0.6), "lr": 3e-3}), folder)
    if how == "factory as a partial":
        return make("factory", folder)
    return make(how, folder)


@pytest.mark.parametrize("how", TRAINERS)
def test_at_ratio_one_it_is_the_trainer_itself_bit_for_bit(tmp_path, how):
    expected = plain(how, tmp_path)
    expected.train()
    found = loraplus.attach(make(how, tmp_path), lr_ratio=1)
    found.train()
    assert type(found.optimizer.optimizer) is type(expected.optimizer.optimizer)
    ours, theirs = weights(found.model), weights(expected.model)
    assert all(torch.equal(value, ours[name]) for name, value in theirs.items())
    if hasattr(expected, "loss"):
        assert torch.equal(expected.loss.scale, found.loss.scale) and found.loss.scale.item() != 1


@pytest.mark.parametrize("how", TRAINERS)
def test_b_learns_that_many_times_faster_within_each_group_and_all_else_is_kept(tmp_path, how):
    expected, found = plain(how, tmp_path), loraplus.attach(make(how, tmp_path), lr_ratio=16)
    expected.create_optimizer()
    found.create_optimizer()
    theirs, ours = options_of(expected), options_of(found)
    assert theirs.keys() == ours.keys()
    for name, options in theirs.items():
        factor = 16 if re.search(r"lora_B\.", name) else 1
        assert ours[name] == {**options, "lr": pytest.approx(factor * options["lr"])}, name
    names = [group["name"] for group in found.optimizer.param_groups]
    assert len(set(names)) == len(names) and all(group["params"] for group in found.optimizer.param_groups)


@pytest.mark.parametrize("how", TRAINERS)
def test_it_is_proved_against_the_trainers_own_groups(tmp_path, how):
    trainer = loraplus.attach(make(how, tmp_path), lr_ratio=16)
    assert trainer.loraplus_groups is None
    trainer.train()
    loraplus.verify(trainer.model, trainer.optimizer, 16, groups=trainer.loraplus_groups)
    with pytest.raises(loraplus.RateMismatchError):
        loraplus.verify(trainer.model, trainer.optimizer, 8, groups=trainer.loraplus_groups)


@pytest.mark.parametrize("how", ["static", "Lookahead", "layer-wise", "factory", "loss in a group of its own"])
def test_the_step_moves_b_that_many_times_further(tmp_path, how):
    trainer = loraplus.attach(make(how, tmp_path, weight_decay=0.0), lr_ratio=16)
    optimizer = trainer.create_optimizer()
    rates = {name: options["lr"] for name, options in options_of(trainer).items()}
    trained = trained_of(trainer)
    for _, parameter in trained:
        parameter.data.zero_()
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, parameter in trained:
        moved = -parameter.detach().flatten()
        assert torch.allclose(moved, torch.full_like(moved, rates[name]), rtol=1e-3), name


def test_groups_have_the_names_that_users_know_whatever_the_decay(tmp_path):
    for decay in (0.0, 0.1):
        trainer = loraplus.attach(make(Trainer, tmp_path, weight_decay=decay))
        found = {group["name"]: group["weight_decay"] for group in trainer.create_optimizer().param_groups}
        decaying = ("lora_embedding_A", "lora_embedding_B", "lora_A", "lora_B", "head")
        assert found == {**dict.fromkeys(decaying, decay), "head_no_decay": 0.0, "norm_bias_no_decay": 0.0}
    trainer = loraplus.attach(make("layer-wise", tmp_path))
    names = [group["name"] for group in trainer.create_optimizer().param_groups]
    assert names[:2] == ["group_0/lora_embedding_A", "group_0/lora_embedding_B"]
    assert {"group_1/lora_A", "group_1/lora_B", "group_2/lora_A", "group_2/lora_B", "group_0/head"} <= set(names)
    trainer = loraplus.attach(make("groups with names", tmp_path))
    names = [group["name"] for group in trainer.create_optimizer().param_groups]
    assert {"encoder/lora_A", "encoder/lora_B", "top"} <= set(names)
    trainer = loraplus.attach(make("a group added", tmp_path))
    assert {"loss", "lora_A", "lora_B"} <= {group["name"] for group in trainer.create_optimizer().param_groups}


def test_parameters_stand_in_the_models_order_so_that_states_of_older_checkpoints_are_theirs(tmp_path):
    trainer = loraplus.attach(make(Trainer, tmp_path, weight_decay=0.1))
    expected = loraplus.param_groups(trainer.model, lr=5e-3, weight_decay=0.1)
    found = trainer.create_optimizer().param_groups
    assert [[id(p) for p in group["params"]] for group in found] == [
        [id(p) for p in group["params"]] for group in expected
    ]


def test_rates_of_roles_apply_where_the_trainer_has_one_rate_and_contradict_several(tmp_path):
    trainer = loraplus.attach(make("class with its own lr", tmp_path), lr=0.2, lr_head=0.3, lr_overrides={"query": 0.5})
    trainer.create_optimizer()
    rates = {name: options["lr"] for name, options in options_of(trainer).items()}
    for name, rate in rates.items():
        base = 0.3 if "classifier" in name else 0.2 * (16 if re.search(r"(query|value)\.lora_B\.", name) else 1)
        assert rate == pytest.approx(base * (0.5 if "query" in name else 1)), name
    assert trainer.optimizer.defaults["lr"] == 0.2 and trainer.loraplus_rates.lr == 0.2
    for given in ({"lr": 1e-3}, {"lr_head": 1e-4}, {"lr_embedding": 1e-4}):
        trainer = loraplus.attach(make("layer-wise", tmp_path), **given)
        with pytest.raises(
            InvalidRateError, match=rf"{next(iter(given))} = .* contradicts LayerWise, whose own groups"
        ):
            trainer.create_optimizer()
    factored = loraplus.attach(make("layer-wise", tmp_path), lr_ratio=4, lr_overrides={"query": 0.5})
    factored.create_optimizer()
    assert options_of(factored)[next(n for n in rates if "layer.1" in n and "query.lora_B" in n)]["lr"] == 5e-3


class Nothing(Trainer):
    def create_optimizer(self, model=None):
        return None


class Foreign(Trainer):
    def create_optimizer(self, model=None):
        self.optimizer = object()


class OnlyHead(Trainer):
    def create_optimizer(self, model=None):
        self.optimizer = torch.optim.SGD([p for n, p in trained_of(self) if "classifier" in n], lr=0.1)


class Twice(Trainer):
    def create_optimizer(self, model=None):
        self.optimizer = loraplus.create_optimizer(self.model, torch.optim.SGD, lr=0.1, lr_ratio=16)


class Copies(torch.optim.SGD):
    """Its groups cannot be set from outside."""

    @property
    def param_groups(self):
        return [dict(group) for group in self._groups]

    @param_groups.setter
    def param_groups(self, groups):
        self._groups = groups

    def add_param_group(self, param_group):
        self._groups.append({**self.defaults, **param_group, "params": list(param_group["params"])})


class Unreachable(Trainer):
    def create_optimizer(self, model=None):
        self.optimizer = Copies([{"params": [p for _, p in trained_of(self)]}], lr=0.1)


@pytest.mark.parametrize(
    ("trainer", "error", "says"),
    [
        (Nothing, TrainerSetupError, "Nothing.create_optimizer made no optimizer"),
        (Foreign, TrainerSetupError, "Foreign.create_optimizer made a object, which is no torch optimizer"),
        (OnlyHead, ParameterGroupError, "OnlyHead builds leaves out .* trainable factors"),
        (Twice, TrainerSetupError, "Twice builds has A at 0.1 and B at 1.6 already"),
        (Unreachable, TrainerSetupError, r"Copies keeps parameter groups where LoRA\+ cannot reach them"),
        (with_class(torch.optim.LBFGS, {}), OptimizerSetupError, "LBFGS takes one parameter group"),
        (with_class(functools.partial(torch.optim.LBFGS), {}), OptimizerSetupError, "LBFGS takes one parameter group"),
    ],
)  # fmt: skip
def test_what_cannot_be_kept_is_refused_by_name_however_often(tmp_path, trainer, error, says):
    attached = loraplus.attach(make(trainer, tmp_path))
    for _ in range(2):
        with pytest.raises(error, match=says):
            attached.train()


@pytest.mark.parametrize("optim", ["galore_adamw", "lomo", "apollo_adamw_layerwise"])
def test_optimizers_that_group_parameters_themselves_are_refused(tmp_path, optim):
    trainer = loraplus.attach(make(Trainer, tmp_path, optim=optim))
    with pytest.raises(TrainerSetupError, match=f"optim = {optim} groups the parameters itself"):
        trainer.create_optimizer()


class Mixed:
    def create_optimizer(self, model=None):
        self.optimizer = torch.optim.SGD([p for _, p in trained_of(self)], lr=0.25)
        return self.optimizer


class Own(LoraPlusTrainer):
    create_optimizer = Mixed.create_optimizer


class Before(Mixed, LoraPlusTrainer):
    pass


class Around(LoraPlusTrainer):
    def create_optimizer(self, model=None):
        self.optimizer = Lookahead(super().create_optimizer(model))
        for group in self.optimizer.param_groups:
            group["lr"] = 0.25
        return self.optimizer


@pytest.mark.parametrize("kind", [Own, Before, Around, type("Grandchild", (Own,), {})])
def test_subclasses_of_the_trainer_class_keep_their_hooks_too(tmp_path, kind):
    args = LoraPlusTrainingArguments(**common(tmp_path, loraplus_lr_ratio=8.0))
    trainer = kind(adapted(), args, train_dataset=Tokens())
    loraplus.verify(trainer.model, trainer.create_optimizer(), lr_ratio=8, lr=0.25)


def test_a_hook_set_on_the_trainer_itself_is_kept_before_and_refused_after(tmp_path):
    def build(trainer):
        trainer.create_optimizer = functools.partial(Mixed.create_optimizer, trainer)
        return trainer

    trainer = loraplus.attach(build(make(Trainer, tmp_path)), lr_ratio=8)
    trainer.train()
    loraplus.verify(trainer.model, trainer.optimizer, lr_ratio=8, lr=0.25)
    with pytest.raises(TrainerSetupError, match="an optimizer that LoRA. did not split"):
        build(loraplus.attach(make(Trainer, tmp_path))).train()
    replaced = loraplus.attach(make(Trainer, tmp_path))
    replaced.optimizer = torch.optim.SGD(replaced.model.parameters(), lr=0.1)
    with pytest.raises(TrainerSetupError, match="an optimizer that LoRA. did not split"):
        replaced.train()


class TensorRates(torch.optim.SGD):
    """Keeps its rates in tensors, one a group, as torchao's 8-bit AdamW does."""

    def __init__(self, params, lr):
        super().__init__(params, lr=lr)
        for group in self.param_groups:
            group["lr"] = torch.tensor(float(group["lr"]))


def test_rates_in_tensors_stay_tensors_of_their_own(tmp_path):
    trainer = loraplus.attach(make(with_class(TensorRates, {"lr": 0.125}), tmp_path), lr_ratio=16)
    groups = trainer.create_optimizer().param_groups
    assert all(isinstance(group["lr"], torch.Tensor) for group in groups)
    assert len({id(group["lr"]) for group in groups}) == len(groups)
    loraplus.verify(trainer.model, trainer.optimizer, lr_ratio=16, lr=0.125)
    trainer.train()
    assert [float(group["lr"]) for group in trainer.optimizer.param_groups] == [0.0] * len(groups)
