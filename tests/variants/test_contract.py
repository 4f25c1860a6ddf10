"""What every method of `loraplus.variants` is held to: types, accumulation, resuming, sharding, rates."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import ranks
import torch
from conftest import tiny_bert
from peft import LoraConfig, get_peft_model
from torch import nn

import loraplus
from loraplus import variants
from loraplus.roles import Role, trainable_parameters

PAIRED = [name for name, variant in variants.ALL.items() if variant.lr is not None]
IDS = torch.arange(32).reshape(4, 8)
LABELS = torch.tensor([0, 1, 0, 1])


def adapted(dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = get_peft_model(tiny_bert(), LoraConfig(**{"r": 4, "target_modules": ["query", "value"], **options}))
    for entry in trainable_parameters(model):
        if entry.role is Role.B:
            nn.init.normal_(entry.parameter, std=0.1)
    return model.to(dtype).eval()  # no dropout


def backward(model, rows=slice(None), weight=1.0):
    (model(input_ids=IDS[rows], labels=LABELS[rows]).loss * weight).backward()


def weights(model):
    return {entry.name: entry.parameter.detach().clone() for entry in trainable_parameters(model)}


def train(model, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        backward(model)
        optimizer.step()
    return weights(model)


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", variants.ALL)
def test_the_loss_falls_and_every_parameter_moves(name):
    model = adapted(modules_to_save=["classifier"])
    optimizer = variants.create_optimizer(model, name, lr_head=1e-3)
    loraplus.verify(model, optimizer, lr_ratio=1.0, lr_head=1e-3)
    start, before = model(input_ids=IDS, labels=LABELS).loss.item(), weights(model)
    after = train(model, optimizer, 10)
    assert model(input_ids=IDS, labels=LABELS).loss.item() < start
    assert not [entry for entry in before if torch.equal(before[entry], after[entry])]


@pytest.mark.parametrize("name", variants.ALL)
def test_halves_that_are_accumulated_make_the_step_of_the_whole(name):
    moved = []
    for parts in ([slice(None)], [slice(0, 2), slice(2, 4)]):
        model = adapted()
        optimizer = variants.create_optimizer(model, name, lr=1e-3)
        for rows in parts:
            backward(model, rows, 1 / len(parts))
        optimizer.step()
        moved.append(weights(model))
    for entry, whole in moved[0].items():
        torch.testing.assert_close(moved[1][entry], whole, atol=2e-4, rtol=0)  # of 1e-3 to 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", variants.ALL)
def test_a_resumed_run_ends_in_the_same_bits(name, dtype, tmp_path):
    model = adapted(dtype)
    optimizer = variants.create_optimizer(model, name, lr=1e-3, weight_decay=0.1)
    train(model, optimizer, 3)
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "checkpoint.pt")
    whole = train(model, optimizer, 3)
    again = adapted(dtype)
    resumed = variants.create_optimizer(again, name, lr=1e-3, weight_decay=0.1)
    of_model, of_optimizer = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    again.load_state_dict(of_model)
    resumed.load_state_dict(of_optimizer)
    assert same(train(again, resumed, 3), whole)


@pytest.mark.parametrize("name", PAIRED)
def test_factors_in_16_bits_have_moments_in_32(name):
    model = adapted(torch.bfloat16)
    optimizer = variants.create_optimizer(model, name)
    train(model, optimizer, 2)
    kept = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    assert kept and all(value.dtype == torch.float32 for value in kept)
    assert all(bool(weight.isfinite().all()) for weight in weights(model).values())


@pytest.mark.parametrize("name", variants.ALL)
def test_b_moves_as_much_farther_as_the_ratio_says(name):
    moved = {}
    for ratio in (1.0, 8.0):
        model = adapted()
        before = weights(model)
        optimizer = variants.create_optimizer(model, name, lr=1e-3, lr_ratio=ratio)
        after = train(model, optimizer, 1)
        moved[ratio] = {entry: after[entry] - before[entry] for entry in before}
    for entry, step in moved[1.0].items():
        expected = step * 8 if "lora_B" in entry else step
        torch.testing.assert_close(moved[8.0][entry], expected, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("name", PAIRED)
def test_decay_is_decoupled(name):
    moved = []
    for decay in (0.0, 0.5):
        model = adapted()
        optimizer = variants.create_optimizer(model, name, lr=1e-2, weight_decay=decay)
        before = weights(model)
        moved.append(train(model, optimizer, 1))
    for entry, plain in moved[0].items():
        torch.testing.assert_close(moved[1][entry], plain - 1e-2 * 0.5 * before[entry], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", PAIRED)
def test_an_optimizer_is_asked_for_its_step_without_being_touched(name):
    model = adapted()
    optimizer = variants.create_optimizer(model, name, lr=1e-3)
    train(model, optimizer, 2)
    state, before = copy.deepcopy(optimizer.state_dict()), weights(model)
    updates = loraplus.feature_updates(model, {"input_ids": IDS, "labels": LABELS}, optimizer)
    assert all(layer.delta1 > 0 and layer.delta2 > 0 for layer in updates.layers)
    assert same(weights(model), before)
    for kept, now in zip(state["state"].values(), optimizer.state_dict()["state"].values(), strict=True):
        assert all(torch.equal(torch.as_tensor(kept[key]), torch.as_tensor(now[key])) for key in kept)


SHARDED = ("lora-rite", "muon")


def sharded_steps():
    return {name: sharded_steps_of(name) for name in SHARDED}  # processes start slowly, so one pair serves all


def sharded_steps_of(name):
    from torch.distributed.fsdp import fully_shard

    model = adapted(modules_to_save=["classifier"])
    fully_shard(model)
    optimizer = variants.create_optimizer(model, name, lr=1e-3, lr_ratio=4.0, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        backward(model)  # the same rows in each process: their mean is the gradient of one
        optimizer.step()
    return {entry.name: entry.parameter.full_tensor() for entry in trainable_parameters(model)}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    return ranks.run(sharded_steps, tmp_path_factory.mktemp("sharded"))


@pytest.mark.parametrize("name", SHARDED)
def test_sharded_factors_move_as_whole_ones(name, sharded):
    one, other = (steps[name] for steps in sharded)
    model = adapted(modules_to_save=["classifier"])
    whole = train(model, variants.create_optimizer(model, name, lr=1e-3, lr_ratio=4.0, weight_decay=0.1), 3)
    assert same(one, other)
    for entry, weight in whole.items():
        torch.testing.assert_close(one[entry], weight, atol=1e-5, rtol=1e-4)


def test_a_name_that_does_not_exist_is_an_error_that_names_the_nearest():
    with pytest.raises(loraplus.errors.InputError, match="no variant 'lorarite'; the nearest is 'lora-rite'"):
        variants.create_optimizer(adapted(), "lorarite")


@pytest.mark.parametrize("name", ["lora-rite", "muon"])
def test_automatic_rates_refuse_steps_of_a_size_that_depends_on_both_factors(name):
    model = adapted()
    with pytest.raises(loraplus.errors.TrainerSetupError, match="how far steps of"):
        loraplus.create_optimizer(model, variants.ALL[name].load(), lr="auto")


def test_automatic_rates_serve_steps_of_adams_size():
    model = adapted(modules_to_save=["classifier"])
    optimizer = loraplus.create_optimizer(model, variants.ALL["riemannian"].load(), lr="auto")
    start = model(input_ids=IDS, labels=LABELS).loss.item()
    train(model, optimizer, 10)
    assert model(input_ids=IDS, labels=LABELS).loss.item() < start and optimizer.loraplus_auto.lr_b > 0


def test_a_bank_of_experts_is_refused():
    from loraplus.steps.movement import adapted_layers

    model = adapted()
    adapted_layers(model)[0].layer.num_experts = 4
    with pytest.raises(loraplus.errors.OptimizerSetupError, match="query as a pair: they are a bank of experts"):
        variants.create_optimizer(model, "lora-rite")


def test_every_method_has_an_entry_and_its_page_a_section():
    folder = Path(variants.__file__).parent
    homes = {variant.home[0] for variant in variants.ALL.values()}
    assert homes == {path.stem for path in folder.glob("*.py")} - {"__init__", "pair_optimizer"}
    page = (Path(__file__).parents[2] / "docs" / "variants.md").read_text(encoding="utf-8")
    assert not [variant.title for variant in variants.ALL.values() if f"## {variant.title}\n" not in page]
