"""Over a base in 4 or 8 bits the adapters take their fast form, and the base layer stays as it is."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from loraplus import slow_down, speed_up
from speed.models import bare

BITS = {"4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "8": {"load_in_8bit": True}}
WIDE = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 32}


@pytest.fixture(params=BITS)
def model(request, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    bare("llama", **WIDE).save_pretrained(tmp_path)
    quantised = BitsAndBytesConfig(**BITS[request.param])
    model = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=quantised, device_map="cpu")
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    torch.manual_seed(1)
    lora = LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", init_lora_weights=False, lora_dropout=0.2)
    return get_peft_model(model, lora).train()


def step(model):
    torch.manual_seed(0)
    ids = torch.arange(3, 27).view(2, 12)
    loss = model(input_ids=ids, labels=ids).loss
    model.zero_grad()
    loss.backward()
    trained = (parameter for parameter in model.parameters() if parameter.requires_grad)
    return loss.detach(), [parameter.grad.clone() for parameter in trained]


@pytest.mark.parametrize("dropout", [True, False])
def test_a_step_over_a_quantised_base_is_that_of_peft(model, dropout):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout) and not dropout:
            module.p = 0.0
    expected_loss, expected = step(model)
    report = speed_up(model)
    assert list(report.replaced.values()).count("LoRA in one step") == 14
    loss, gradients = step(model)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-6)
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2 if one.dtype.itemsize < 4 else 1e-3, atol=1e-5)
    slow_down(model)
    loss, gradients = step(model)
    assert torch.equal(loss, expected_loss)
    assert all(torch.equal(one, other) for one, other in zip(gradients, expected, strict=True))


def test_adapters_over_a_quantised_base_may_be_switched_off(model):
    speed_up(model)
    ids = torch.arange(3, 27).view(2, 12)
    model.eval()
    with torch.no_grad(), model.disable_adapter():
        off = model(input_ids=ids).logits
    slow_down(model)
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(input_ids=ids).logits, off)
