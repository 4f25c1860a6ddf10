"""Activations and gated layers that keep what they are computed from."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.t5.modeling_t5 import T5DenseGatedActDense  # noqa: F401  (loads its activations)

from loraplus.errors import InputError
from loraplus.speed import slow_down, speed_up
from loraplus.speed.activations import FastActivation, FastGatedMLP, kind_of, literal_activation, literal_gated
from loraplus.speed.remake import recipe_of
from speed.models import CAUSAL, apart, bare


def step(module, x):
    x = x.detach().requires_grad_(True)
    y = module(x * 1)
    (y * torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype)).sum().backward()
    found = {name: value.grad.clone() for name, value in module.named_parameters() if value.grad is not None}
    module.zero_grad()
    return {"y": y.detach(), "x": x.grad, **found}


@pytest.mark.parametrize("name", sorted(ACT2FN))
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_every_activation_of_transformers_is_the_same_or_left_alone(name, dtype):
    module = ACT2FN[name]
    if not isinstance(module, nn.Module) or list(module.parameters()) or "rrelu" in name:
        return
    x = torch.linspace(-6, 6, 101).to(dtype)[None]
    expected = step(module, x)
    speed_up(module)
    tolerance = 2e-2 if dtype is torch.bfloat16 else 1e-9
    assert apart(step(module, x), expected) <= tolerance
    assert isinstance(module, FastActivation) == (kind_of(module) is not None)


@pytest.mark.parametrize("name", ["gelu", "gelu_new", "silu", "gelu_pytorch_tanh"])
def test_an_activation_is_its_literal_twin_and_made_again_with_the_same_bits(name):
    module, x = ACT2FN[name], torch.randn(3, 5, requires_grad=True) * 1
    speed_up(module)
    y = module(x)
    assert torch.equal(y, literal_activation(x, kind_of(module)))
    recipe = recipe_of(y)
    assert torch.equal(recipe.make(*recipe.sources), y)


def test_an_activation_that_works_in_place_still_does():
    module, x = nn.SiLU(inplace=True), torch.randn(3, 5)
    speed_up(module)
    y = module(x)
    assert y.data_ptr() == x.data_ptr()


def mlp_of(family, **options):
    model = bare(family, **options).requires_grad_(False)
    return model.model.layers[0].mlp.requires_grad_(True)


@pytest.mark.parametrize("family", [name for name in CAUSAL if name not in ("gpt2", "opt", "phi3")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_gated_layer_is_the_same(family, dtype):
    mlp = mlp_of(family).to(dtype)
    x = torch.randn(2, 3, 16).to(dtype)
    expected = step(mlp, x)
    speed_up(mlp)
    assert isinstance(mlp, FastGatedMLP)
    # in 16 bits: the same operations in the same order
    assert apart(step(mlp, x), expected) <= (0.0 if dtype is torch.bfloat16 else 1e-12)


def test_the_product_is_its_literal_twin():
    mlp, x = mlp_of("llama"), torch.randn(2, 16)
    speed_up(mlp)
    assert torch.equal(mlp(x), mlp.down_proj(literal_gated(mlp.gate_proj(x), mlp.up_proj(x), "silu")))


class _Changed(LlamaMLP):
    """A gated layer that is something else at times."""

    how = ""
    limit = 7.0
    sparse = False

    def forward(self, x):
        gate, up = self.gate_proj(x), self.up_proj(x)
        if self.how == "clamped":
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        if self.how == "dropped out":
            up = nn.functional.dropout(up, 0.1, training=self.training)
        if self.how == "sparse in some layers" and self.sparse:
            gate = gate.relu()
        return self.down_proj(self.act_fn(gate) * up)


@pytest.mark.parametrize("how", ["clamped", "dropped out"])
@pytest.mark.parametrize("training", [True, False])
def test_a_gated_layer_with_more_in_it_is_left_alone_and_listed(how, training):
    mlp = mlp_of("llama").train(training)
    mlp.__class__ = _Changed
    mlp.how = how
    x = torch.randn(5, 16) * 50
    torch.manual_seed(0)
    expected = step(mlp, x)
    report = speed_up(mlp)
    assert not isinstance(mlp, FastGatedMLP)
    assert "computes something else" in report.left[""]
    torch.manual_seed(0)
    assert apart(step(mlp, x), expected) == 0.0
    assert mlp.training is training


def test_layers_of_one_class_with_other_settings_are_judged_by_themselves():
    model = bare("llama")
    for index, layer in enumerate(model.model.layers):
        layer.mlp.__class__ = _Changed
        layer.mlp.how = "sparse in some layers"
        layer.mlp.sparse = index == 1
    speed_up(model)
    assert [isinstance(layer.mlp, FastGatedMLP) for layer in model.model.layers] == [True, False]


def test_a_hook_on_the_activation_runs():
    mlp, x, seen = mlp_of("llama"), torch.randn(2, 16), []
    speed_up(mlp)
    mlp.act_fn.register_forward_hook(lambda *args: seen.append(1) or args[2] * 3)
    expected = 3 * slow_result(mlp, x)
    assert torch.allclose(mlp(x), expected, atol=1e-5)
    assert seen


def slow_result(mlp, x):
    with torch.no_grad():
        return mlp.down_proj(literal_gated(mlp.gate_proj(x), mlp.up_proj(x), "silu"))


def test_judging_runs_no_hook_and_draws_no_number():
    mlp, seen = mlp_of("llama"), []
    mlp.gate_proj.register_forward_hook(lambda *_: seen.append(1))
    before = torch.get_rng_state()
    speed_up(mlp)
    assert not seen
    assert torch.equal(torch.get_rng_state(), before)
    slow_down(mlp)


def test_gradients_of_gradients_are_an_error():
    mlp = mlp_of("llama").requires_grad_(False)
    speed_up(mlp, levers=["recompute"])
    x = torch.randn(2, 16, requires_grad=True)
    with pytest.raises(InputError, match="slow_down"):
        torch.autograd.grad(mlp(x).sum(), x, create_graph=True)
