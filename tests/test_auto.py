"""AutoRates: the rule, its bookkeeping, and the optimizers and groups that it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from test_feature_updates import adapted, batch

import loraplus
from loraplus.auto import AutoRates, Rule
from loraplus.errors import NoLoraFactorsError, TrainerSetupError
from loraplus.steps.movement import adapted_layers, factors, movement, rms
from loraplus.steps.recorder import Recorder, loss_terms


def linear(optimizer, steps):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps))


def build(optimizer_cls=torch.optim.AdamW, lr=1.0, rule=None, seed=0, **options):
    model = adapted(seed)
    optimizer = loraplus.create_optimizer(model, optimizer_cls, lr=lr, lr_ratio=1, lr_head=1e-3, **options)
    scheduler = linear(optimizer, 60)
    return model, optimizer, scheduler, AutoRates(model, optimizer, rule=rule)


def train(model, optimizer, scheduler, steps, first=0, autocast=False):
    losses = []
    for step in range(first, first + steps):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = model(**batch(seed=step % 5)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        losses.append(loss.item())
    return losses


def test_it_trains_whatever_rate_the_optimizer_was_built_with():
    ends = []
    for lr in (1.0, 1e-6):
        model, optimizer, scheduler, rates = build(lr=lr)
        losses = train(model, optimizer, scheduler, 60)
        assert losses[-1] < 0.7 * losses[0]
        assert rates.lr_a > 0 and rates.lr_b > 0 and rates.steps == 60
        ends.append(losses[-1])
    assert ends[0] == pytest.approx(ends[1], rel=1e-3)


def test_the_rates_are_those_of_the_rule():
    rule = Rule(inner_part=0.05, least_ratio=0.0, most_ratio=math.inf, measured_at_first=30, growth=0.0)
    model, optimizer, scheduler, rates = build(rule=rule)
    train(model, optimizer, scheduler, 7)
    layers = adapted_layers(model)
    recorder = Recorder(model, layers)
    recorder.on = True
    before = [w.detach().clone() for w in factors(layers)]
    part = 1 - 7 / 60
    train(model, optimizer, scheduler, 1, first=7)
    moved = [(w.detach() - b) / part for w, b in zip(factors(layers), before, strict=True)]
    with torch.no_grad():
        for w, b in zip(factors(layers), before, strict=True):
            w.copy_(b)
    logs_a, logs_b = [], []
    wanted = rule.output_change(recorder.loss_terms, len(layers))
    for i, entry in enumerate(layers):
        u_a, u_b = -moved[2 * i] / rates.lr_a, -moved[2 * i + 1] / rates.lr_b
        m = movement(entry, recorder.samples[entry.name], u_a / rms(u_a), u_b / rms(u_b))
        logs_b.append(math.log(wanted * m.output / m.delta2))
        logs_a.append(math.log(min(wanted * m.output / m.delta1, 0.05 * m.inner / m.inner_change)))
    assert rates.lr_a == pytest.approx(math.exp(sum(logs_a) / len(layers)), rel=1e-3)
    assert rates.lr_b == pytest.approx(math.exp(sum(logs_b) / len(layers)), rel=1e-3)


def test_a_step_may_move_more_the_more_loss_terms_it_has_and_each_layer_less_the_more_there_are():
    rule = Rule()
    assert rule.output_change(64, 12) == pytest.approx(2 * rule.output_change(16, 12))
    assert rule.output_change(16, 48) == pytest.approx(rule.output_change(16, 12) / 2)
    assert rule.output_change(1e9, 9) == pytest.approx(rule.most_output_part / 3)
    assert rule.output_change(0, 1) == rule.output_part  # a loss that no gradient came from counts as one term


def test_the_ratio_stays_within_its_limits():
    rule = Rule(least_ratio=2.0, most_ratio=4.0)
    assert rule.balanced(4e-3, 2e-4)[:2] == pytest.approx((math.sqrt(4e-7), 2 * math.sqrt(4e-7)))  # the product is kept
    assert rule.balanced(1e-3, 3e-3)[:2] == (1e-3, 3e-3)
    assert rule.balanced(1e-3, 2e-2)[:2] == pytest.approx((1e-3, 4e-3))  # B is held, A is not hastened
    assert rule.balanced(0.0, 3e-3)[:2] == (0.0, 3e-3)  # A has not moved yet
    assert rule.balanced(3e-3, 0.0)[:2] == (3e-3, 0.0)  # nor B, where it is A that starts at zero


@pytest.mark.parametrize("limit", [{"least_ratio": 1e3, "most_ratio": 1e3}, {"least_ratio": 0.0, "most_ratio": 1e-3}])
def test_the_limits_of_the_ratio_hold_in_training(limit):
    model, optimizer, scheduler, rates = build(rule=Rule(**limit))
    train(model, optimizer, scheduler, 5)
    assert rates.lr_b / rates.lr_a == pytest.approx(limit["most_ratio"])


def test_an_adapter_whose_a_starts_at_zero_trains():
    model = adapted(0)
    for i, weight in enumerate(factors(adapted_layers(model))):
        torch.nn.init.normal_(weight, std=0.1 if i % 2 else 0.0)
    optimizer = loraplus.create_optimizer(model, torch.optim.AdamW, lr=1.0, lr_ratio=1, lr_head=1e-3)
    scheduler = linear(optimizer, 60)
    rates = AutoRates(model, optimizer)
    losses = train(model, optimizer, scheduler, 60)
    assert losses[-1] < 0.9 * losses[0]
    assert rates.lr_a > 0 and rates.lr_b > 0
    assert all(weight.abs().sum() > 0 for weight in factors(adapted_layers(model)))


@pytest.mark.parametrize(
    ("make", "terms"),
    [
        (lambda g: g[:, 0].unsqueeze(1) * torch.tensor([1.0, 0, 0, 0, 0])[:, None], 6),  # a label at one position
        (lambda g: g[:, :1] * torch.tensor([0.1, 0.4, 0.2, 3.0, 0.3])[:, None], 6),  # one label, through attention
        (lambda g: g, 30),  # a target at every position
        (lambda g: torch.cat([g[:, :3], torch.zeros_like(g[:, 3:])], 1), 18),  # but padding has none
        (lambda g: g - g.mean(1, keepdim=True), 30),  # positions that cancel count once each
        (lambda g: g[:, 0], 6),
        (lambda g: torch.zeros_like(g), 0),
    ],
)
def test_loss_terms_are_counted_in_the_gradient(make, terms):
    g = torch.randn(6, 5, 4096, generator=torch.Generator().manual_seed(0))
    assert loss_terms(make(g)) == pytest.approx(terms, rel=0.02)


@pytest.mark.parametrize("checkpointing", [None, True, False])  # none, reentrant, not reentrant
def test_loss_terms_add_up_over_accumulated_parts_whichever_module_is_called(checkpointing):
    class Task(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = adapted()

    task = Task()
    if checkpointing is not None:
        task.inner.enable_input_require_grads()
        task.inner.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        task.inner.train()
    recorder = Recorder(task, adapted_layers(task))
    recorder.on = True
    found = []
    for _ in range(2):
        task.inner(**batch()).loss.backward()
        found.append(recorder.loss_terms)
    assert found[0] > 0 and found[1] == pytest.approx(2 * found[0], rel=0.3)
    recorder.forget()
    assert recorder.loss_terms == 0


def test_a_step_between_measurements_has_the_last_rates_times_the_schedule():
    model, optimizer, scheduler, rates = build(rule=Rule(measured_at_first=3, measured_every=1000, growth=0.0))
    train(model, optimizer, scheduler, 3)
    lr_a, lr_b = rates.lr_a, rates.lr_b
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append(rates.rates_of(optimizer.param_groups[0])[0]))
    twin = torch.optim.AdamW(
        [
            {"params": [p.detach().clone().requires_grad_() for p in g["params"]], "lr": 0.0}
            for g in optimizer.param_groups
        ]
    )
    scheduler.step()
    factor = optimizer.param_groups[0]["lr"] / optimizer.param_groups[0]["initial_lr"]
    model(**batch()).loss.backward()
    for ours, theirs, lr in zip(optimizer.param_groups, twin.param_groups, (lr_a, lr_b), strict=False):
        theirs["lr"] = lr * factor
        for p, q in zip(ours["params"], theirs["params"], strict=True):
            q.grad = p.grad.clone()
            twin.state[q] = {key: value.clone() for key, value in optimizer.state[p].items()}
    optimizer.step()
    twin.step()
    assert [g["name"] for g in optimizer.param_groups[:2]] == ["lora_A", "lora_B"]
    for ours, theirs in zip(optimizer.param_groups[:2], twin.param_groups[:2], strict=True):
        for p, q in zip(ours["params"], theirs["params"], strict=True):
            assert torch.equal(p, q)
    assert (rates.lr_a, rates.lr_b) == (lr_a, lr_b) and seen == [pytest.approx(lr_a * factor)]


def test_other_groups_keep_their_rate():
    model, optimizer, scheduler, rates = build()
    head = next(group for group in optimizer.param_groups if group["name"] == "head")
    before = [p.detach().clone() for p in head["params"]]
    train(model, optimizer, scheduler, 1)
    moved = max(float((p.detach() - b).abs().max()) for p, b in zip(head["params"], before, strict=True))
    assert moved == pytest.approx(1e-3, rel=0.05)  # AdamW's first step
    assert rates.rates_of(head) is None


@pytest.mark.parametrize("stop", [7, 15, 27])  # among the measured steps, and between them
def test_a_checkpoint_goes_on_to_the_same_weights(stop):
    whole = build()
    train(*whole[:3], 50)
    model, optimizer, scheduler, rates = build()
    train(model, optimizer, scheduler, stop)
    again_model, again_optimizer, again_scheduler, again_rates = build(seed=0)
    again_model.load_state_dict(model.state_dict())
    again_optimizer.load_state_dict(optimizer.state_dict())
    again_scheduler.load_state_dict(scheduler.state_dict())
    again_rates.load_state_dict(rates.state_dict())
    train(again_model, again_optimizer, again_scheduler, 50 - stop, first=stop)
    for p, q in zip(whole[0].parameters(), again_model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_gradient_accumulation_measures_on_the_step_not_on_the_parts():
    model, optimizer, scheduler, rates = build()
    for step in range(4):
        for part in range(3):
            (model(**batch(seed=3 * step + part)).loss / 3).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    assert rates.steps == 4 and rates.lr_b > 0


def test_it_draws_no_random_number():
    model, optimizer, scheduler, _ = build()
    torch.manual_seed(5)
    expected = torch.get_rng_state()
    model.eval()  # no dropout in this model, and none is drawn
    train(model, optimizer, scheduler, 3)
    assert torch.equal(torch.get_rng_state(), expected)


@pytest.mark.parametrize(
    ("optimizer_cls", "options"),
    [
        (torch.optim.AdamW, {}), (torch.optim.AdamW, {"fused": True}), (torch.optim.AdamW, {"foreach": True}),
        (torch.optim.AdamW, {"weight_decay": 0.1}), (torch.optim.Adam, {}), (torch.optim.SGD, {"momentum": 0.9}),
        (torch.optim.RMSprop, {}), (torch.optim.NAdam, {}), (torch.optim.Adamax, {}),
    ],
)  # fmt: skip
def test_optimizers_whose_step_scales_with_the_rate_are_taken(optimizer_cls, options):
    model, optimizer, scheduler, rates = build(optimizer_cls, **options)
    losses = train(model, optimizer, scheduler, 20)
    assert all(map(math.isfinite, losses)) and sum(losses[-5:]) < sum(losses[:5])
    assert rates.updates is not None and all(layer.delta2 < 0.3 for layer in rates.updates.layers)


class StepsOfTheirOwn(torch.optim.Optimizer):
    """Counts how far it has come in rates, as schedule-free optimizers do."""

    def __init__(self, params, lr=1e-3, **_):
        super().__init__(params, {"lr": lr, "weight_decay": 0.0})
        self.sum = 0.0

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    total = self.state[p].get("sum", 0.0) + group["lr"] ** 2
                    self.state[p]["sum"] = total
                    p.sub_(p.grad * group["lr"] ** 3 / total)


@pytest.mark.parametrize(
    "optimizer_cls", [torch.optim.Adafactor, torch.optim.LBFGS, torch.optim.Rprop, StepsOfTheirOwn]
)
def test_optimizers_whose_step_does_not_scale_are_refused_by_name(optimizer_cls):
    model = adapted()
    groups = loraplus.param_groups(model, lr=1e-3)
    if optimizer_cls is torch.optim.LBFGS:
        optimizer = optimizer_cls([p for group in groups for p in group["params"]])
        optimizer.param_groups = [{**optimizer.param_groups[0], **group} for group in groups]
    else:
        optimizer = optimizer_cls(groups)
    with pytest.raises(TrainerSetupError, match=f"{optimizer_cls.__name__}.*scale"):
        AutoRates(model, optimizer)
    assert not optimizer._optimizer_step_pre_hooks


def test_groups_that_mix_a_and_b_are_refused():
    model = adapted()
    with pytest.raises(TrainerSetupError, match="create_optimizer"):
        AutoRates(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]))


def test_an_optimizer_of_another_model_is_refused():
    with pytest.raises(TrainerSetupError, match="does not hold"):
        AutoRates(adapted(), loraplus.create_optimizer(adapted(), torch.optim.AdamW, lr=1e-3))


def test_a_model_without_adapter_is_refused():
    with pytest.raises(NoLoraFactorsError):
        AutoRates(torch.nn.Linear(2, 2), torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))]))


def test_a_step_without_a_forward_pass_is_an_error_that_says_so(monkeypatch):
    monkeypatch.setattr("loraplus.auto.anything_is_compiled", lambda: False)  # by another test of this process
    model, optimizer, _, _ = build()
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    with pytest.raises(TrainerSetupError, match="no forward pass"):
        optimizer.step()


def test_removed_hooks_leave_an_ordinary_optimizer():
    model, optimizer, scheduler, rates = build()
    rates.remove()
    train(model, optimizer, scheduler, 1)
    assert rates.steps == 0 and not optimizer._optimizer_step_pre_hooks


def test_mixed_precision_gives_rates_of_the_same_size():
    found = []
    for enabled in (False, True):
        model, optimizer, scheduler, rates = build()
        train(model, optimizer, scheduler, 15, autocast=enabled)
        found.append((rates.lr_a, rates.lr_b))
    assert found[1] == pytest.approx(found[0], rel=0.5)  # in 15 steps two roundings go ways of their own


def test_a_step_that_the_gradient_scaler_skips_moves_nothing():
    model, optimizer, scheduler, rates = build(fused=True)
    train(model, optimizer, scheduler, 2)
    before = [w.detach().clone() for w in factors(adapted_layers(model))]
    known = rates.lr_a, rates.lr_b
    model(**batch()).loss.backward()
    optimizer.found_inf = torch.ones(())  # as GradScaler tells a fused optimizer that a gradient was infinite
    optimizer.step()
    del optimizer.found_inf
    assert all(torch.equal(w, b) for w, b in zip(factors(adapted_layers(model)), before, strict=True))
    assert (rates.lr_a, rates.lr_b) == known
