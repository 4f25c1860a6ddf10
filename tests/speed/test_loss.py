"""The loss of a causal language model in chunks, and logits that are computed when somebody looks."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.loss.loss_utils import ForCausalLMLoss

from loraplus.errors import InputError
from loraplus.speed import loss as loss_module
from loraplus.speed import slow_down, speed_up
from loraplus.speed.loss import LazyLogits, chunked_loss, lazy_logits, literal
from speed.models import CAUSAL, adapted, apart, batch_of, gradients, step


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 3), length=st.integers(1, 6), vocabulary=st.integers(2, 7), chunk=st.integers(1, 5),
    masked=st.sampled_from([0.0, 0.5, 1.0]), count=st.sampled_from([None, 3, torch.tensor(7)]),
    shifted=st.booleans(), ignored=st.sampled_from([-100, 0]), dtype=st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
def test_it_is_the_loss_of_transformers(rows, length, vocabulary, chunk, masked, count, shifted, ignored, dtype):
    torch.manual_seed(rows * 100 + length)
    hidden = torch.randn(rows, length, 4, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, 4, dtype=dtype)
    labels = torch.randint(0, vocabulary, (rows, length))
    labels[torch.rand(rows, length) < masked] = ignored
    options = {"num_items_in_batch": count, "ignore_index": ignored}
    if shifted:
        options["shift_labels"] = labels
    expected = ForCausalLMLoss(F.linear(hidden, weight), labels, vocabulary, **options)
    (of_expected,) = torch.autograd.grad(expected, hidden)
    before, loss_module._CHUNK_BYTES = loss_module._CHUNK_BYTES, 4 * vocabulary * chunk
    try:
        found = chunked_loss(lazy_logits(hidden, weight, None, dtype, dtype), labels, **options)
    finally:
        loss_module._CHUNK_BYTES = before
    (of_found,) = torch.autograd.grad(found * 1, hidden)
    assert found.dtype is expected.dtype
    assert torch.allclose(found, expected, rtol=1e-5, equal_nan=True)
    assert torch.allclose(of_found, of_expected, rtol=1e-4, atol=1e-6, equal_nan=True)
    if count is None and not shifted:
        assert torch.allclose(literal(hidden, weight, labels, ignored), found, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_its_error_against_64_bits_is_that_of_transformers(dtype):
    errors = [0.0, 0.0]
    for seed in range(12):
        torch.manual_seed(seed)
        hidden, weight = torch.randn(2, 30, 16).to(dtype), torch.randn(50, 16).to(dtype)
        labels = torch.randint(0, 50, (2, 30)).masked_fill(torch.rand(2, 30) < 0.6, -100)

        def gradient(values, weight=weight, labels=labels, lazy=False):
            values = values.detach().requires_grad_(True)
            weight = weight.to(values.dtype)
            if lazy:
                logits = lazy_logits(values, weight, None, values.dtype, values.dtype)
                loss = chunked_loss(logits, labels)
            else:
                loss = ForCausalLMLoss(F.linear(values, weight), labels, 50)
            (found,) = torch.autograd.grad(loss * 1024, values)
            return found.double()

        wide = hidden.double().requires_grad_(True)
        logits = F.linear(wide, weight.double())[:, :-1].reshape(-1, 50)
        (exact,) = torch.autograd.grad(F.cross_entropy(logits, labels[:, 1:].reshape(-1)) * 1024, wide)
        for index, lazy in enumerate((False, True)):
            errors[index] += (gradient(hidden, lazy=lazy) - exact).pow(2).mean().item()
    assert errors[1] ** 0.5 <= 1.1 * errors[0] ** 0.5 + 1e-7


def fast(family="llama"):
    model = adapted(family)
    speed_up(model, levers=["loss"])
    return model, batch_of(family)


def test_a_batch_without_a_label_has_the_loss_and_gradients_of_before():
    model, batch = adapted("llama"), batch_of("llama")
    batch["labels"][:] = -100
    expected = step(model, batch), step(model, {**batch, "num_items_in_batch": 4})
    speed_up(model)
    found = step(model, batch), step(model, {**batch, "num_items_in_batch": 4})
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one[0], other[0]) or (one[0].isnan() and other[0].isnan())
        for name, value in other[1].items():
            assert torch.equal(one[1][name], value) or (one[1][name].isnan().all() and value.isnan().all())


@pytest.mark.parametrize("family", CAUSAL)
def test_logits_that_somebody_looks_at_are_the_logits(family):
    model, batch = fast(family)
    out = model(**batch)
    slow_down(model)
    expected = model(**batch).logits
    assert out.logits.shape == expected.shape
    assert out.logits.dtype is expected.dtype
    assert torch.equal(out.logits.argmax(-1), expected.argmax(-1))
    assert torch.allclose(out.logits, expected, rtol=1e-5)
    assert torch.allclose(torch.cat([out.logits[:1], out.logits[1:]]), expected)
    assert torch.allclose(torch.from_numpy(out.logits.detach().numpy()), expected)


def test_gradients_go_through_logits_that_somebody_looks_at():
    class Sum(torch.autograd.Function):
        """Takes its input without looking by way of Python."""

        @staticmethod
        def forward(ctx, x):
            ctx.shape = x.shape
            return x.sum()

        @staticmethod
        def backward(ctx, g):
            return g.expand(ctx.shape)

    uses = {
        "loss and logits": lambda out: out.loss + out.logits.pow(2).mean(),
        "a function of autograd": lambda out: Sum.apply(out.logits),
        "both": lambda out: out.loss + Sum.apply(out.logits) + out.logits.logsumexp(-1).mean(),
        "after a look without gradients": lambda out: [_peek(out), out.logits.pow(2).mean()][1],
        "cast": lambda out: out.logits.float().pow(2).mean() + out.logits.double().mean(),
    }
    for name, use in uses.items():
        model, batch = adapted("llama"), batch_of("llama")
        expected = gradients(model, use(model(**batch)))
        speed_up(model)
        assert apart(gradients(model, use(model(**batch))), expected) < 1e-5, name


def _peek(out):
    with torch.no_grad():
        return out.logits.softmax(-1)


def test_what_is_done_to_logits_in_place_is_done():
    for change in (lambda x: x.mul_(2), lambda x: x.__setitem__((..., 3), -1e4), lambda x: torch.relu_(x)):
        model, batch = adapted("llama"), batch_of("llama")
        out = model(**batch)
        change(out.logits)
        expected = gradients(model, out.logits.pow(2).mean())
        speed_up(model)
        fast_out = model(**batch)
        change(fast_out.logits)
        assert torch.allclose(fast_out.logits, out.logits, atol=1e-5)
        assert apart(gradients(model, fast_out.logits.pow(2).mean()), expected) < 1e-5


def test_a_hook_on_the_output_layer_changes_the_loss_as_before():
    for hook in (lambda *_: None, lambda *args: args[2] * 2, lambda *args: args[2].mul_(0.5)):
        model, batch = adapted("llama"), batch_of("llama")
        head = model.get_base_model().lm_head
        handle = head.register_forward_hook(hook)
        expected = step(model, batch)
        handle.remove()
        speed_up(model)
        head.register_forward_hook(hook)
        found = step(model, batch)
        assert torch.allclose(found[0], expected[0], rtol=1e-5)
        assert apart(found[1], expected[1]) < 1e-5


def test_logits_can_be_saved_copied_and_printed():
    model, batch = fast()
    out = model(**batch)
    saved = io.BytesIO()
    torch.save(out.logits.detach(), saved)
    saved.seek(0)
    assert torch.equal(torch.load(saved), out.logits)
    assert torch.equal(copy.deepcopy(out.logits.detach()), out.logits)
    assert "tensor" in repr(out.logits)


def test_facts_about_logits_compute_none():
    model, batch = fast()
    logits = model(**batch).logits
    assert type(logits) is LazyLogits
    assert logits.requires_grad
    assert not logits.is_leaf
    assert (logits.shape, logits.dtype, logits.dim()) == ((3, 9, 40), torch.float32, 3)
    assert logits.float().seen is None
    assert logits.seen is None


def test_without_labels_logits_are_ordinary():
    model, batch = fast()
    labels = batch.pop("labels")
    assert type(model(**batch).logits) is torch.Tensor
    assert type(model(**batch, labels=labels).logits) is LazyLogits
    with torch.no_grad():
        assert type(model(**batch, labels=labels).logits) is torch.Tensor
    model.eval()
    assert type(model(**batch, labels=labels).logits) is torch.Tensor


def test_labels_that_do_not_fit_are_the_error_of_before():
    model, batch = adapted("llama"), batch_of("llama")
    for wrong in ({"logits_to_keep": 2}, {"labels": batch["labels"][:, :5]}, {"labels": batch["labels"] + 99}):
        speed_up(model)
        with pytest.raises((ValueError, IndexError, RuntimeError)):
            model(**{**batch, **wrong})
        slow_down(model)
        with pytest.raises((ValueError, IndexError, RuntimeError)):
            model(**{**batch, **wrong})


def test_a_trained_output_layer_keeps_its_loss():
    model = adapted("llama", {"modules_to_save": ["lm_head"]})
    batch = batch_of("llama")
    expected = step(model, batch)
    report = speed_up(model)
    assert "loss" in report.left["base_model.model"]
    found = step(model, batch)
    assert any("lm_head" in name for name in found[1])
    assert apart(found[1], expected[1]) < 1e-5


def test_a_loss_of_the_script_s_own_is_called():
    model, batch = adapted("llama"), batch_of("llama")
    own = model.get_base_model()
    own.loss_function = lambda logits, labels, vocab_size, **_: logits.pow(2).mean()
    expected = step(model, batch)
    assert "loss" in speed_up(model).left["base_model.model"]
    assert apart(step(model, batch)[1], expected[1]) < 1e-5


def test_the_default_loss_set_by_hand_comes_back():
    model = adapted("llama").get_base_model()
    model.loss_type = "ForMaskedLM"
    model.loss_function = ForCausalLMLoss
    speed_up(model)
    slow_down(model)
    assert model.loss_function is ForCausalLMLoss


def test_other_heads_soft_caps_and_scales_apply():
    model, batch = adapted("gemma2", final_logit_softcapping=0.5), batch_of("gemma2")
    expected = step(model, batch)
    speed_up(model)
    found = step(model, batch)
    assert torch.allclose(found[0], expected[0], rtol=1e-5)
    assert apart(found[1], expected[1]) < 1e-5


def test_a_scaled_loss_in_16_bits_has_the_gradients_of_before():
    model, batch = adapted("llama").half(), batch_of("llama")

    def scaled(loss):
        return {name: value.double() / 256 for name, value in gradients(model, loss * 256).items()}

    expected = scaled(model(**batch).loss)
    speed_up(model, levers=["loss"])
    assert apart(scaled(model(**batch).loss), expected) < 2e-2


def test_gradients_of_gradients_are_an_error():
    model, batch = fast()
    parameters = [value for value in model.parameters() if value.requires_grad]
    with pytest.raises(InputError, match="slow_down"):
        torch.autograd.grad(model(**batch).loss, parameters, create_graph=True)
