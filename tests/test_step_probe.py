"""The step is tried: optimizers that take no notice of their groups' rates are found, all others pass untouched."""

from __future__ import annotations

import copy
import functools
import random

import pytest
import torch
from test_groups import adapted
from torch import nn

import loraplus
from loraplus.roles import trainable_parameters
from loraplus.steps.step_probe import try_step

RATIO = 16.0


def load(path: str):
    module, _, name = path.rpartition(".")
    return getattr(pytest.importorskip(module, reason=f"{path.partition('.')[0]} is not installed"), name)


class Sign(torch.optim.Optimizer):
    """Signs of the gradient, at the rate that subclasses say."""

    def __init__(self, params, lr=1e-3, **options) -> None:
        super().__init__(params, {"lr": lr, "steps": 0, **options})

    def rate(self, group) -> float:
        return group["lr"]

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["steps"] += 1
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad.sign(), alpha=self.rate(group))


class ReadsDefaults(Sign):
    def rate(self, group):
        return self.defaults["lr"]


class ReadsTheFirstGroup(Sign):
    def rate(self, group):
        return self.param_groups[0]["lr"]


class TakesTheLargest(Sign):  # as D-Adaptation and Prodigy do
    def rate(self, group):
        return 1e-6 * max(other["lr"] for other in self.param_groups)


class MakesItsOwn(Sign):  # as Adafactor does
    def rate(self, group):
        return 1e-2 / group["steps"] ** 0.5


class TakesTheRoot(Sign):
    def rate(self, group):
        return 1e-3 * group["lr"] ** 0.5


class RefusesTwo(Sign):
    def step(self, closure=None):
        if len({group["lr"] for group in self.param_groups}) > 1:
            raise RuntimeError("one rate only")
        super().step()


IGNORING = [ReadsDefaults, ReadsTheFirstGroup, TakesTheLargest, MakesItsOwn, TakesTheRoot, RefusesTwo]


class WarmsUpFromZero(Sign):
    def rate(self, group):
        return group["lr"] * max(0, group["steps"] - 40) / 40


class HasConstructedState(Sign):
    def __init__(self, params, **options) -> None:
        super().__init__(params, **options)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["scale"] = torch.ones_like(p)

    @torch.no_grad()
    def step(self):  # takes no closure
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(self.state[p]["scale"] * p.grad, alpha=group["lr"])


class NeedsAClosure(Sign):
    def step(self, closure):
        with torch.enable_grad():
            closure()
        super().step()


class MovesAtRandomToo(Sign):
    def rate(self, group):
        return group["lr"] * float(1 + 0.1 * torch.rand(()))


