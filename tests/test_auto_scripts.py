"""AutoRates in the loops that people write: nothing touched, errors, closures, skipped steps, schedules, overrides."""

from __future__ import annotations

import contextlib
import copy
import math

import peft
import pytest
import torch
from test_feature_updates import adapted
from transformers import LlamaConfig, LlamaForCausalLM

import loraplus
from loraplus.auto import AutoRates, Rule
from loraplus.errors import InvalidRateError, NoLoraFactorsError, TrainerSetupError
from loraplus.groups import rate_of_group
from loraplus.steps.movement import adapted_layers, factors

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}


def decoder(seed=0, **options):
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**SMALL, num_hidden_layers=2))
    return peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], **options}))


def tokens(seed=0):
    ids = torch.randint(1, 64, (4, 8), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def automatic(model=None, rule=None, **options):
    model = decoder() if model is None else model
    optimizer = loraplus.create_optimizer(model, **{"lr": 1.0, "lr_ratio": 1, **options})
    return model, optimizer, AutoRates(model, optimizer, rule=rule)


def step(model, optimizer, seed=0):
    model(**tokens(seed)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def weights_of(model):
    return [weight.detach().clone() for weight in factors(adapted_layers(model))]


def moved(model, before):
    """(largest change of A, of B)."""
    changes = [(w - b).abs().max().item() for w, b in zip(weights_of(model), before, strict=True)]
    return max(changes[::2]), max(changes[1::2])


# Asked without touching.


def test_a_measured_step_is_the_optimizers_own_step_at_the_rates_that_it_gave():
    model, optimizer, rates = automatic(weight_decay=0.1)
    step(model, optimizer)
    twin = copy.deepcopy(model)
    plain = loraplus.create_optimizer(twin, lr=1.0, lr_ratio=1, weight_decay=0.1)
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(model, optimizer, seed=1)
    for group in plain.param_groups:
        group["lr"] = rates.lr_a if group["name"] == "lora_A" else rates.lr_b
    step(twin, plain, seed=1)
    assert all(torch.equal(p, q) for p, q in zip(weights_of(model), weights_of(twin), strict=True))


def test_the_schedule_counts_in_measured_steps_too():
    changes = []
    for factor in (1.0, 0.1):
        model, optimizer, _ = automatic()
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _, factor=factor: factor)
        before = weights_of(model)
        step(model, optimizer)
        changes.append(moved(model, before)[1])
    assert changes[1] == pytest.approx(changes[0] / 10, rel=1e-4)


def test_each_group_has_its_own_schedule():
    model, optimizer, rates = automatic()
    torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda _: 1.0, lambda _: 0.0])
    fresh = weights_of(model)
    for seed in range(3):
        step(model, optimizer, seed)
    assert moved(model, fresh)[1] == 0 and rates.lr_b > 0


def test_the_largest_ratio_of_the_rule_is_four():
    model, optimizer, rates = automatic()
    assert rates.rule.most_ratio == 4.0
    with torch.no_grad():  # an A that is far larger than what it is trained with: B asks for many times A's rate
        for weight in factors(adapted_layers(model))[::2]:
            weight.mul_(1e-3)
    for seed in range(3):
        step(model, optimizer, seed)
    asked = [rates.layer_rates[name] for name in rates.layer_rates]
    assert all(layer.lr_b > 8 * layer.lr_a for layer in asked)
    assert rates.lr_b / rates.lr_a == pytest.approx(4)


def test_weight_decay_is_no_part_of_a_proposed_step():
    found = []
    for decay in (0.0, 10.0):
        model, optimizer, rates = automatic(weight_decay=decay)
        step(model, optimizer)
        found.append((rates.lr_a, rates.lr_b))
    assert found[0] == found[1]


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B"])
def test_layers_with_one_factor_frozen_train_the_other_at_its_rate(frozen):
    model = decoder()
    for name, p in model.named_parameters():
        if "layers.0" in name and frozen in name:
            p.requires_grad = False
    model, optimizer, rates = automatic(model)
    before = weights_of(model)
    for seed in range(3):
        step(model, optimizer, seed)
    assert max(moved(model, before)) < 4 * max(rates.lr_a, rates.lr_b)
    assert len(rates.layer_rates) == 4


