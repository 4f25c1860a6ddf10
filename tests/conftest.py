"""Small real models and data that every test can use; nothing is downloaded."""

from __future__ import annotations

import gc
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from language import save_decoder
from matrix import (  # noqa: F401  (hooks: how work is shared out, and what ran, as a table)
    pytest_runtest_logreport,
    pytest_runtest_setup,
    pytest_terminal_summary,
    pytest_xdist_make_scheduler,
)
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast, PreTrainedModel

torch.set_num_threads(1)

POSITIVE = "good great lovely fine happy bright warm clever".split()
NEGATIVE = "bad awful dull sad poor cold weak boring".split()
NEUTRAL = "the a film plot actor scene music story was is very quite".split()


def tiny_config(**options: Any) -> BertConfig:
    return BertConfig(**{
        "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
        "max_position_embeddings": 32, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.2,  # frozen random features that a small adapter can learn from
        **options,
    })  # fmt: skip


def tiny_bert(num_labels: int = 2, seed: int = 0) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    return BertForSequenceClassification(tiny_config(num_labels=num_labels))


def review(rng: random.Random, label: str) -> str:
    words = [rng.choice(NEUTRAL) for _ in range(rng.randint(2, 8))]
    words += [rng.choice(POSITIVE if label == "positive" else NEGATIVE) for _ in range(2)]
    rng.shuffle(words)
    return " ".join(words)


@pytest.fixture(scope="session", autouse=True)
def _imports_are_no_garbage() -> None:
    """Trainer collects garbage before every run; looking through all that is imported takes longer than most tests."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with its tokenizer, as a model folder."""
    folder = tmp_path_factory.mktemp("model")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *POSITIVE, *NEGATIVE, *NEUTRAL]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=32)
    tokenizer.save_pretrained(folder)
    tiny_bert().base_model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def folder_of(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[PreTrainedModel], Path]:
    """Saves any model as a folder, with the tokenizer of `model_folder`."""

    def save(model: PreTrainedModel) -> Path:
        folder = tmp_path_factory.mktemp(type(model).__name__)
        model.save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
            shutil.copy(model_folder / name, folder)
        return folder

    return save


@pytest.fixture(scope="session")
def reviews_csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 made-up reviews whose label can be read off their words."""
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("data") / "reviews.csv"
    rows = ["text,label"]
    for index in range(400):
        label = "positive" if index % 2 else "negative"
        rows.append(f"{review(rng, label)} {index % 7},{label}")
    path.write_text("\n".join(rows) + "\n")
    return path


@pytest.fixture(scope="session")
def decoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a byte-level tokenizer and a chat template that marks assistant turns."""
    return save_decoder(tmp_path_factory.mktemp("decoder"))
