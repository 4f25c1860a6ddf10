"""What is recorded of forward passes: by the gradients that come back, each pass once, the rows that are no padding."""

from __future__ import annotations

import dataclasses

import peft
import pytest
import torch
from test_auto_scripts import decoder, tokens
from test_feature_updates import adapted, batch
from transformers import T5Config, T5ForConditionalGeneration

from loraplus.steps.movement import adapted_layers, read
from loraplus.steps.recorder import Recorder


def recorded(model, **options):
    recorder = Recorder(model, adapted_layers(model), **options)
    recorder.on = True
    return recorder


def terms_of(model, *seeds):
    """Loss terms of passes, one backward each."""
    recorder = recorded(model)
    for seed in seeds:
        model(**tokens(seed)).loss.backward()
    found = recorder.loss_terms
    recorder.remove()
    model.zero_grad()
    return found


def checkpointed(model, reentrant):
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    return model


@pytest.mark.parametrize("checkpointing", [None, True, False])  # none, reentrant, not reentrant
def test_two_passes_before_one_backward_count_as_two(checkpointing):
    model = decoder()
    one, other = terms_of(model, 0), terms_of(model, 1)
    assert one != pytest.approx(other, rel=1e-3)
    if checkpointing is not None:
        checkpointed(model, checkpointing)
    recorder = recorded(model)
    (model(**tokens(0)).loss + model(**tokens(1)).loss).backward()
    assert recorder.loss_terms == pytest.approx(one + other, rel=1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_does_not_change_the_count(reentrant):
    expected = terms_of(decoder(), 0)
    assert terms_of(checkpointed(decoder(), reentrant), 0) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("between", ["reference", "generation", "evaluation", "the other order"])
def test_passes_that_no_gradient_comes_back_from_leave_nothing(between):
    model = decoder()
    expected = terms_of(model, 0)
    recorder = recorded(model)
    loss = model(**tokens(0)).loss
    if between == "reference":
        with torch.no_grad(), model.disable_adapter():
            model(**tokens(1))
    elif between == "generation":
        model.generate(input_ids=tokens(1)["input_ids"][:1], max_new_tokens=3, do_sample=False, pad_token_id=0)
    elif between == "evaluation":
        model(**tokens(1))  # without no_grad: its graph is thrown away
    loss.backward()
    if between == "the other order":
        with torch.no_grad():
            model(**tokens(1))
    assert recorder.loss_terms == pytest.approx(expected, rel=1e-5)
    again = recorded(model)
    model(**tokens(0)).loss.backward()
    for name, sample in again.samples.items():
        assert torch.equal(recorder.samples[name].inputs, sample.inputs)


@pytest.mark.parametrize("to_none", [True, False])
def test_what_gradients_that_were_thrown_away_came_from_is_dropped(to_none):
    model = decoder()
    expected = terms_of(model, 1)
    recorder = recorded(model)
    model(**tokens(0)).loss.backward()
    model.zero_grad(set_to_none=to_none)
    model(**tokens(1)).loss.backward()
    assert recorder.loss_terms == pytest.approx(expected, rel=1e-5)
    model(**tokens(1)).loss.backward()
    assert recorder.loss_terms == pytest.approx(2 * expected, rel=1e-5)


def test_an_error_in_a_forward_pass_does_not_join_it_to_the_next():
    model = decoder()
    expected = terms_of(model, 0)
    recorder = recorded(model)
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, 4), 10_000), labels=torch.zeros(1, 4, dtype=torch.long))
    model(**tokens(0)).loss.backward()
    assert recorder.loss_terms == pytest.approx(expected, rel=1e-5)


def test_a_recorder_looks_away_while_another_is_alone():
    model = decoder()
    one, other = recorded(model), recorded(model)
    with other.alone():
        model(**tokens(0)).loss.backward()
    assert not one.samples and len(other.samples) == 4


# Rows.


def t5(seed=0):
    torch.manual_seed(seed)
    shape = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 32}
    model = T5ForConditionalGeneration(T5Config(**shape, decoder_start_token_id=0))
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q", "k", "wo"]))


@pytest.mark.parametrize("lengths", [(7, 5), (6, 6)])
@pytest.mark.parametrize("told", ["labels", "decoder_attention_mask"])
def test_the_rows_of_an_encoder_decoder_are_those_of_each_sides_own_mask(lengths, told):
    model = t5()
    source, target = lengths
    ids = torch.randint(1, 32, (3, source))
    mask, seen = torch.ones_like(ids), torch.ones(3, target, dtype=torch.long)
    mask[0, 3:], seen[1, 2:] = 0, 0
    labels = torch.randint(1, 32, (3, target))
    more = {"decoder_attention_mask": seen} if told == "decoder_attention_mask" else {}
    labels = labels if more else labels.masked_fill(seen == 0, -100)
    recorder = recorded(model)
    model(input_ids=ids, attention_mask=mask, labels=labels, **more).loss.backward()
    for name, sample in recorder.samples.items():
        reads_encoder = ".encoder." in name or name.endswith("EncDecAttention.k")
        assert len(sample.inputs) == int((mask if reads_encoder else seen).sum()), name
    assert len(recorder.samples) == 8


def test_a_mask_of_another_shape_or_of_nothing_is_not_used():
    model = adapted()
    recorder = recorded(model, tokens=1000)
    given = batch()
    for mask, rows in ((given["attention_mask"], 42), (torch.ones(6, 1, 1, 10), 60), (None, 60)):
        recorder.forget()
        model(**{**given, "attention_mask": mask}).loss.backward()
        assert {len(sample.inputs) for sample in recorder.samples.values()} == {rows}


# Outputs that are no tensor.


@dataclasses.dataclass
class Out:
    y: torch.Tensor
    more: int = 0


class Puts(torch.nn.Linear):
    """Stands for a layer of another library."""

    def __init__(self, kind):
        super().__init__(6, 6)
        self.kind = kind
        self.base_layer = torch.nn.Linear(6, 6)
        self.lora_A = torch.nn.ModuleDict({"default": torch.nn.Linear(6, 2, bias=False)})
        self.lora_B = torch.nn.ModuleDict({"default": torch.nn.Linear(2, 6, bias=False)})
        self.scaling = {"default": 2.0}

    def forward(self, x):
        y = self.base_layer(x) + 2 * self.lora_B["default"](self.lora_A["default"](x))
        return {"tuple": (y, None), "list": [y], "dict": {"y": y}, "data class": Out(y), "of another size": y[..., :3],
                "whole numbers": (y > 0).long(), "nothing": None}[self.kind]  # fmt: skip


@pytest.mark.parametrize("kind", ["tuple", "list", "dict", "data class"])
def test_a_layer_that_puts_out_more_than_a_tensor_is_measured(kind):
    model = torch.nn.Sequential(Puts(kind))
    recorder = recorded(model)
    found = model(torch.randn(4, 6))
    tensor = found.y if kind == "data class" else found["y"] if kind == "dict" else found[0]
    tensor.sum().backward()
    (sample,) = recorder.samples.values()
    assert read([sample.output])[0] == pytest.approx(tensor.square().mean().sqrt().item())


@pytest.mark.parametrize("kind", ["of another size", "whole numbers", "nothing"])
def test_a_layer_whose_output_is_not_what_b_writes_is_left_out(kind):
    model = torch.nn.Sequential(Puts(kind))
    recorder = recorded(model)
    found = model(torch.randn(4, 6))
    if kind == "of another size":
        found.sum().backward()
    assert not recorder.samples