def test_where_all_a_are_frozen_b_has_a_rate_all_the_same():
    model = decoder()
    for name, p in model.named_parameters():
        p.requires_grad = "lora_B" in name
    model, optimizer, rates = automatic(model)
    for seed in range(3):
        step(model, optimizer, seed)
    assert rates.lr_a == 0 < rates.lr_b < 0.1
    assert all(layer.stuck is None for layer in rates.updates.layers)


def test_a_step_that_saw_no_forward_pass_moves_nothing(monkeypatch):
    monkeypatch.setattr("loraplus.auto.anything_is_compiled", lambda: False)  # by another test of this process
    model, optimizer, _ = automatic()
    before = weights_of(model)
    for weight in factors(adapted_layers(model)):
        weight.grad = torch.ones_like(weight)
    with pytest.raises(TrainerSetupError, match="no forward pass"):
        optimizer.step()
    assert moved(model, before) == (0, 0) and {group["lr"] for group in optimizer.param_groups} == {1.0}


# Errors, closures, subclasses.


class Failing(torch.optim.AdamW):
    fails = False

    def step(self, closure=None):
        if Failing.fails:
            raise MemoryError
        return super().step(closure)


@pytest.mark.parametrize("steps", [0, 1, 12])  # before any rate is known; among the measured steps; after them
def test_an_error_inside_a_step_leaves_the_schedulers_numbers_and_the_retried_step_is_as_ever(steps):
    ends = []
    for fails in (False, True):
        model, optimizer, rates = automatic(optimizer_cls=Failing)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        for seed in range(steps):
            step(model, optimizer, seed)
            scheduler.step()
        model(**tokens(99)).loss.backward()
        if fails:
            Failing.fails = True
            with contextlib.suppress(MemoryError):
                optimizer.step()
            Failing.fails = False
            assert [group["lr"] for group in optimizer.param_groups] == [pytest.approx(0.9**steps)] * 2
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.9 ** (steps + 1))
        ends.append((weights_of(model), rates.lr_a, rates.lr_b))
    assert ends[0][1:] == ends[1][1:]
    assert all(torch.equal(p, q) for p, q in zip(ends[0][0], ends[1][0], strict=True))


@pytest.mark.parametrize("by_name", [False, True])
def test_gradients_that_a_closure_makes_are_measured(by_name):
    ends = []
    for with_closure in (False, True):
        model, optimizer, rates = automatic()

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            assert {group["lr"] for group in optimizer.param_groups} == {1.0}
            loss = model(**tokens()).loss
            loss.backward()
            return loss

        for _ in range(12):
            if with_closure:
                loss = optimizer.step(closure=closure) if by_name else optimizer.step(closure)
                assert loss.item() > 0
            else:
                closure()
                optimizer.step()
        ends.append([rates.steps, rates.lr_a, rates.lr_b, *(w.sum().item() for w in weights_of(model))])
    assert ends[0] == ends[1]


class CallsItsParent(torch.optim.AdamW):
    """Both classes' steps call hooks."""

    def step(self, closure=None):
        return super().step(closure)


def test_a_step_that_calls_its_parents_is_one_step():
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])  # has the parent's step call hooks
    ends = []
    for cls in (torch.optim.AdamW, CallsItsParent):
        model, optimizer, rates = automatic(optimizer_cls=cls)
        for seed in range(12):
            step(model, optimizer, seed)
        assert rates.steps == 12
        ends.append(weights_of(model))
    assert all(torch.equal(p, q) for p, q in zip(*ends, strict=True))


