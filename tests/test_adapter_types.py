"""A model whose adapter has no factors A and B is told what it has instead, for every kind that PEFT builds."""

from __future__ import annotations

import peft
import pytest
from conftest import tiny_bert
from torch import nn

import loraplus
from loraplus.adapters.adapter_types import cause

WIDE = {"target_modules": ["0"]}
TOKENS = {"task_type": "SEQ_CLS", "num_virtual_tokens": 4}


def wide() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 256), nn.Linear(256, 64))


# PEFT's configuration, the model, its options; the name that a user knows it by, and what it trains.
KINDS = {
    "VeraConfig": (wide, {**WIDE, "r": 4}, "VeRA", "random, frozen and shared"),
    "PveraConfig": (wide, {**WIDE, "r": 4}, "PVeRA", "random, frozen and shared"),
    "RandLoraConfig": (wide, {**WIDE, "r": 4}, "RandLoRA", "random and frozen"),
    "VBLoRAConfig": (wide, {**WIDE, "vector_length": 64, "num_vectors": 8}, "VB-LoRA", "one bank of vectors"),
    "OFTConfig": (wide, WIDE, "OFT", "rotates"),
    "BOFTConfig": (wide, WIDE, "BOFT", "rotates"),
    "HRAConfig": (wide, WIDE, "HRA", "rotates"),
    "IA3Config": (wide, {**WIDE, "feedforward_modules": []}, "IA³", "scale activations"),
    "LNTuningConfig": (tiny_bert, {"target_modules": ["LayerNorm"]}, "LN-tuning", "norms of the model"),
    "FourierFTConfig": (wide, {**WIDE, "n_frequency": 8}, "FourierFT", "coefficients"),
    "WaveFTConfig": (wide, {**WIDE, "n_frequency": 8}, "WaveFT", "coefficients"),
    "C3AConfig": (wide, {**WIDE, "block_size": 16}, "C³A", "coefficients"),
    "ShiraConfig": (wide, {**WIDE, "r": 4}, "SHiRA", "single entries"),
    "MissConfig": (wide, {**WIDE, "r": 4}, "MiSS", "one matrix a layer"),
    "LoKrConfig": (wide, {**WIDE, "r": 64}, "LoKr", "whole, not factored"),
    "HiraConfig": (wide, {**WIDE, "r": 4}, "HIRA", "no known layout"),
    "DeloraConfig": (wide, {**WIDE, "r": 4}, "DELORA", "no known layout"),
    "GraloraConfig": (wide, {**WIDE, "r": 4}, "GRALORA", "no known layout"),
    "TrainableTokensConfig": (
        tiny_bert, {"target_modules": ["word_embeddings"], "token_indices": [1]}, "trainable-tokens", "rows of an",
    ),
    "PromptTuningConfig": (tiny_bert, TOKENS, "prompt-tuning", "virtual tokens"),
    "PrefixTuningConfig": (tiny_bert, TOKENS, "prefix-tuning", "virtual tokens"),
    "PromptEncoderConfig": (tiny_bert, TOKENS, "P-tuning", "virtual tokens"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_the_refusal_names_the_adapter_and_what_it_trains(kind):
    config = getattr(peft, kind, None)
    if config is None:
        pytest.skip(f"this PEFT has no {kind}")
    base, options, name, trains = KINDS[kind]
    model = peft.get_peft_model(base(), config(**options))
    for wrapped in (model, nn.DataParallel(model)):
        with pytest.raises(
            loraplus.NoLoraFactorsError, match=f"no LoRA factor.* this is an? {name} adapter: .*{trains}"
        ):
            loraplus.create_optimizer(wrapped, lr=1e-3)


def test_a_lora_adapter_that_is_frozen_is_told_so():
    model = peft.get_peft_model(tiny_bert(), peft.LoraConfig(r=2, target_modules=["query"]))
    model.requires_grad_(False)
    model.base_model.model.classifier.requires_grad_(True)
    with pytest.raises(loraplus.NoLoraFactorsError, match="all its LoRA factors are frozen; .*is_trainable=True"):
        loraplus.create_optimizer(model, lr=1e-3)


def test_a_model_without_an_adapter_is_told_to_add_one():
    assert cause(tiny_bert()) is None
    with pytest.raises(loraplus.NoLoraFactorsError, match="add an adapter"):
        loraplus.create_optimizer(tiny_bert(), lr=1e-3)
