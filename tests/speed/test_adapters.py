"""LoRA's linear layer in one step, beside PEFT's and beside a float64 reference."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from loraplus.errors import InputError
from loraplus.speed import slow_down, speed_up
from loraplus.speed.adapters import FastLinear, literal, whole_weight
from loraplus.speed.norms import FastLayerNorm
from speed.models import adapted, apart


def layer(inputs=6, outputs=5, bias=True, base=None, seed=0, **lora):
    """One adapted linear layer."""
    torch.manual_seed(seed)
    model = nn.Sequential(base if base is not None else nn.Linear(inputs, outputs, bias=bias))
    config = LoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": ["0"], "init_lora_weights": False, **lora})
    return get_peft_model(model, config).base_model.model[0].train()


def step(module, x, weight=None, seed=0):
    """Output and gradients of (weight ⊙ y).sum()."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_(x.is_floating_point())
    torch.manual_seed(seed)
    y = module(x * 1)
    module.zero_grad()
    (y * (torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype) if weight is None else weight)).sum().backward()
    found = {name: value.grad.clone() for name, value in module.named_parameters() if value.grad is not None}
    return {"y": y.detach(), "x": x.grad, **found, "rng": torch.get_rng_state()}


def both(module, x, weight=None):
    slow = step(module, x, weight)
    speed_up(module)
    assert isinstance(module, FastLinear)
    fast = step(module, x, weight)
    assert torch.equal(slow.pop("rng"), fast.pop("rng"))  # what comes next draws the same numbers
    return fast, slow


@settings(max_examples=60, deadline=None)
@given(
    rank=st.integers(1, 5), inputs=st.integers(1, 9), outputs=st.integers(1, 9), rows=st.integers(0, 12),
    dropout=st.sampled_from([0.0, 0.4]), bias=st.booleans(), lora_bias=st.booleans(), rslora=st.booleans(),
    shape=st.sampled_from(["2d", "3d", "4d", "transposed", "strided", "expanded"]),
)  # fmt: skip
def test_any_shape_rank_and_setting_is_that_of_peft(
    rank, inputs, outputs, rows, dropout, bias, lora_bias, rslora, shape
):
    module = layer(inputs, outputs, bias, r=rank, lora_dropout=dropout, lora_bias=lora_bias, use_rslora=rslora).double()
    x = torch.randn(rows, inputs, dtype=torch.float64)
    if shape in ("3d", "4d"):
        x = torch.randn((rows, 2, inputs) if shape == "3d" else (2, rows, 1, inputs), dtype=torch.float64)
    elif shape == "transposed":
        x = torch.randn(rows, 2, inputs, dtype=torch.float64).transpose(0, 1)
    elif shape == "strided":
        x = torch.randn(rows, 2 * inputs, dtype=torch.float64)[:, ::2]
    elif shape == "expanded":
        x = torch.randn(1, inputs, dtype=torch.float64).expand(rows, inputs)
    fast, slow = both(module, x)
    assert apart(fast, slow) < 1e-12


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), p=st.sampled_from([0.0, 0.3]))
def test_it_is_its_literal_twin(seed, p):
    module = layer(seed=seed, lora_dropout=p).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    speed_up(module)
    base = module.base_layer
    a, b = module.lora_A.default.weight, module.lora_B.default.weight
    torch.manual_seed(seed)
    found = module(x)
    torch.manual_seed(seed)
    assert torch.allclose(found, literal(x, base.weight, base.bias, a, b, module.scaling["default"], p), atol=1e-12)


@pytest.mark.parametrize("rows", [3, 40, 400])
@pytest.mark.parametrize("dtypes", ["fp32", "bf16 base", "bf16"])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_its_error_against_64_bits_is_that_of_peft(rows, dtypes, dropout):
    errors = {"slow": {}, "fast": {}}
    for seed in range(16):
        module = layer(48, 40, seed=seed, r=4, lora_dropout=dropout, lora_bias=seed == 0)
        x = torch.randn(rows, 48)
        if dtypes != "fp32":
            x = x.bfloat16()
            module.base_layer.bfloat16()
        if dtypes == "bf16":
            module.bfloat16()
        weight = torch.randn(rows, 40).to(x.dtype)
        reference = copy.deepcopy(module).double()
        mask = None
        if dropout:
            torch.manual_seed(0)
            mask = F.dropout(torch.ones(x.shape, dtype=module.lora_A.default.weight.dtype), dropout).double()
            reference.lora_dropout["default"] = _Fixed(mask)
        exact = step(reference, x.double(), weight.double())
        fast, slow = both(module, x, weight)
        for name in fast:
            for kind, found in (("slow", slow), ("fast", fast)):
                error = (found[name].double() - exact[name]).pow(2).mean().item()
                errors[kind][name] = errors[kind].get(name, 0.0) + error
    for name, error in errors["slow"].items():
        assert errors["fast"][name] ** 0.5 <= 1.1 * error**0.5 + 1e-7, name


