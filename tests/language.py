"""A tiny Llama with a byte-level tokenizer and a chat template, and small data for it; nothing is downloaded."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

COLOURS = {"grass": "green", "snow": "white", "coal": "black", "blood": "red", "the sky": "blue"}
TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.index0 % 2 != (message['role'] == 'assistant') | int %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "<|{{ message['role'] }}|>{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def question(rng: random.Random, number: int) -> tuple[str, str]:
    thing = rng.choice(list(COLOURS))
    return f"what colour is {thing} number {number}?", f"{thing} is {COLOURS[thing]}."


def chat_rows(count: int = 200, seed: int = 0) -> list[dict]:
    rng, rows = random.Random(seed), []
    for i in range(count):
        messages = []
        for _ in range(rng.randint(1, 3)):
            asked, answer = question(rng, i)
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        rows.append({"messages": messages})
    return rows


def pair_rows(count: int = 200, seed: int = 0) -> list[dict]:
    rng = random.Random(seed)
    return [dict(zip(("prompt", "completion"), question(rng, i), strict=True)) for i in range(count)]


def text_rows(count: int = 200, seed: int = 0) -> list[dict]:
    rng = random.Random(seed)
    return [{"text": " ".join(question(rng, i)[1] for _ in range(rng.randint(1, 6))) + f" {i}"} for i in range(count)]


def write_lines(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tiny_tokenizer(positions: int = 128) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator([row["text"] for row in text_rows(50)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>", chat_template=TEMPLATE,
        model_max_length=positions,
    )  # fmt: skip


def tiny_llama(vocabulary: int = 320, positions: int = 128, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=positions, initializer_range=0.2, tie_word_embeddings=True,
        pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def save_decoder(folder: Path) -> Path:
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    tiny_llama(len(tokenizer)).save_pretrained(folder)
    return folder
