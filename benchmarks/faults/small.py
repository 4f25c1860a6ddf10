"""Models and data that train in a second."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import BertConfig, BertModel, BertTokenizerFast, LlamaConfig, LlamaForCausalLM

from loraplus.reproduce.verses import train_tokenizer

_FILMS = ("fine", "great", "dull", "poor")
_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{% generation %}{{ m.content + eos_token }}{% endgeneration %}{% endfor %}"
)


def texts(path: Path, count: int = 60) -> Path:
    """Labelled texts of several lengths, each a text of its own."""
    rows = [f"a {_FILMS[i % 4]} film{' indeed' * (i % 5)} {i},{'good' if i % 4 < 2 else 'bad'}" for i in range(count)]
    path.write_text("\n".join(["text,label", *rows]) + "\n")
    return path


def chats(path: Path, count: int = 60) -> Path:
    """Conversations of one question and its answer."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"is film {i} {_FILMS[i % 4]}?"},
                {"role": "assistant", "content": "yes"},
            ]
        }
        for i in range(count)
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def encoder(folder: Path) -> Path:
    """A BERT of two layers."""
    folder.mkdir()
    words = ["a", "film", "indeed", *_FILMS, *map(str, range(100))]
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]) + "\n")
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=32).save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(BertConfig(
        vocab_size=128, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=32,
    )).save_pretrained(folder)  # fmt: skip
    return folder


def llama(folder: Path) -> Path:
    """A Llama of one layer with a chat template."""
    tokenizer = train_tokenizer([f"is film {i} {_FILMS[i % 4]}? yes" for i in range(20)], 290, 48)
    tokenizer.chat_template = _TEMPLATE
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=48, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )).save_pretrained(folder)  # fmt: skip
    tokenizer.save_pretrained(folder)
    return folder