class OfItsOwn(torch.optim.Optimizer):
    """Needs what its constructor has set, as bitsandbytes' AdamW8bit does."""

    def __init__(self, params, lr=1e-3, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.args, self.is_paged, self.initialized = {"beta": 0.9}, False, False

    @torch.no_grad()
    def step(self, closure=None):
        if not self.initialized:
            self.initialized = True
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and not self.is_paged:
                    v = self.state[p].setdefault("v", p.grad.square())
                    v.mul_(self.args["beta"]).addcmul_(p.grad, p.grad, value=1 - self.args["beta"])
                    p.sub_(group["lr"] * 0.25 * p.grad / (v.sqrt() + 1e-8))


def test_an_optimizer_with_attributes_of_its_own_is_taken_and_left_as_it_was():
    model, optimizer, rates = automatic(optimizer_cls=OfItsOwn)
    assert not optimizer.initialized and not optimizer.state
    for seed in range(12):
        step(model, optimizer, seed)
    assert rates.lr_a > 0 and rates.lr_b > 0


class Prodigious(torch.optim.Optimizer):
    """Estimates its rate from 1e-6 on, as Prodigy and D-Adaptation do."""

    def __init__(self, params, lr=1.0):
        super().__init__(params, {"lr": lr, "d": 1e-6})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                start = self.state[p].setdefault("start", p.clone())
                group["d"] = max(group["d"], float((p.grad * (start - p)).sum() / p.grad.abs().sum()))
                p.sub_(group["lr"] * group["d"] * p.grad.sign())


def test_an_optimizer_that_estimates_its_rate_is_refused():
    model = decoder()
    with pytest.raises(TrainerSetupError, match="Prodigious.*scale"):
        AutoRates(model, Prodigious(loraplus.param_groups(model, lr=1.0, lr_ratio=1)))


# Steps that the gradient scaler skips.


@pytest.mark.parametrize(("fused", "to_none"), [(False, True), (False, False), (True, True)])
def test_a_skipped_step_leaves_no_trace(fused, to_none):
    ends = []
    for skipped in (0, 2):
        model, optimizer, rates = automatic(fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for number in range(4 + skipped):
            seed = max(0, number - skipped)
            loss = model(**tokens(seed)).loss
            scaler.scale(loss * (math.inf if number < skipped else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update(1024.0)
            optimizer.zero_grad(set_to_none=to_none)
        assert rates.steps == 4
        ends.append([rates.lr_a, rates.lr_b, *(w.sum().item() for w in weights_of(model))])
    assert ends[0] == pytest.approx(ends[1], rel=1e-6) and all(map(math.isfinite, ends[1]))


def test_a_batch_whose_gradient_is_no_number_sets_no_rates():
    model, optimizer, rates = automatic()
    for seed in range(2):
        step(model, optimizer, seed)
    known = rates.lr_a, rates.lr_b
    (model(**tokens()).loss * math.nan).backward()
    rates._before_step()
    assert (rates.lr_a, rates.lr_b) == known


# Schedules.


def scheduled(make, steps=8, **options):
    """(the scheduler's own rates, how far B moved over its rate without schedule)."""
    model, optimizer, rates = automatic(rule=Rule(measured_at_first=3, measured_every=1000), **options)
    scheduler = make(optimizer)
    own, parts = [], []
    for seed in range(steps):
        own.append(optimizer.param_groups[1]["lr"])
        before = weights_of(model)
        step(model, optimizer, seed)
        parts.append(moved(model, before)[1] / rates.lr_b)
        scheduler.step(*([1.0] if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau) else []))
    return own, parts


@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, factor=0.1, patience=1),
        lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 8),
        lambda o: torch.optim.lr_scheduler.LinearLR(o, 0.01, total_iters=4),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=5.0, total_steps=10),
        lambda o: torch.optim.lr_scheduler.CyclicLR(o, base_lr=0.1, max_lr=1.0, step_size_up=4),
    ],
)
def test_the_rates_follow_any_scheduler_which_sees_its_own_numbers_only(make):
    plain = loraplus.create_optimizer(decoder(), lr=1.0, lr_ratio=1)
    scheduler, expected = make(plain), []
    for _ in range(8):
        expected.append(plain.param_groups[1]["lr"])
        plain.step()
        scheduler.step(*([1.0] if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau) else []))
    own, parts = scheduled(make)
    assert own == expected
    last = plain.param_groups[1]
    base = last.get("max_lr") or last.get("initial_lr") or 1.0
    peak = [max(base, *expected[: i + 1]) for i in range(8)]
    for found, rate, top in zip(parts, expected, peak, strict=True):
        assert found <= 1.6 * rate / top and found >= 0.1 * rate / top  # what AdamW's own step leaves open