class _Fixed(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, x):
        return x * self.mask


def test_a_base_in_32_bits_is_not_rounded_to_an_adapter_in_16():
    module = layer(16, 8)
    for part in (module.lora_A, module.lora_B):
        part.bfloat16()
    fast, slow = both(module, torch.randn(5, 16))
    assert fast["y"].dtype is torch.float32
    assert (fast["y"] - slow["y"]).abs().max() < 0.05 * slow["y"].abs().max()
    base = module.base_layer(torch.zeros(1, 16))
    assert torch.equal(module(torch.zeros(1, 16)), base)


@pytest.mark.parametrize("adapters", [1, 2])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_cpu_autocast_without_dropout_gives_the_same_bits(adapters, x_dtype):
    module = layer(32, 24, r=4)
    if adapters == 2:
        module.update_layer("other", 3, 4, LoraConfig(r=3, init_lora_weights=False))
        module.set_adapter(["default", "other"])
    with torch.autocast("cpu", torch.bfloat16):
        fast, slow = both(module, torch.randn(7, 32).to(x_dtype))
    assert apart(fast, slow) == 0.0


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_several_adapters_add_up(dropout):
    module = layer(lora_dropout=dropout).double()
    module.update_layer("other", 3, 4, LoraConfig(r=3, init_lora_weights=False, lora_dropout=dropout))
    module.double().set_adapter(["default", "other"])
    fast, slow = both(module, torch.randn(4, 6, dtype=torch.float64))
    assert len([name for name in fast if "lora" in name]) == 4
    assert apart(fast, slow) < 1e-12


