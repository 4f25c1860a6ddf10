"""AutoRates in the loops that people write: skipped steps, schedules, several passes and models, copies, compile."""

from __future__ import annotations

import contextlib
import copy
import io
import math
import warnings
from typing import NamedTuple

import peft
import pytest
import torch
from test_feature_updates import adapted
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import loraplus
from loraplus.auto import AutoRates, Rule, installed
from loraplus.compiled import run_eagerly
from loraplus.errors import LoraPlusWarning, TrainerSetupError
from loraplus.groups import rate_of_group
from loraplus.movement import adapted_layers, factors

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


def test_a_step_that_saw_no_forward_pass_moves_nothing():
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


def test_a_head_left_at_the_rate_that_stands_for_automatic_is_warned_of():
    with pytest.warns(LoraPlusWarning, match="head is trained with lr = 1; .*lr_head"):
        automatic(adapted())
    with warnings.catch_warnings():
        warnings.simplefilter("error", LoraPlusWarning)
        automatic(adapted(), lr_head=1e-3)


# Several models, and several AutoRates.


def two_models():
    models = {"unet": decoder(0), "text_encoder": decoder(1)}
    groups = [
        {**group, "name": f"{part}.{group['name']}"}
        for part, model in models.items()
        for group in loraplus.param_groups(model, lr=1.0, lr_ratio=1)
    ]
    return *models.values(), torch.optim.AdamW(groups)


