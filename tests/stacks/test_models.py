"""attach + three steps + verify + explain on every kind of model: all trains, at its rate, and nothing else moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import tiny_bert
from older import needs_encoder_decoders
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

import loraplus
from loraplus.roles import clean_name
from stacks.models import Tokens

LR, RATIO = 1e-2, 8.0


class Rows(torch.utils.data.Dataset):
    """Token ids to be predicted, or random images with a class."""

    def __init__(self, images: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        self.rows: list[dict[str, Any]] = []
        for index in range(16):
            if images:
                pixels = torch.rand(3, 32, 32, generator=generator)
                self.rows.append({"pixel_values": pixels, "labels": index % 2})
            else:
                ids = torch.randint(2, 64, (12,), generator=generator)
                self.rows.append({"input_ids": ids, "labels": ids})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def encoder(folder):
    lora = LoraConfig(r=4, target_modules=["query", "value"], modules_to_save=["classifier"])
    return get_peft_model(tiny_bert(), lora), Tokens()


def llama(width: int = 32) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=64, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=1, num_attention_heads=2,
        initializer_range=0.2,
    ))  # fmt: skip


def decoder(folder):
    return get_peft_model(llama(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")), Rows(False)


def encoder_decoder(folder):
    needs_encoder_decoders()
    config = T5Config(
        vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_decoder_layers=1, num_heads=2, dropout_rate=0,
        decoder_start_token_id=0,
    )  # fmt: skip
    return get_peft_model(T5ForConditionalGeneration(config), LoraConfig(r=4, task_type="SEQ_2_SEQ_LM")), Rows(False)


def vision(folder):
    config = ViTConfig(
        image_size=32, patch_size=8, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    lora = LoraConfig(r=4, target_modules=VIT_TARGETS, modules_to_save=["classifier"])
    return get_peft_model(ViTForImageClassification(config), lora), Rows(True)


VIT_TARGETS = r".*attention.*(query|value|q_proj|v_proj)"


def conv(folder):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    lora = LoraConfig(r=2, target_modules=["convolution"], modules_to_save=["classifier.1"])
    return get_peft_model(ResNetForImageClassification(config), lora), Rows(True)


def tied_embeddings(folder):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=1, n_head=2))
    assert model.lm_head.weight is model.transformer.wte.weight
    return get_peft_model(model, LoraConfig(r=4, target_modules=["c_attn", "wte"], fan_in_fan_out=True)), Rows(False)


def tied_and_trained_in_full(folder):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=1, n_head=2))
    lora = LoraConfig(
        r=4, target_modules=["c_attn"], modules_to_save=["wte"], fan_in_fan_out=True, ensure_weight_tying=True
    )
    return get_peft_model(model, lora), Rows(False)


def several_adapters(folder):
    model = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    model.add_adapter("second", LoraConfig(r=2, target_modules=["v_proj", "o_proj"]))
    model.base_model.set_adapter(["default", "second"])  # both are active, so both train
    return model, Rows(False)


def quantised(folder, **bits):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    llama(64).save_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**bits), device_map="cpu")
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"])), Rows(False)


MODELS: dict[str, Callable[..., tuple[PeftModel, Any]]] = {
    "encoder": encoder,
    "decoder": decoder,
    "encoder-decoder": encoder_decoder,
    "vision": vision,
    "conv": conv,
    "tied-embeddings": tied_embeddings,
    "tied-and-trained-in-full": tied_and_trained_in_full,
    "several-adapters": several_adapters,
    "bf16-autocast": decoder,
    "8-bit": lambda folder: quantised(folder, load_in_8bit=True),
    "4-bit": lambda folder: quantised(folder, load_in_4bit=True, bnb_4bit_quant_type="nf4"),
}


def copies(model: torch.nn.Module, *, trained: bool) -> dict[str, torch.Tensor]:
    return {
        clean_name(name): value.detach().clone()
        for name, value in model.named_parameters()
        if value.requires_grad == trained
    }


@pytest.mark.parametrize("kind", MODELS)
def test_attach_trains_every_kind_of_model_at_the_right_rates(kind, tmp_path):
    torch.manual_seed(0)
    model, data = MODELS[kind](tmp_path / "model")
    before, frozen = copies(model, trained=True), copies(model, trained=False)
    args = TrainingArguments(
        str(tmp_path), learning_rate=LR, max_steps=3, per_device_train_batch_size=8, lr_scheduler_type="constant",
        max_grad_norm=0, report_to=[], disable_tqdm=True, use_cpu=True, save_strategy="no", label_names=["labels"],
        bf16=kind == "bf16-autocast",
    )  # fmt: skip
    trainer = loraplus.attach(Trainer(model, args, train_dataset=data), lr_ratio=RATIO)
    trainer.train()

    loraplus.verify(trainer.model, trainer.optimizer, lr_ratio=RATIO, lr=LR)
    table = loraplus.explain(trainer.model, trainer.optimizer).to_dict()["parameters"]
    assert table.keys() == before.keys()
    for name, entry in table.items():
        assert entry["lr"] == (LR * RATIO if ".lora_B." in name else LR), name
    assert {entry["role"] for entry in table.values()} >= {"lora_A", "lora_B"}
    if "tied" in kind:
        assert any("embedding" in entry["role"] for entry in table.values())
    held = [id(p) for group in trainer.optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held)) == len(table)  # tied parameters once

    after = copies(trainer.model, trained=True)
    for name, value in before.items():
        assert torch.isfinite(after[name]).all() and not torch.equal(value, after[name]), f"{name} did not train"
    for name, value in copies(trainer.model, trained=False).items():
        assert torch.equal(value, frozen[name]), f"{name} is frozen and moved"
