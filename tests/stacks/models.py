"""Tiny models of the suite, built from configs, and a tokenizer; nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch
from conftest import NEGATIVE, NEUTRAL, POSITIVE, tiny_bert
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast, Qwen2Config

from stacks.contract import EXAMPLES

WORDS = [*POSITIVE, *NEGATIVE, *NEUTRAL]


class Tokens(Dataset):
    """Random token ids, and a label that can be read off them."""

    def __init__(self, count: int = EXAMPLES) -> None:
        self.ids = torch.randint(5, 64, (count, 12), generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = self.ids[index]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": int(ids.sum()) % 2}


def classifier(**options: Any) -> PeftModel:
    """A BERT with adapters on query and value, and a head (weight and bias) trained in full."""
    model = tiny_bert()
    torch.manual_seed(3)
    config = {"r": 4, "target_modules": ["query", "value"], "modules_to_save": ["classifier"], **options}
    return get_peft_model(model, LoraConfig(**config))


def language_model_config(**options: Any) -> Qwen2Config:
    return Qwen2Config(**{
        "vocab_size": len(WORDS) + 4, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2,
        "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None, **options,
    })  # fmt: skip


def lora(task: str = "CAUSAL_LM", **options: Any) -> LoraConfig:
    # Qwen's query and value have biases: trained beside A and B, they must keep A's rate and no decay.
    return LoraConfig(**{
        "task_type": task, "r": 4, "target_modules": ["q_proj", "v_proj"], "bias": "lora_only", **options
    })  # fmt: skip


def language_model(bias: str = "lora_only") -> PeftModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(language_model_config())
    torch.manual_seed(3)
    return get_peft_model(model, lora(bias=bias))


def reward_model() -> PeftModel:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(language_model_config(num_labels=1))
    torch.manual_seed(3)
    return get_peft_model(model, lora("SEQ_CLS", modules_to_save=["score"]))


def tokenizer() -> PreTrainedTokenizerFast:
    special = ["[PAD]", "[EOS]", "[UNK]", "[BOS]"]
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*special, *WORDS])}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", eos_token="[EOS]", unk_token="[UNK]", padding_side="left"
    )