FOLLOWING = {
    **{name: (f"torch.optim.{name}", {}) for name in (
        "AdamW", "Adam", "SGD", "RMSprop", "Adagrad", "Adamax", "NAdam", "RAdam", "Adadelta", "Rprop", "Adafactor",
        "Muon",
    )},
    "SGD with momentum and decay": ("torch.optim.SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.5}),
    "AdamW capturable": ("torch.optim.AdamW", {"capturable": True}),
    "AdamW foreach": ("torch.optim.AdamW", {"foreach": True, "amsgrad": True, "weight_decay": 1.0}),
    "Adafactor of transformers": ("transformers.optimization.Adafactor", {"relative_step": False}),
    "schedule-free, warming up": ("schedulefree.AdamWScheduleFree", {"warmup_steps": 1000}),
    "AdamW8bit": ("bitsandbytes.optim.AdamW8bit", {}),
    "AdEMAMix": ("pytorch_optimizer.AdEMAMix", {}),
    "Lion": ("pytorch_optimizer.Lion", {}),
    "LAMB": ("pytorch_optimizer.Lamb", {}),
    "Nero, which sets weights up": ("pytorch_optimizer.Nero", {}),
    **{cls.__name__: (cls, {}) for cls in (WarmsUpFromZero, HasConstructedState, NeedsAClosure, MovesAtRandomToo)},
}  # fmt: skip


def matrices(*rates: float, **options) -> list[dict]:
    torch.manual_seed(0)
    return [
        {"params": [nn.Parameter(0.1 * torch.randn(6, 4)), nn.Parameter(torch.zeros(4, 6))], "lr": rate, **options}
        for rate in rates
    ]


def trial(optimizer):
    return try_step(optimizer, {index: group["lr"] for index, group in enumerate(optimizer.param_groups)})


@pytest.mark.parametrize("lr", [1e-7, 1e-3, 1.0])
@pytest.mark.parametrize("name", FOLLOWING)
def test_an_optimizer_that_follows_its_groups_passes_at_any_rate(name, lr):
    cls, options = FOLLOWING[name]
    cls = load(cls) if isinstance(cls, str) else cls
    assert trial(cls(matrices(lr, lr * RATIO), lr=lr, **options)).follows is True


@pytest.mark.parametrize("ratio", [1.5, 16.0, 1e5])
@pytest.mark.parametrize("cls", IGNORING)
def test_an_optimizer_that_takes_no_notice_is_found_at_any_ratio(cls, ratio):
    optimizer = cls(matrices(1e-3, 1e-3 * ratio), lr=1e-3)
    assert trial(optimizer).follows is False
    assert trial(torch.optim.SGD(optimizer.param_groups, lr=1e-3)).follows is True


@pytest.mark.parametrize("cls", IGNORING)
def test_it_is_refused_when_it_is_built_and_by_verify_but_not_at_one_rate(cls):
    with pytest.raises(loraplus.OptimizerSetupError, match=cls.__name__):
        loraplus.create_optimizer(adapted(), cls, lr=1e-3, lr_ratio=RATIO)
    with pytest.raises(loraplus.OptimizerSetupError, match=cls.__name__):  # a head at a rate of its own is a second one
        loraplus.create_optimizer(adapted(), cls, lr=1e-3, lr_ratio=1, lr_head=1e-2)
    model = adapted()
    with pytest.raises(loraplus.RateMismatchError, match=f"the step does not: {cls.__name__}"):
        loraplus.verify(model, cls(loraplus.param_groups(model, 1e-3, RATIO), lr=1e-3), RATIO)
    plain = loraplus.create_optimizer(model, cls, lr=1e-3, lr_ratio=1)
    loraplus.verify(model, plain, 1)


@pytest.mark.parametrize("name", ["Prodigy", "DAdaptAdam", "DAdaptLion", "DAdaptSGD", "AdaFactor"])
def test_others_adaptive_optimizers_are_refused_with_what_to_use(name):
    cls = load(f"pytorch_optimizer.{name}")
    hint = "relative_step=False" if name == "AdaFactor" else "SplitProdigy"
    with pytest.raises(loraplus.OptimizerSetupError, match=f"^{name} .*{hint}"):
        loraplus.create_optimizer(adapted(), cls, lr=1.0, lr_ratio=RATIO)
    model = adapted()
    theirs = cls(loraplus.param_groups(model, 1.0, RATIO), lr=1.0)
    with pytest.raises(loraplus.RateMismatchError, match=name):
        loraplus.verify(model, theirs, RATIO)


def test_adafactor_with_a_rate_of_its_own_is_refused_both_ways():
    cls = load("transformers.optimization.Adafactor")
    with pytest.raises(loraplus.OptimizerSetupError, match="Adafactor cannot be built .*relative_step"):
        loraplus.create_optimizer(adapted(), cls, lr=1e-3, relative_step=True)
    model = adapted()
    theirs = cls(loraplus.param_groups(model, 1e-3, RATIO), lr=None, relative_step=True)
    with pytest.raises(loraplus.RateMismatchError, match="relative_step=False"):
        loraplus.verify(model, theirs, RATIO)


def test_one_that_ignores_the_rate_in_some_groups_only_is_found():
    class OwnRateIfFlagged(Sign):
        def rate(self, group):
            return 1e-4 if group["own"] else group["lr"]

    groups = matrices(1e-3, 2e-3, own=False) + matrices(4e-3, own=True)
    trial_of_all = trial(OwnRateIfFlagged(groups, own=False))
    assert trial_of_all.follows is False
    assert trial(OwnRateIfFlagged(groups[:2], own=False)).follows is True


def test_like_is_compared_with_like_where_groups_have_options_of_their_own():
    slow, fast = matrices(1e-3, 2e-3)
    slow |= {"betas": (0.0, 0.9), "weight_decay": 1.0, "eps": 1.0}
    assert trial(torch.optim.AdamW([slow, fast])).follows is True


class NeedsTheHessian(Sign):
    def step(self, closure=None):
        torch.autograd.grad(self.param_groups[0]["params"][0].grad.sum(), self.param_groups[0]["params"][0])


class WalksAtRandom(Sign):
    def rate(self, group):
        return float(torch.rand(()))


@pytest.mark.parametrize("cls", [NeedsTheHessian, WalksAtRandom])
def test_a_step_that_cannot_be_tried_is_said_once_and_not_refused(cls, recwarn):
    model = adapted()
    optimizer = loraplus.create_optimizer(model, cls, lr=1e-3, lr_ratio=RATIO)
    for _ in range(3):
        loraplus.verify(model, optimizer, RATIO)
    messages = [str(w.message) for w in recwarn if issubclass(w.category, loraplus.LoraPlusWarning)]
    assert len(messages) == 1 and f"the groups of {cls.__name__}, but whether its step follows them" in messages[0]


@pytest.mark.parametrize("cls", [torch.optim.AdamW, MovesAtRandomToo, ReadsDefaults, HasConstructedState])
def test_the_trial_touches_nothing(cls):
    optimizer = cls(matrices(1e-3, 16e-3), lr=1e-3)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    before = copy.deepcopy((optimizer.state_dict(), parameters, [p.grad for p in parameters]))
    seeds = torch.get_rng_state(), random.getstate()
    trial(optimizer)
    after = (optimizer.state_dict(), parameters, [p.grad for p in parameters])
    assert torch.equal(seeds[0], torch.get_rng_state()) and seeds[1] == random.getstate() and not calls
    flat, same = torch.utils._pytree.tree_flatten(before), torch.utils._pytree.tree_flatten(after)
    assert flat[1] == same[1]
    assert all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(flat[0], same[0], strict=True)
    )


