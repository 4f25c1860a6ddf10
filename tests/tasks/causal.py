"""A tiny Llama with a real tokenizer, for tests of language models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from loraplus.reproduce.verses import train_tokenizer

SENTENCES = (
    "the light was good and the darkness was upon the waters",
    "and it was so, and the evening and the morning were one day",
    "the heavens and the earth were finished, and all the host of them",
)


def tiny_tokenizer(context: int = 48) -> Any:
    return train_tokenizer(SENTENCES, 300, context)


def tiny_llama(*, seed: int = 0, hidden: int = 16, context: int = 48, vocabulary: int = 300, **options: Any) -> Any:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{
        "vocab_size": vocabulary, "hidden_size": hidden, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 24, "max_position_embeddings": context, "tie_word_embeddings": True, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3, **options,
    })).eval()  # fmt: skip


def tiny_gpt2(*, context: int = 48, vocabulary: int = 300) -> Any:
    """Positions out of a table, which ends; layers that keep W the other way round."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=vocabulary, n_embd=16, n_layer=2, n_head=2, n_positions=context, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, initializer_range=0.3,
    )).eval()  # fmt: skip


def save_llama(folder: Path, **options: Any) -> Path:
    tokenizer = tiny_tokenizer()
    tiny_llama(vocabulary=len(tokenizer), **options).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def adapter_on(base: Path, folder: Path, *, scale: float = 0.3, tokenizer: bool = True, **options: Any) -> Path:
    """An adapter whose every weight is away from where it started."""
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(1)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **{"r": 2, **options}))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * scale)
    adapted.save_pretrained(folder)
    if tokenizer:
        tiny_tokenizer().save_pretrained(folder)
    return folder
