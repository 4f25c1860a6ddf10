"""Which modules change, and what the report says."""

from __future__ import annotations

import pytest
import torch
from peft import IA3Config, LoraConfig, OFTConfig, get_peft_model
from torch import nn

from loraplus.speed import SpeedReport, slow_down, speed_up
from loraplus.speed.fast import Fast
from speed.models import FAMILIES, adapted, bare, batch_of, step


def test_a_report_counts_what_was_done_and_says_why_the_rest_stays():
    report = speed_up(adapted("llama", {"use_dora": True, "target_modules": ["q_proj"]}))
    text = str(report)
    assert "5 × RMSNorm in one step" in text
    assert "2 × gated layer that keeps its two inputs" in text
    assert "left alone: 2 × DoraLinearVariant: PEFT's own form is kept" in text
    assert report.to_dict() == {"replaced": report.replaced, "left": report.left}
    assert str(SpeedReport()) == "nothing to speed up"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_adapter_layer_is_in_the_report_once(family):
    model = adapted(family)
    report = speed_up(model)
    layers = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert layers <= {*report.replaced, *report.left}
    assert not {*report.replaced} & {*report.left} & layers
    assert set(report.replaced) <= {name for name, _ in model.named_modules()}


@pytest.mark.parametrize("config", [
    IA3Config(target_modules=["query"], feedforward_modules=[]), OFTConfig(target_modules=["query"], oft_block_size=4),
    LoraConfig(target_modules=["word_embeddings"], r=2),
    LoraConfig(r=2, target_modules=[], target_parameters=["bert.encoder.layer.0.attention.self.query.weight"]),
])  # fmt: skip
def test_other_kinds_of_adapters_are_left_alone_and_listed(config):
    model, batch = get_peft_model(bare("bert"), config), batch_of("bert")
    expected = step(model, batch)
    report = speed_up(model, levers=["adapters"])
    assert not report.replaced
    assert report.left
    assert all("PEFT's own form is kept" in why for why in report.left.values())
    assert torch.equal(step(model, batch)[0], expected[0])


def test_a_subclass_of_peft_s_layer_is_left_alone():
    from peft.tuners.lora.layer import Linear

    class Own(Linear):
        def forward(self, x):
            return super().forward(x) * 2

    model = adapted("bert", {"target_modules": ["query"]})
    for module in model.modules():
        if type(module) is Linear:
            module.__class__ = Own
    report = speed_up(model, levers=["adapters"])
    assert set(report.left.values()) == {"Own: PEFT's own form is kept"}


def test_a_forward_that_was_put_in_its_place_stays():
    model, batch = adapted("bert", {"target_modules": ["query"]}), batch_of("bert")
    encoder = model.get_base_model().bert.encoder
    for module in (encoder.layer[0].attention.self.query, encoder.layer[0].output.LayerNorm, encoder.layer[1]):
        own = module.forward
        module.forward = lambda *args, own=own, **kwargs: own(*args, **kwargs) * 1.5
    expected = step(model, batch)
    report = speed_up(model)
    assert "another forward stands in its place" in report.left.values()
    assert torch.allclose(step(model, batch)[0], expected[0], rtol=1e-5)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_model_without_adapters_or_numbers_is_no_error(family):
    speed_up(bare(family))
    with torch.device("meta"):
        model = bare(family)
    speed_up(model)
    slow_down(model)
    assert not any(isinstance(module, Fast) for module in model.modules())
    speed_up(nn.Linear(2, 2))


def test_modes_random_numbers_and_hooks_are_as_they_were():
    model, seen = adapted("bert"), []
    model.get_base_model().bert.encoder.layer[0].eval()
    for module in model.modules():
        module.register_forward_hook(lambda *_: seen.append(1))
    modes = [module.training for module in model.modules()]
    numbers = torch.get_rng_state()
    speed_up(model)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), numbers)
    assert not seen


def test_an_adapter_that_is_added_later_is_changed_by_another_call():
    model = adapted("bert", {"target_modules": ["query"]})
    first = speed_up(model, levers=["adapters"])
    model.add_adapter("other", LoraConfig(r=2, target_modules=["query", "value"], modules_to_save=["classifier"]))
    second = speed_up(model, levers=["adapters"])
    assert len(second.replaced) == 2 * len(first.replaced)