def test_verify_tries_the_step_in_the_middle_of_training_under_a_schedule_and_in_a_wrapper():
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = adapted()
    for cls, right in ((torch.optim.AdamW, True), (ReadsDefaults, False)):
        optimizer = cls(loraplus.param_groups(model, 1e-3, RATIO), lr=1e-3)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 3)
        optimizer = accelerate.Accelerator(cpu=True).prepare(optimizer)
        for _ in range(3):
            for entry in trainable_parameters(model):
                entry.parameter.grad = torch.ones_like(entry.parameter)
            if right:
                loraplus.verify(model, optimizer, RATIO)
            else:
                with pytest.raises(loraplus.RateMismatchError, match="the step does not"):
                    loraplus.verify(model, optimizer, RATIO)
            optimizer.step()
            scheduler.step()


def test_lookahead_is_tried_with_what_it_wraps():
    lookahead = load("pytorch_optimizer.Lookahead")
    for cls, follows in ((torch.optim.AdamW, True), (ReadsTheFirstGroup, False)):
        assert trial(lookahead(cls(matrices(1e-3, 16e-3), lr=1e-3))).follows is follows


def test_a_class_that_takes_options_it_does_not_know_is_refused_in_one_line():
    with pytest.raises(loraplus.OptimizerSetupError, match="SGD cannot be built over groups .* 'betas'"):
        loraplus.create_optimizer(adapted(), torch.optim.SGD, lr=1e-3, betas=(0.9, 0.99))


def test_a_factory_is_tried_as_a_class_is():
    loraplus.create_optimizer(adapted(), functools.partial(torch.optim.AdamW, eps=1e-6), lr=1e-3)
    with pytest.raises(loraplus.OptimizerSetupError, match="ReadsDefaults"):
        loraplus.create_optimizer(adapted(), functools.partial(ReadsDefaults), lr=1e-3)


@pytest.mark.parametrize("kind", ["AdamWScheduleFree", "SGDScheduleFree", "RAdamScheduleFree"])
def test_what_an_optimizer_has_counted_in_its_groups_does_not_spoil_a_later_trial(kind):
    model = adapted()
    optimizer = loraplus.create_optimizer(model, load(f"schedulefree.{kind}"), lr=1e-3, lr_ratio=RATIO)
    optimizer.train()
    for _ in range(20):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        optimizer.step()
    loraplus.verify(model, optimizer, RATIO)


class WarmedUp(torch.optim.AdamW):
    """Goes up to each group's own rate, which it keeps beside it."""

    def __init__(self, params, **options):
        super().__init__(params, **options)
        self.steps = 0
        for group in self.param_groups:
            group["base_lr"] = group["lr"]

    def step(self, closure=None):
        self.steps += 1
        for group in self.param_groups:
            group["lr"] = group["base_lr"] * min(1, self.steps / 100)
        return super().step(closure)


def test_a_warm_up_of_the_optimizers_own_follows_its_groups():
    model = adapted()
    loraplus.verify(model, loraplus.create_optimizer(model, WarmedUp, lr=1e-3, lr_ratio=RATIO), RATIO)


def test_a_setting_that_makes_the_step_infinite_is_blamed_rather_than_the_optimizer():
    with pytest.raises(loraplus.OptimizerSetupError, match="NaN or infinite; one of its settings"):
        loraplus.create_optimizer(adapted(), torch.optim.AdamW, lr=1e-3, lr_ratio=16, weight_decay=1e30)
