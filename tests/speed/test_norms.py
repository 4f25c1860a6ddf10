"""Norms that keep their input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from loraplus.errors import InputError
from loraplus.speed import speed_up
from loraplus.speed.norms import FastLayerNorm, FastRMSNorm, literal_rms_norm
from loraplus.speed.remake import recipe_of
from speed.models import apart


def norm_of(kind, width, dtype=torch.float32):
    torch.manual_seed(0)
    norm = LlamaRMSNorm(width, 1e-5) if kind == "rms" else nn.LayerNorm(width)
    with torch.no_grad():
        for value in norm.parameters():
            value.add_(torch.randn_like(value))
    return norm.to(dtype).requires_grad_(False)


def step(norm, x):
    x = x.detach().requires_grad_(True)
    y = norm(x * 1)
    (y * torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype)).sum().backward()
    return {"y": y.detach(), "x": x.grad}


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["rms", "layer"]), width=st.integers(1, 9), rows=st.integers(0, 5),
    size=st.sampled_from([1e-3, 1.0, 1e3]), dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    strided=st.booleans(),
)  # fmt: skip
def test_any_input_is_normed_as_before(kind, width, rows, size, dtype, strided):
    norm = norm_of(kind, width, dtype)
    x = (torch.randn(rows, 2, width) * size).to(dtype)
    x = x.transpose(0, 1) if strided else x
    expected = step(norm, x)
    speed_up(norm)
    assert isinstance(norm, FastRMSNorm if kind == "rms" else FastLayerNorm)
    found = step(norm, x)
    # RMSNorm is computed in 32 bits; a width of 1 leaves a gradient of differences only
    tolerance = 3e-2 if dtype is torch.bfloat16 else 1e-5
    for name in ("y", "x"):
        room = tolerance * (expected[name].double().abs().max().item() if rows else 0) + tolerance / size
        assert found[name].dtype is expected[name].dtype
        assert torch.allclose(found[name].double(), expected[name].double(), rtol=0, atol=room)


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_output_made_again_has_the_same_bits(kind, dtype, autocast):
    norm = norm_of(kind, 8, torch.float32 if autocast else dtype)
    speed_up(norm)
    source = torch.randn(4, 8).to(dtype).requires_grad_(True) * 1
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = norm(source)
    recipe = recipe_of(y)
    again = recipe.make(*recipe.sources)
    assert again.dtype is y.dtype
    assert torch.equal(again, y)


def test_rms_norm_is_its_literal_twin():
    for seed in range(5):
        norm = norm_of("rms", 7)
        speed_up(norm)
        x = torch.randn(3, 7, generator=torch.Generator().manual_seed(seed), requires_grad=True)
        assert torch.equal(norm(x), literal_rms_norm(x, norm.weight, norm.variance_epsilon))


def test_the_error_of_rms_norm_against_64_bits_is_that_of_transformers():
    for dtype in (torch.float32, torch.bfloat16):
        errors = {"slow": [0.0, 0.0], "fast": [0.0, 0.0]}
        for seed in range(12):
            norm = norm_of("rms", 16, dtype)
            x = torch.randn(20, 16, generator=torch.Generator().manual_seed(seed)).to(dtype)
            wide = x.double().requires_grad_(True)
            normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5) * norm.weight.double()
            (normed * torch.linspace(-1, 1, x.numel()).view(x.shape).to(dtype).double()).sum().backward()
            slow = step(norm, x)
            speed_up(norm)
            for kind, found in (("slow", slow), ("fast", step(norm, x))):
                for index, (one, exact) in enumerate(((found["y"], normed), (found["x"], wide.grad))):
                    errors[kind][index] += (one.double() - exact).pow(2).mean().item()
        for slow, fast in zip(errors["slow"], errors["fast"], strict=True):
            assert fast**0.5 <= 1.1 * slow**0.5 + 1e-8


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_a_norm_that_is_trained_gets_its_gradient(kind):
    norm, x = norm_of(kind, 6).requires_grad_(True), torch.randn(3, 6)
    step(norm, x)
    expected = {name: value.grad.clone() for name, value in norm.named_parameters()}
    norm.zero_grad()
    speed_up(norm)
    step(norm, x)
    assert apart({name: value.grad for name, value in norm.named_parameters()}, expected) == 0.0


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_an_input_by_name_and_without_gradient(kind):
    norm, x = norm_of(kind, 6), torch.randn(3, 6)
    name = "hidden_states" if kind == "rms" else "input"
    expected = norm(x)
    speed_up(norm)
    assert torch.equal(norm(**{name: x}), expected)
    assert torch.equal(norm(x), expected)
    with torch.inference_mode():
        assert torch.equal(norm(x), expected)


def test_weights_that_fsdp_frees_are_copied_for_what_reads_the_output():
    for kind in ("rms", "layer"):
        norm = norm_of(kind, 6)
        speed_up(norm)
        norm._is_fsdp_managed_module = True
        y = norm(torch.randn(3, 6, requires_grad=True) * 1)
        with torch.no_grad():
            for value in norm.parameters():
                value.set_(torch.full_like(value, torch.nan))
        recipe = recipe_of(y)
        assert torch.equal(recipe.make(*recipe.sources), y)


def test_gradients_of_gradients_of_rms_norm_are_an_error():
    norm = norm_of("rms", 6)
    speed_up(norm)
    x = torch.randn(3, 6, requires_grad=True)
    with pytest.raises(InputError, match="slow_down"):
        torch.autograd.grad(norm(x).sum(), x, create_graph=True)
