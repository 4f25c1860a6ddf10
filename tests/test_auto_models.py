"""AutoRates and what people train: several models, layers out of sight, copies, compiled models, other optimizers."""

from __future__ import annotations

import copy
import io
import warnings
from typing import NamedTuple

import peft
import pytest
import torch
from test_auto_scripts import SMALL, automatic, decoder, moved, step, tokens, weights_of
from transformers import MixtralConfig, MixtralForCausalLM

import loraplus
from loraplus.auto import AutoRates, Rule, installed
from loraplus.automatic.compiled import run_eagerly
from loraplus.errors import LoraPlusWarning, TrainerSetupError
from loraplus.groups import rate_of_group

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
        assert torch.cat(factor).square().mean().sqrt().item() == pytest.approx(
            rate * rates._size * rates._growth.factor, rel=0.02
        )
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
