"""A last encoder layer that is computed where the head reads."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.modeling_outputs import SequenceClassifierOutput

from loraplus.speed import speed_up
from loraplus.speed.last_layer import FastClassifier, FastLastLayer
from speed.models import CLASSIFIERS, adapted, apart, bare, batch_of, step

SHORT = ["bert", "roberta", "electra"]


def seen_lengths(model):
    """The length of what leaves the last layer's feed-forward part, call by call."""
    lengths = []
    layer = model.get_base_model().base_model.encoder.layer[-1]
    own = type(layer.output.dense).forward
    layer.output.dense.__class__ = type(
        "Seen", (type(layer.output.dense),),
        {"forward": lambda self, x: lengths.append(x.shape[1]) or own(self, x)},
    )  # fmt: skip
    return lengths


@settings(max_examples=25, deadline=None)
@given(
    family=st.sampled_from(SHORT), attention=st.sampled_from(["sdpa", "eager"]), masked=st.booleans(),
    rows=st.integers(1, 3), length=st.integers(1, 8), hidden=st.sampled_from([0.0, 0.2]),
    probabilities=st.sampled_from([0.0, 0.2]), lora=st.sampled_from([0.0, 0.3]),
    targets=st.sampled_from([["query", "value"], ["key", "value"], ["query", "key", "value", "dense"], ["word_emb"]]),
)  # fmt: skip
def test_a_step_is_that_of_peft_with_the_same_random_numbers(
    family, attention, masked, rows, length, hidden, probabilities, lora, targets
):
    options = {"hidden_dropout_prob": hidden, "attention_probs_dropout_prob": probabilities}
    if targets == ["word_emb"]:
        targets = ["word_embeddings"]
    model = adapted(family, {"target_modules": targets, "lora_dropout": lora}, attn_implementation=attention, **options)
    model.double()
    batch = batch_of(family, rows, length=8)
    batch = {name: value[:, :length] if value.dim() == 2 else value for name, value in batch.items()}
    if not masked:
        del batch["attention_mask"]
    expected = step(model, batch)
    after = torch.get_rng_state()
    speed_up(model)
    assert isinstance(model.get_base_model(), FastClassifier)
    found = step(model, batch)
    assert torch.equal(torch.get_rng_state(), after)
    assert torch.allclose(found[0], expected[0], rtol=1e-10)
    assert apart(found[1], expected[1]) < 1e-10


@pytest.mark.parametrize("family", SHORT)
def test_it_is_short_with_and_without_gradients(family):
    model = adapted(family, {"target_modules": ["query"]})
    lengths = seen_lengths(model)
    speed_up(model)
    del lengths[:]
    model(**batch_of(family)).loss.backward()
    with torch.no_grad():
        model.eval()(**batch_of(family))
    assert lengths == [1, 1]


def test_its_error_against_64_bits_is_that_of_peft():
    errors = [0.0, 0.0]
    for seed in range(8):
        model, batch = adapted("bert"), batch_of("bert", seed=seed)
        exact = step(adapted("bert").double(), batch)[1]
        for index in range(2):
            found = step(model, batch)[1]
            errors[index] += sum(
                ((found[name].double() - value) / value.abs().max().clamp_min(1e-30)).pow(2).mean().item()
                for name, value in exact.items() if value.abs().max() > 1e-12
            )  # fmt: skip
            speed_up(model)
    assert errors[1] ** 0.5 <= 1.1 * errors[0] ** 0.5 + 1e-9


@pytest.mark.parametrize("family", [name for name in CLASSIFIERS if name not in SHORT])
def test_models_of_another_form_are_left_alone(family):
    report = speed_up(adapted(family))
    assert not any("last layer" in what for what in report.replaced.values())
    assert "last layer: of another form" in report.left.values()


class _MeanHead(torch.nn.Module):
    """Reads all positions."""

    def __init__(self, own):
        super().__init__()
        self.own = own

    def forward(self, hidden):
        return torch.tanh(self.own.dense(hidden.mean(1)))


def test_a_head_that_reads_all_positions_leaves_the_layer_whole():
    model, batch = bare("bert"), batch_of("bert")
    model.bert.pooler = _MeanHead(model.bert.pooler)
    expected = model(**batch).loss
    report = speed_up(model)
    assert report.left[""] == "last layer: the head reads other positions, too"
    assert not any(isinstance(module, (FastClassifier, FastLastLayer)) for module in model.modules())
    assert torch.allclose(model(**batch).loss, expected, rtol=1e-6)


def test_a_decoder_attends_backwards_with_and_without_a_mask():
    model, batch = adapted("bert", is_decoder=True).double(), batch_of("bert")
    whole = {"input_ids": batch["input_ids"], "labels": batch["labels"]}
    expected = step(model, batch), step(model, whole)
    speed_up(model)
    for one, other in zip((step(model, batch), step(model, whole)), expected, strict=True):
        assert apart(one[1], other[1]) < 1e-10


@pytest.mark.parametrize("where", ["bert", "bert.encoder", "bert.encoder.layer.1", "bert.encoder.layer.1.output",
                                   "bert.pooler", "bert.encoder.layer.1.attention.self.value"])  # fmt: skip
@pytest.mark.parametrize("first", ["hook", "speed_up"])
def test_a_hook_sees_all_positions(where, first):
    model, batch, shapes = bare("bert"), batch_of("bert"), []

    def look(_, inputs, output):
        for value in (output, *inputs):
            if value is not None:
                shapes.append(tuple((value if isinstance(value, torch.Tensor) else value[0]).shape))

    def hang():
        model.get_submodule(where).register_forward_hook(look)

    hang()
    model(**batch)
    expected, shapes[:] = list(shapes), []
    if first == "speed_up":
        model = bare("bert")
        speed_up(model)
        hang()
    else:
        speed_up(model)
    shapes.clear()
    model(**batch)
    assert shapes == expected


def test_threads_that_evaluate_at_once_do_not_disturb_each_other():
    model, batch = adapted("bert").eval(), batch_of("bert")
    expected = model(**batch).logits
    speed_up(model)
    wrong = []

    def evaluate(asked):
        for _ in range(20):
            with torch.no_grad():
                out: SequenceClassifierOutput = model(**batch, output_hidden_states=asked)
            if not torch.allclose(out.logits, expected, atol=1e-5):
                wrong.append(asked)
            if asked and out.hidden_states[-1].shape[1] != batch["input_ids"].shape[1]:
                wrong.append("hidden")

    threads = [threading.Thread(target=evaluate, args=(index % 2 == 1,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_loss_of_several_labels_and_embedded_inputs():
    model, batch = adapted("bert", num_labels=3, problem_type="multi_label_classification"), batch_of("bert")
    embedded = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_(True)
    inputs = {"inputs_embeds": embedded, "attention_mask": batch["attention_mask"], "labels": torch.rand(3, 3).round()}

    def both():
        found = step(model, inputs)[1]
        found["inputs"], embedded.grad = embedded.grad, None
        return found

    expected = both()
    speed_up(model)
    assert apart(both(), expected) < 1e-5