def test_a_plateau_goes_on_after_a_checkpoint_even_if_that_is_loaded_first():
    model, optimizer, rates = automatic()
    step(model, optimizer)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    step(model, optimizer)
    again_model = decoder()
    again = loraplus.create_optimizer(again_model, lr=1.0, lr_ratio=1)
    again.load_state_dict(optimizer.state_dict())
    resumed = AutoRates(again_model, again)
    resumed.load_state_dict(rates.state_dict())
    assert rate_of_group(again, again.param_groups[1]) == rate_of_group(optimizer, optimizer.param_groups[1])
    assert rate_of_group(again, again.param_groups[1]) == pytest.approx(0.1 * rates.lr_b)


def test_rates_that_are_tensors_stay_tensors():
    model = decoder()
    groups = loraplus.param_groups(model, lr=1.0, lr_ratio=1)
    for group in groups:
        group["lr"] = torch.tensor(1.0)
    optimizer = torch.optim.AdamW(groups, capturable=False, foreach=False)
    kept = [group["lr"] for group in optimizer.param_groups]
    rates = AutoRates(model, optimizer)
    for seed in range(3):
        step(model, optimizer, seed)
    assert all(group["lr"] is lr and lr == 1 for group, lr in zip(optimizer.param_groups, kept, strict=True))
    assert rates.lr_b > 0


# Rates by name.


@pytest.mark.parametrize("lr_ratio", [1, 16])
@pytest.mark.parametrize("overrides", [{"v_proj": 0.5}, {"v_proj": 3.0, "layers.0": 0.5}, {"lora_": 0.25}])
def test_overrides_hold_on_top_of_the_automatic_pair(lr_ratio, overrides):
    model = decoder()
    optimizer = loraplus.create_optimizer(model, lr=1.0, lr_ratio=lr_ratio, lr_overrides=overrides)
    rates = AutoRates(model, optimizer)
    for seed in range(2):
        step(model, optimizer, seed)
    for row in loraplus.explain(model, optimizer).entries:
        factor = math.prod(value for pattern, value in overrides.items() if pattern in row.name)
        assert row.lr == pytest.approx(factor * (rates.lr_a if "lora_A" in row.name else rates.lr_b))


def test_a_head_left_at_the_rate_that_stands_for_automatic_is_refused():
    with pytest.raises(TrainerSetupError, match="head would be trained with lr = 1; .*lr_head"):
        automatic(adapted())
    automatic(adapted(), lr_head=1e-3)


@pytest.mark.parametrize("own", [{}, {"lr_head": 0.5, "lr_magnitude": 0.25}])
def test_an_optimizer_with_automatic_rates_gives_all_others_a_safe_one(own):
    model = adapted(use_dora=True)
    optimizer = loraplus.create_optimizer(model, torch.optim.AdamW, lr="auto", **own)
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates["head"] == own.get("lr_head", 2e-3) and rates["magnitude"] == own.get("lr_magnitude", 3e-4)
    assert isinstance(optimizer.loraplus_auto, AutoRates)


def test_automatic_rates_are_the_same_however_they_are_asked_for():
    first, second = (decoder(), decoder())
    asked = loraplus.create_optimizer(first, torch.optim.AdamW, lr="auto")
    _, installed, _ = automatic(second)
    for seed in range(3):
        step(first, asked, seed)
        step(second, installed, seed)
    assert all(torch.equal(one, other) for one, other in zip(weights_of(first), weights_of(second), strict=True))


def test_no_rate_of_a_head_is_known_for_steps_of_another_size():
    with pytest.raises(TrainerSetupError, match=r'lr="auto" knows no rate of SGD for .*classifier.*lr_head'):
        loraplus.create_optimizer(adapted(), torch.optim.SGD, lr="auto")
    loraplus.create_optimizer(adapted(), torch.optim.SGD, lr="auto", lr_head=0.1)
    loraplus.create_optimizer(decoder(), torch.optim.SGD, lr="auto")