class Quantised(nn.Linear):
    """Holds its weight in a form of its own."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.whole = nn.Parameter((self.weight.detach() * 50).round().to(torch.int8), requires_grad=False)

    def forward(self, x):
        return F.linear(x, self.whole.to(x.dtype) / 50, self.bias)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_base_of_another_form_is_called(dropout):
    module = layer(base=Quantised(6, 5), lora_dropout=dropout)
    fast, slow = both(module, torch.randn(2, 4, 6))
    assert apart(fast, slow) < 1e-5


def test_a_base_that_is_transposed():
    module = layer(base=Conv1D(5, 6), fan_in_fan_out=True)
    fast, slow = both(module, torch.randn(2, 4, 6))
    assert apart(fast, slow) < 1e-5


@pytest.mark.parametrize("settings_", [{"use_dora": True}, {"alora_invocation_tokens": [1]}], ids=["DoRA", "aLoRA"])
def test_a_variant_is_left_alone_and_listed(settings_):
    module = layer(**settings_)
    report = speed_up(module)
    assert not report.replaced
    assert "PEFT's own form is kept" in report.left[""]


def test_a_variant_beside_plain_lora_keeps_its_form():
    module = layer()
    module.update_layer("other", 3, 4, LoraConfig(r=3, init_lora_weights=False, use_dora=True))
    module.set_adapter(["default", "other"])
    fast, slow = both(module, torch.randn(4, 6))
    assert apart(fast, slow) == 0.0


@pytest.mark.parametrize("part", ["lora_A.default", "lora_B.default", "lora_dropout.default", "base_layer", ""])
@pytest.mark.parametrize("hook", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_run_as_often_as_before(part, hook):
    module, x = layer(lora_dropout=0.1), torch.randn(3, 6)
    seen = []
    getattr(module.get_submodule(part), f"register_{hook}_hook")(lambda *_: seen.append(part))
    fast, slow = both(module, x)
    assert len(seen) == 2
    assert apart(fast, slow) < 1e-5


def test_a_hook_for_all_modules_runs():
    module, seen = layer(), []
    handle = nn.modules.module.register_module_forward_hook(lambda part, *_: seen.append(type(part).__name__))
    try:
        both(module, torch.randn(3, 6))
    finally:
        handle.remove()
    assert seen == [*seen[: len(seen) // 2]] * 2


def test_parametrized_and_biased_factors_are_called():
    module = layer()
    nn.utils.parametrizations.weight_norm(module.lora_A.default)
    fast, slow = both(module, torch.randn(3, 6))
    assert apart(fast, slow) < 1e-5


@pytest.mark.parametrize("trained", ["weight", "bias"])
def test_a_base_that_is_trained_gets_its_gradient(trained):
    module = layer()
    getattr(module.base_layer, trained).requires_grad_(True)
    fast, slow = both(module, torch.randn(3, 6))
    assert f"base_layer.{trained}" in fast
    assert apart(fast, slow) < 1e-5


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B"])
def test_a_frozen_factor_gets_none(frozen):
    module = layer()
    getattr(module, frozen).requires_grad_(False)
    fast, slow = both(module, torch.randn(3, 6))
    assert apart(fast, slow) < 1e-5


def test_an_input_without_gradient_and_one_dimension():
    module = layer()
    x = torch.randn(3, 6)
    slow = module(x), module(x[0])
    speed_up(module)
    fast = module(x), module(x[0])
    for one, other in zip(fast, slow, strict=True):
        assert torch.allclose(one, other, atol=1e-6)
    fast[0].sum().backward()
    assert x.grad is None
    assert module.lora_A.default.weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64])
def test_an_input_that_torch_does_not_multiply_is_its_error_as_before(dtype):
    module, x = layer(), torch.ones(3, 6, dtype=dtype)
    with pytest.raises(RuntimeError) as slow:
        module(x)
    speed_up(module)
    with pytest.raises(RuntimeError) as fast:
        module(x)
    assert str(fast.value) == str(slow.value)


def test_casts_that_were_switched_off_stay_off():
    from peft.helpers import disable_input_dtype_casting

    module = layer()
    module.base_layer.bfloat16()
    speed_up(module)
    with disable_input_dtype_casting(module), pytest.raises(RuntimeError):
        module(torch.ones(3, 6, dtype=torch.bfloat16))


def test_inputs_and_weights_changed_in_place_before_the_backward_pass_are_an_error():
    for change in ("x", "lora_A", "lora_B"):
        module = layer()
        speed_up(module)
        x = torch.randn(3, 6, requires_grad=True) * 1
        y = module(x)
        with torch.no_grad():
            (x if change == "x" else getattr(module, change).default.weight).mul_(2)
        with pytest.raises(RuntimeError, match="inplace operation"):
            y.sum().backward()


def test_gradients_of_gradients_are_an_error_even_where_the_loss_is_linear():
    module = layer()
    speed_up(module)
    y = module(torch.randn(3, 6))
    with pytest.raises(InputError, match="slow_down"):
        torch.autograd.grad(y.sum(), list(module.lora_A.parameters()), create_graph=True)


def test_transforms_of_torch_func_are_those_of_peft():
    module, x = layer(), torch.randn(3, 6)
    weights = {name: value.detach() for name, value in module.named_parameters()}

    def loss(weights, row):
        return torch.func.functional_call(module, weights, (row[None],)).pow(2).sum()

    per_example = torch.func.vmap(torch.func.grad(loss), (None, 0))
    expected = per_example(weights, x)
    speed_up(module)
    assert apart(per_example(weights, x), expected) < 1e-5


def test_functional_calls_use_the_weights_that_they_are_given():
    module, x = layer(), torch.randn(3, 6)
    weights = {name: value.detach() * 2 for name, value in module.named_parameters()}
    expected = torch.func.functional_call(module, weights, (x,))
    speed_up(module)
    assert torch.allclose(torch.func.functional_call(module, weights, (x,)), expected, atol=1e-6)


def test_a_layer_that_stands_in_two_places_is_changed_once():
    module = layer()
    model = nn.Sequential(module, nn.Linear(5, 6), module)
    x = torch.randn(3, 6)
    slow = step(model, x)
    speed_up(model)
    fast = step(model, x)
    slow.pop("rng"), fast.pop("rng")
    assert apart(fast, slow) < 1e-5
    assert slow_down(model) == 1


def test_replicas_of_data_parallel_compute_the_same():
    module, x = layer(), torch.randn(3, 6)
    expected = module(x)
    speed_up(module)

    def replica(part):
        made = part._replicate_for_data_parallel()
        for name, child in part._modules.items():
            made._modules[name] = replica(child) if child is not None else None
        for name, value in part._parameters.items():
            if value is None:
                made._parameters[name] = None
            else:
                setattr(made, name, value * 1)
        return made

    copy_ = replica(module)
    assert type(copy_) is type(module)
    assert torch.allclose(copy_(x), expected, atol=1e-6)


def test_mixed_batches_are_peft_s():
    module, x = layer().eval(), torch.randn(2, 6)
    expected = module(x, adapter_names=["default", "__base__"])
    speed_up(module)
    assert torch.equal(module(x, adapter_names=["default", "__base__"]), expected)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_whole_weight_is_the_layer_s_or_none(dropout):
    module, x = layer(lora_dropout=dropout), torch.randn(3, 6)
    assert whole_weight(module) is None
    speed_up(module)
    whole = whole_weight(module)
    if dropout:
        assert whole is None
        module.eval()
        whole = whole_weight(module)
    assert torch.allclose(F.linear(x, *whole), module(x), atol=1e-6)
    module.enable_adapters(False)
    assert torch.equal(whole_weight(module)[0], module.base_layer.weight)


def test_the_input_is_not_kept_where_a_norm_makes_it_again():
    kept = []
    model = adapted("bert")
    speed_up(model)
    attention = model.get_base_model().bert.encoder.layer[0].attention.self
    norm = model.get_base_model().bert.embeddings.LayerNorm
    assert isinstance(norm, FastLayerNorm)
    x = norm(torch.randn(2, 3, 16, requires_grad=True))
    with torch.autograd.graph.saved_tensors_hooks(lambda value: kept.append(value.data_ptr()) or value, lambda v: v):
        attention.query(x)
    assert x.data_ptr() not in kept
