"""δ1, δ2 and δ3: measured right, taken back whole, and read as a diagnosis."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import tiny_bert
from peft import LoraConfig, get_peft_model

import loraplus
from loraplus.errors import InputError, NoLoraFactorsError
from loraplus.feature_updates import FeatureUpdates, feature_updates
from loraplus.steps.movement import adapted_layers, factors, movement
from loraplus.steps.recorder import Recorder


def adapted(seed: int = 0, **options):
    config = {"task_type": "SEQ_CLS", "r": 4, "lora_alpha": 8, "target_modules": ["query", "value"], **options}
    return get_peft_model(tiny_bert(seed=seed), LoraConfig(**config))


def batch(padded: bool = True, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 60, (6, 10), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        mask[:, 7:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids[:, 0] % 2}


def trained(lr_ratio: float = 16.0, steps: int = 5):
    model = adapted()
    optimizer = loraplus.create_optimizer(model, torch.optim.AdamW, lr=1e-2, lr_ratio=lr_ratio)
    for step in range(steps):
        model(**batch(seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def test_the_terms_are_those_of_the_formula():
    model, _ = trained()
    layers = adapted_layers(model)
    recorder = Recorder(model, layers, tokens=1000)
    recorder.on = True
    outputs = {}
    for entry in layers:
        entry.layer.register_forward_hook(lambda m, a, o, name=entry.name: outputs.update({name: (a[0], o)}))
    model(**batch()).loss.backward()
    real = batch()["attention_mask"].reshape(-1).bool()
    for entry in layers:
        a, b = entry.weights
        delta_a, delta_b = torch.randn_like(a), torch.randn_like(b)
        moved = movement(entry, recorder.samples[entry.name], delta_a, delta_b)
        x, y = (t.reshape(-1, t.shape[-1])[real] for t in outputs[entry.name])
        s = entry.scaling
        expected = (y, x @ a.T, s * x @ delta_a.T @ b.T, s * x @ a.T @ delta_b.T, s * x @ delta_a.T @ delta_b.T)
        measured = (moved.output, moved.inner, moved.delta1, moved.delta2, moved.delta3)
        for value, tensor in zip(measured, expected, strict=True):
            assert value == pytest.approx(tensor.detach().square().mean().sqrt().item(), rel=1e-4)


def test_measuring_leaves_no_trace():
    model, optimizer = trained()
    model.train()
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    model(**batch(seed=9)).loss.backward()
    before = [(p.detach().clone(), None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    state, random = copy.deepcopy(optimizer.state_dict()), torch.get_rng_state()
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    feature_updates(model, batch(), optimizer)
    for p, (weight, gradient) in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, weight)
        assert p.grad is gradient or torch.equal(p.grad, gradient)
    after = optimizer.state_dict()
    for index, values in state["state"].items():
        assert all(torch.equal(values[key], after["state"][index][key]) for key in values)
    assert state["param_groups"] == after["param_groups"]
    assert torch.equal(random, torch.get_rng_state())
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_it_is_the_next_step_of_the_optimizer_that_is_measured():
    model, optimizer = trained()
    found = feature_updates(model, batch(seed=3), optimizer)
    layers = adapted_layers(model)
    recorder = Recorder(model, layers)
    recorder.on = True
    before = [w.detach().clone() for w in factors(layers)]
    model(**batch(seed=3)).loss.backward()
    optimizer.step()
    steps = [w.detach() - b for w, b in zip(factors(layers), before, strict=True)]
    with torch.no_grad():
        for w, b in zip(factors(layers), before, strict=True):
            w.copy_(b)
    for i, (entry, layer) in enumerate(zip(layers, found.layers, strict=True)):
        moved = movement(entry, recorder.samples[entry.name], steps[2 * i], steps[2 * i + 1])
        assert layer.name == entry.name
        assert layer.delta1 == pytest.approx(moved.delta1 / moved.output, rel=1e-4)
        assert layer.delta2 == pytest.approx(moved.delta2 / moved.output, rel=1e-4)


@pytest.mark.parametrize(("lr_ratio", "stuck"), [(1e4, "A"), (1e-4, "B")])
@pytest.mark.filterwarnings("ignore:lr_ratio")
def test_a_factor_whose_rate_is_far_too_low_is_named_as_stuck(lr_ratio, stuck):
    model, _ = trained(steps=8)
    optimizer = loraplus.create_optimizer(model, torch.optim.AdamW, lr=1e-3, lr_ratio=lr_ratio)
    found = feature_updates(model, batch(), optimizer)
    assert {layer.stuck for layer in found.layers} == {stuck}
    assert found.diagnosis.startswith(f"{stuck} is stuck in 4 of 4 layers")
    assert found.diagnosis in str(found)
    assert found.to_dict()["layers"][found.layers[0].name]["stuck"] == stuck


def test_a_fresh_adapter_is_given_the_steps_that_a_needs():
    found = feature_updates(adapted(), batch(), lr=1e-2, lr_ratio=4)
    assert all(layer.delta1 > 0 and layer.delta2 > 0 for layer in found.layers)
    assert set(found.logs()) == {"updates/delta1", "updates/delta2"}
    first = feature_updates(adapted(), batch(), lr=1e-2, steps=1)
    assert {layer.stuck for layer in first.layers} == {"A"}  # B is zero, so A's step does nothing


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(NoLoraFactorsError, match="lora_A"):
        feature_updates(tiny_bert(), batch())
    with pytest.raises(InputError, match="no loss"):
        feature_updates(adapted(), {key: value for key, value in batch().items() if key != "labels"})
    with pytest.raises(InputError, match="steps"):
        feature_updates(adapted(), batch(), steps=0)


def test_buffers_are_kept_too():
    class Normed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4)

        def forward(self, x):
            return self.norm(self.linear(x))

    model = get_peft_model(Normed(), LoraConfig(r=2, target_modules=["linear"])).train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    feature_updates(model, {"x": torch.randn(8, 4)}, loss=lambda model, batch: model(**batch).square().sum(), steps=3)
    assert before and all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_nothing_is_concluded_where_nothing_moves():
    model, _ = trained()
    optimizer = loraplus.create_optimizer(model, torch.optim.AdamW, lr=1e-3, lr_ratio=16)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)  # as at the start of a warm-up
    found = feature_updates(model, batch(), optimizer)
    assert "nothing is concluded" in found.diagnosis and not any(layer.stuck for layer in found.layers)
    assert "nothing is concluded" in str(FeatureUpdates(()))


@pytest.mark.parametrize("factor", ["A", "B"])
def test_nothing_is_concluded_of_a_factor_whose_rate_is_zero_at_this_step(factor):
    model, _ = trained()
    optimizer = loraplus.create_optimizer(model, torch.optim.AdamW, lr=1e-3, lr_ratio=16)
    for group in optimizer.param_groups:
        group["lr"] *= group["name"] != f"lora_{factor}"
    found = feature_updates(model, batch(), optimizer)
    assert not any(layer.stuck for layer in found.layers)
    assert f"{factor} does not move in" in found.diagnosis and "nothing is concluded of it there" in found.diagnosis
    assert "both move" not in found.diagnosis


def test_a_frozen_factor_is_not_called_stuck():
    model = adapted()
    for name, p in model.named_parameters():
        p.requires_grad &= "lora_A" not in name
    found = feature_updates(model, batch(), lr=1e-2)
    assert all(layer.delta1 == 0 < layer.delta2 and layer.stuck is None for layer in found.layers)


def test_the_rates_are_those_that_are_set_automatically_and_these_are_not_disturbed():
    ends = []
    for looks in (False, True):
        model = adapted()
        optimizer = loraplus.create_optimizer(model, torch.optim.AdamW, lr=1.0, lr_ratio=1, lr_head=1e-3)
        rates = loraplus.AutoRates(model, optimizer)
        for seed in range(4):
            model(**batch(seed=seed)).loss.backward()
            if looks and seed == 3:
                found = feature_updates(model, batch(seed=9), optimizer)
                assert 0 < max(layer.delta2 for layer in found.layers) < 0.3
            optimizer.step()
            optimizer.zero_grad()
        ends.append((rates.lr_a, rates.lr_b))
    assert ends[0] == ends[1]