def test_nothing_is_left_on_a_model_whose_head_has_no_safe_rate():
    model = adapted()
    with pytest.raises(TrainerSetupError):
        loraplus.create_optimizer(model, torch.optim.SGD, lr="auto")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_automatic_rates_are_part_of_the_state_of_the_optimizer_that_has_them(tmp_path):
    whole, parted = decoder(), decoder()
    optimizer = loraplus.create_optimizer(whole, torch.optim.AdamW, lr="auto")
    first = loraplus.create_optimizer(parted, torch.optim.AdamW, lr="auto")
    for seed in range(11):
        step(whole, optimizer, seed)
        step(parted, first, seed)
    torch.save(first.state_dict(), tmp_path / "optimizer.pt")
    second = loraplus.create_optimizer(parted, torch.optim.AdamW, lr="auto")
    second.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    assert second.loraplus_auto.steps == 11 and str(second.loraplus_auto) == str(first.loraplus_auto)
    for seed in range(11, 23):
        step(whole, optimizer, seed)
        step(parted, second, seed)
    assert all(torch.equal(one, other) for one, other in zip(weights_of(whole), weights_of(parted), strict=True))


def test_groups_beside_automatic_rates_are_refused():
    model = adapted()
    with pytest.raises(InvalidRateError, match=r'lr="auto" makes groups of its own.*leave groups out'):
        loraplus.create_optimizer(model, torch.optim.AdamW, lr="auto", groups=[{"params": model.parameters()}])


def test_where_nothing_can_be_measured_it_is_said_how_to_go_on():
    model = decoder(target_modules=["embed_tokens"])
    with pytest.raises(NoLoraFactorsError, match=r"automatic rates: .*give lr and lr_ratio as numbers \(--lr 3e-4"):
        loraplus.create_optimizer(model, torch.optim.AdamW, lr="auto")


def test_a_ratio_beside_automatic_rates_is_refused():
    with pytest.raises(InvalidRateError, match="lr_ratio is not used with automatic rates"):
        loraplus.create_optimizer(decoder(), torch.optim.AdamW, lr="auto", lr_ratio=4)


@pytest.mark.parametrize(
    ("rule", "why"),
    [
        (Rule(least_ratio=1e-9, most_ratio=1e9), "as measured"),
        (Rule(least_ratio=1e-9, most_ratio=1e-8), "B held at 1e-08×"),
        (Rule(least_ratio=1e8, most_ratio=1e9), "B kept at 1e+08×, their product as measured"),
    ],
)
def test_it_says_in_one_line_what_it_chose_and_why(rule, why):
    model, optimizer, rates = automatic(rule=rule)
    assert str(rates).endswith("not measured yet")
    for seed in range(3):
        step(model, optimizer, seed)
    assert str(rates) == f"A {rates.lr_a:.2g}, B {rates.lr_b:.2g}: {why}" and rates.summary()["why"] == why
    again = AutoRates(model, optimizer)
    again.load_state_dict(rates.state_dict())
    assert str(again) == str(rates)


@pytest.mark.parametrize(
    ("schedule", "factor"),
    [
        (lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 50), 1 - 8 / 50),
        (lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95), 0.95**8),
        (lambda optimizer: torch.optim.lr_scheduler.MultiplicativeLR(optimizer, lambda step: 0.9), 0.9**8),
    ],
)
def test_a_schedule_that_goes_on_while_an_error_of_the_step_is_kept_is_not_taken_for_the_rates(schedule, factor):
    model, optimizer, rates = automatic()
    scheduler, fails, kept = schedule(optimizer), [], []

    def fail(*_):
        if fails:
            raise torch.OutOfMemoryError("as on a full device")

    optimizer.register_step_pre_hook(fail)  # behind ours
    for number in range(8):
        fails[:] = [number] if number in (3, 5) else []
        before = weights_of(model)
        try:
            step(model, optimizer, number)
        except torch.OutOfMemoryError as error:
            kept.append(error)
            optimizer.zero_grad()
        else:
            assert 1e-6 < max(moved(model, before)) < 0.1
        scheduler.step()
    for group in optimizer.param_groups[:2]:
        now, base = rates.rates_of(group)
        assert len(kept) == 2 and now / base == pytest.approx(factor)
