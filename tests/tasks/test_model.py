"""Adapters on all kinds of classifiers: what is new in the head is trained, saved, and comes back."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers as t
from conftest import tiny_bert, tiny_config

from loraplus.errors import InputError
from loraplus.roles import Role, trainable_parameters
from loraplus.tasks.config import TrainConfig
from loraplus.tasks.model import load_classifier, without_dropout
from loraplus.tasks.predict import load_adapter
from loraplus.tasks.pretrained import load_tokenizer

SIZE = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
SMALL = {"vocab_size": 64, "max_position_embeddings": 40, "pad_token_id": 0, "eos_token_id": 3, "bos_token_id": 2}

# base model as it is saved → the modules of its head
MODELS = {
    "BERT": (lambda: tiny_bert().base_model, {"classifier"}),
    "BERT saved as a language model, so without a pooler": (
        lambda: t.BertForMaskedLM(tiny_config()), {"classifier", "bert.pooler"},
    ),
    "BERT with a head of another size": (lambda: tiny_bert(num_labels=5), {"classifier"}),
    "DistilBERT": (
        lambda: t.DistilBertModel(t.DistilBertConfig(vocab_size=64, dim=16, n_layers=1, n_heads=2, hidden_dim=32)),
        {"classifier", "pre_classifier"},
    ),
    "DeBERTa": (lambda: t.DebertaV2Model(t.DebertaV2Config(**SIZE, pooler_hidden_size=16)), {"classifier", "pooler"}),
    "ModernBERT": (
        lambda: t.ModernBertModel(t.ModernBertConfig(**SIZE, pad_token_id=0)), {"classifier", "head"},
    ),
    "MPNet": (lambda: t.MPNetModel(t.MPNetConfig(**SIZE, max_position_embeddings=40)), {"classifier"}),
    "ALBERT": (lambda: t.AlbertModel(t.AlbertConfig(**SIZE, embedding_size=8)), {"classifier"}),
    "XLNet": (
        lambda: t.XLNetModel(t.XLNetConfig(vocab_size=64, d_model=16, n_layer=1, n_head=2, d_inner=32)),
        {"sequence_summary", "logits_proj"},
    ),
    "BART": (
        lambda: t.BartModel(t.BartConfig(
            **SMALL, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
        )),
        {"classification_head"},
    ),
    "T5": (
        lambda: t.T5Model(t.T5Config(
            vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, eos_token_id=3, pad_token_id=0,
            decoder_start_token_id=0,
        )),
        {"classification_head"},
    ),
    "GPT-2": (
        lambda: t.GPT2LMHeadModel(t.GPT2Config(
            vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=40, eos_token_id=3, bos_token_id=2,
        )),
        {"score"},
    ),
}  # fmt: skip


def texts():
    return ["good great film [SEP]", "bad awful story [SEP]"]  # sequence-to-sequence models read off the last [SEP]


def logits(model, tokenizer):
    batch = tokenizer(texts(), add_special_tokens=False, return_tensors="pt", padding=True)
    with torch.no_grad():
        return model.eval()(**batch).logits


@pytest.mark.parametrize("name", MODELS)
def test_an_adapter_with_default_settings_comes_back_to_the_same_logits(tmp_path, folder_of, name):
    base, head = MODELS[name]
    config = TrainConfig(model=str(folder_of(base())), rank=2)
    tokenizer = load_tokenizer(config)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT's about fan_in_fan_out, say
        model = load_classifier(config, ["bad", "good"], tokenizer, seed=0)
    assert set(model.peft_config["default"].modules_to_save) >= head
    entries = trainable_parameters(model)
    assert {name for name, _ in model.named_parameters() if "lora_" in name and "modules_to_save" in name} == set()
    assert {module for module in head if any(f".{module}.modules_to_save." in e.name for e in entries)} == head
    assert all((entry.role is Role.HEAD) == ("modules_to_save" in entry.name) for entry in entries)
    with torch.no_grad():
        for entry in entries:
            entry.parameter.add_(torch.randn_like(entry.parameter), alpha=0.5)
    model.save_pretrained(tmp_path)
    model.config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for seed in (1, 2):
        torch.manual_seed(seed)
        again, its_tokenizer = load_adapter(str(tmp_path))
        torch.testing.assert_close(logits(again, its_tokenizer), logits(model, tokenizer))


@pytest.mark.parametrize("name", MODELS)
def test_a_model_without_dropout_trains_on_what_it_is_evaluated_on(folder_of, name):
    config = TrainConfig(model=str(folder_of(MODELS[name][0]())), rank=2, lora_dropout=0.5)
    tokenizer = load_tokenizer(config)
    model = load_classifier(config, ["bad", "good"], tokenizer, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # B is zero
                parameter.add_(torch.randn_like(parameter), alpha=0.5)
    without_dropout(model)
    batch = tokenizer(texts(), add_special_tokens=False, return_tensors="pt", padding=True)
    with torch.no_grad():
        torch.testing.assert_close(model.train()(**batch).logits, logits(model, tokenizer))


@pytest.mark.parametrize("target", ["classifier", "pre_classifier"])
def test_a_layer_of_the_head_is_no_target(folder_of, target):
    config = TrainConfig(model=str(folder_of(MODELS["DistilBERT"][0]())), target_modules=target)
    with pytest.raises(InputError, match="cannot put the adapter on"):
        load_classifier(config, ["bad", "good"], load_tokenizer(config), seed=0)