def test_two_models_of_one_optimizer_have_the_rates_that_they_would_have_alone():
    unet, encoder, optimizer = two_models()
    both = AutoRates(unet, optimizer), AutoRates(encoder, optimizer)
    for seed in range(3):
        (unet(**tokens(seed)).loss + encoder(**tokens(seed)).loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    for number, rates in enumerate(both):
        model, alone, expected = automatic(decoder(number))
        for seed in range(3):
            step(model, alone, seed)
        assert (rates.lr_a, rates.lr_b) == (expected.lr_a, expected.lr_b)
    logged = [rate_of_group(optimizer, group) for group in optimizer.param_groups]
    assert logged == [both[0].lr_a, both[0].lr_b, both[1].lr_a, both[1].lr_b]
    assert installed(optimizer) == list(both) and optimizer.loraplus_auto is both[0]
    both[0].remove()
    assert installed(optimizer) == [both[1]] and optimizer.loraplus_auto is both[1]


def test_a_model_that_is_left_out_of_a_step_does_not_move():
    unet, encoder, optimizer = two_models()
    AutoRates(unet, optimizer), AutoRates(encoder, optimizer)
    before = weights_of(encoder)
    step(unet, optimizer)
    assert moved(encoder, before) == (0, 0)


@pytest.mark.parametrize("again", ["at once", "later"])
def test_installed_a_second_time_the_second_replaces_the_first(again):
    model, optimizer, _ = automatic()
    expected_model, alone, expected = automatic()
    for seed in range(4):
        if seed == (0 if again == "at once" else 2):
            second = AutoRates(model, optimizer)
        step(model, optimizer, seed)
        step(expected_model, alone, seed)
    assert installed(optimizer) == [second] and len(optimizer._optimizer_step_pre_hooks) == 1
    assert (second.lr_a, second.lr_b) == (expected.lr_a, expected.lr_b)
    assert all(torch.equal(p, q) for p, q in zip(weights_of(model), weights_of(expected_model), strict=True))


# What cannot be measured.


def test_experts_alone_are_refused_and_beside_others_left_out_with_a_word():
    def mixtral(**options):
        torch.manual_seed(0)
        model = MixtralForCausalLM(MixtralConfig(**SMALL, num_hidden_layers=1, num_local_experts=4))
        return peft.get_peft_model(model, peft.LoraConfig(r=4, target_parameters=["experts.gate_up_proj"], **options))

    with pytest.raises(TrainerSetupError, match=r"1 adapted layers.*experts.*give lr and lr_ratio"):
        automatic(mixtral(target_modules=[]))
    model, optimizer, rates = automatic(mixtral(target_modules=["q_proj", "v_proj"]))
    with pytest.warns(LoraPlusWarning, match=r"cannot measure 1 of 3 adapted layers \(first: .*experts"):
        step(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error", LoraPlusWarning)
        step(model, optimizer, seed=1)
    assert len(rates.layer_rates) == 2 and rates.lr_b > 0


class Attending(torch.nn.Module):
    def __init__(self, batch_first=True, cross=False):
        super().__init__()
        self.attn, self.cross = torch.nn.MultiheadAttention(16, 2, batch_first=batch_first), cross
        self.out = torch.nn.Linear(16, 2)

    def forward(self, x):
        return self.out(self.attn(x, x.flip(1) if self.cross else x, x)[0].mean(1))


@pytest.mark.parametrize("batch_first", [True, False])
def test_self_attention_is_measured_on_its_projection_and_cross_attention_left_out(batch_first):
    torch.manual_seed(0)
    model = peft.get_peft_model(Attending(batch_first), peft.LoraConfig(r=2, target_modules=["attn", "out"]))
    model, optimizer, rates = automatic(model)
    with pytest.warns(LoraPlusWarning, match=r"1 of 3 adapted layers \(first: .*out_proj"):
        for _ in range(3):
            model(torch.randn(4, 6, 16)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    (attention,) = [layer for layer in rates.layer_rates if layer.endswith("attn")]
    assert rates.layer_rates[attention].lr_a > 0 and rates.layer_rates[attention].lr_b > 0
    crossing = peft.get_peft_model(Attending(cross=True), peft.LoraConfig(r=2, target_modules=["attn", "out"]))
    model, optimizer, rates = automatic(crossing)
    with pytest.warns(LoraPlusWarning, match="2 of 3"):
        model(torch.randn(4, 6, 16)).sum().backward()
        optimizer.step()
    assert [layer.rpartition(".")[2] for layer in rates.layer_rates] == ["out"]


# Copies, and the end of training.


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("watch", [AutoRates, loraplus.UpdateMonitor])
def test_a_model_can_be_saved_and_copied_and_the_copy_is_not_watched(watch):
    model = decoder()
    optimizer = loraplus.create_optimizer(model, lr=1e-3, lr_ratio=1)
    rates = watch(model, optimizer)
    assert hooks_of(model) > 0
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        other(**tokens()).loss.backward()
    assert not rates._recorder.samples and rates._recorder.loss_terms == 0
    step(model, optimizer)
    assert rates.updates is not None


def test_the_model_has_hooks_only_while_a_measurement_is_due():
    model, optimizer, rates = automatic(rule=Rule(measured_at_first=2, measured_every=5))
    found = []
    for seed in range(7):
        found.append(hooks_of(model) > 0)
        step(model, optimizer, seed)
    assert found == [True, True, False, False, False, True, False]
    model, optimizer, rates = automatic()
    step(model, optimizer)
    rates.rest()
    assert hooks_of(model) == 0 and rates.lr_b > 0 and rates.updates is not None
    assert loraplus.explain(model, optimizer).entries[0].lr == rates.lr_a
    step(model, optimizer, seed=1)  # training goes on after all
    assert hooks_of(model) > 0
    rates.remove()
    assert hooks_of(model) == 0 and not optimizer._optimizer_step_pre_hooks and not installed(optimizer)


# torch.compile.


@pytest.fixture
def compiles():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert torch._dynamo.eval_frame._stance.stance == "default"


class Net(torch.nn.Module):
    """Traced in no time."""

    def __init__(self):
        super().__init__()
        self.embed, self.layers = torch.nn.Embedding(64, 16), torch.nn.ModuleList([torch.nn.Linear(16, 16)])
        self.head = torch.nn.Linear(16, 64)

    def forward(self, input_ids, labels):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + layer(x).relu()
        return Loss(torch.nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten()))


class Loss(NamedTuple):
    loss: torch.Tensor


def one_layer():
    torch.manual_seed(0)
    return peft.get_peft_model(Net(), peft.LoraConfig(r=4, target_modules=["layers.0", "head"]))


@pytest.mark.parametrize(
    ("how", "earlier"),
    [("before", 0), ("after", 0), ("in place", 1), ("one layer", 0), ("fullgraph", 0), ("fullgraph", 1)],
)
def test_compiled_models_are_measured_eagerly(compiles, how, earlier):
    for _ in range(earlier):
        torch.compile(one_layer(), backend="eager")(**tokens()).loss.backward()
    plain, plain_optimizer, expected = automatic(one_layer(), rule=Rule(measured_at_first=2, measured_every=4))
    model = one_layer()
    trained = torch.compile(model, backend="eager") if how == "before" else model
    trained, optimizer, rates = automatic(trained, rule=Rule(measured_at_first=2, measured_every=4))
    if how == "in place":
        model.compile(backend="eager")
    elif how == "one layer":
        model.base_model.model.layers[0].compile(backend="eager")
    elif how in ("after", "fullgraph"):
        trained = torch.compile(model, backend="eager", fullgraph=how == "fullgraph")
    for seed in range(6):
        step(trained, optimizer, seed)
    for seed in range(6):
        step(plain, plain_optimizer, seed)
    assert rates.lr_a > 0 and rates.lr_b == pytest.approx(expected.lr_b, rel=0.5)
    rates.remove()
    expected.remove()


def test_a_step_that_a_compiled_model_hid_waits_and_the_next_is_measured(compiles):
    model, optimizer, rates = automatic(one_layer())
    trained = torch.compile(model, backend="eager")
    before = weights_of(model)
    step(trained, optimizer)
    assert moved(model, before) == (0, 0) and not rates.lr_b
    step(trained, optimizer, seed=1)
    assert moved(model, before)[1] > 0 and rates.lr_b
    rates.remove()


def test_compiled_code_is_compiled_again_once_nobody_looks(compiles):
    one, two = Rule(), Rule()
    run_eagerly(one, True)
    run_eagerly(two, True)
    run_eagerly(one, False)
    assert torch._dynamo.eval_frame._stance.stance == "force_eager"
    del two
    assert torch._dynamo.eval_frame._stance.stance == "default"


# Optimizers whose steps are not of Adam's size.


@pytest.mark.parametrize("gradient", [1.0, 1e-4])
@pytest.mark.parametrize(
    ("optimizer_cls", "options"),
    [(torch.optim.SGD, {}), (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.01}), (torch.optim.Adagrad, {}),
     (torch.optim.RMSprop, {}), (torch.optim.RAdam, {}), (torch.optim.Adadelta, {})],
)  # fmt: skip
def test_every_optimizer_trains_whatever_the_size_of_its_steps(optimizer_cls, options, gradient):
    targets = ["q_proj", "v_proj", "down_proj"]
    model, optimizer, rates = automatic(decoder(target_modules=targets), optimizer_cls=optimizer_cls, **options)
    for number in range(20):
        before = weights_of(model)
        (gradient * model(**tokens(number % 2)).loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    last = [(w - b).flatten() for w, b in zip(weights_of(model), before, strict=True)]
    for factor, rate in ((last[::2], rates._pair[0]), (last[1::2], rates._pair[1])):
        assert torch.cat(factor).square().mean().sqrt().item() == pytest.approx(rate * rates._size, rel=0.02)
    assert rates._size == pytest.approx(0.4 if options else 1.0, rel=0.2) or optimizer_cls is torch.optim.RAdam
    start = decoder(target_modules=targets)(**tokens()).loss.item()
    # Where gradients are small it is their weight decay that they are trained by.
    assert model(**tokens()).loss.item() < start - (0.05 if gradient == 1 or not options else -1e-3)


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"amsgrad": True}, {"eps": 1e-6}, {"betas": (0.8, 0.95)}])
def test_steps_of_adams_size_are_taken_as_they_are(options):
    _, _, rates = automatic(optimizer_cls=torch.optim.AdamW, **options)
    assert rates._units is None
    for cls in (torch.optim.NAdam, torch.optim.Adamax, torch.optim.Adam):
        assert automatic(optimizer_cls=cls)[2]._units is None
