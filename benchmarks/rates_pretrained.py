"""The small T5 and the small vision transformer of the rates benchmark, pre-trained here and kept under data."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import T5Config, T5ForConditionalGeneration, ViTConfig, ViTForImageClassification

from loraplus.files.output import hold_output
from loraplus.reproduce import small_decoders

STEPS, BATCH = 1500, 32
GAPS = 1 / 3  # of the words
NOISE = 0.35  # of pictures, whose values lie between 0 and 1


def kept(data: Path, name: str, build: Callable[[], Any]) -> Path:
    """The folder of a model, which is built now unless it is there; other processes wait meanwhile."""
    folder = data / "small-models" / name
    with hold_output(data / "small-models", wait=True):
        if not folder.exists():
            build().save_pretrained(folder.with_name(f"{name}.new"))
            folder.with_name(f"{name}.new").rename(folder)
    return folder


def trained(model: Any, loss: Callable[[int], torch.Tensor], lr: float) -> Any:
    """The model after STEPS steps of AdamW with a one-cycle schedule; `loss` is given the number of the step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=STEPS, pct_start=0.05)
    for step in range(STEPS):
        loss(step).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


def with_gaps(tok: Any, text: str, number: int) -> tuple[list[int], list[int]]:
    """(token ids of a text that lacks a third of its words, token ids of all of it)."""
    drawn = random.Random(number)
    words = text.split()
    left = [word for word in words if drawn.random() > GAPS] or words[:1]
    given, whole = small_decoders.token_ids(tok, [" ".join(left), text], small_decoders.LENGTH)
    return given, whole[1:]


def t5(data: Path) -> tuple[Path, Any]:
    """A T5 of width 64 that restores verses, product reviews and tweets; and its tokenizer."""
    tok = small_decoders.tokenizer(data, 64)

    def build() -> Any:
        torch.manual_seed(0)
        model = T5ForConditionalGeneration(T5Config(
            vocab_size=small_decoders.VOCABULARY, d_model=64, d_kv=16, d_ff=256, num_layers=2, num_heads=4,
            dropout_rate=0.0, decoder_start_token_id=1, pad_token_id=0, eos_token_id=2,
        ))  # fmt: skip
        texts = small_decoders.texts(data)
        chosen = torch.randint(len(texts), (STEPS * BATCH,)).tolist()

        def loss(step: int) -> torch.Tensor:
            numbers = chosen[step * BATCH : (step + 1) * BATCH]
            rows = [with_gaps(tok, texts[i], step * BATCH + k) for k, i in enumerate(numbers)]
            ids, mask = small_decoders.padded([row[0] for row in rows], 0)
            labels = small_decoders.padded([row[1] for row in rows], -100)[0]
            return model(input_ids=ids, attention_mask=mask, labels=labels).loss

        return trained(model, loss, 3e-3)

    return kept(data, "t5-64", build), tok


def digit_rows(first: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy pictures (count, 1, 8, 8) of five digits from `first` on, and their places among the five (count)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    labels = torch.tensor(digits.target) - first
    wanted = (labels >= 0) & (labels < 5)
    pictures = torch.tensor(digits.images, dtype=torch.float32)[wanted, None] / 16
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(first))
    return pictures + NOISE * noise, labels[wanted]


def vit(data: Path) -> Path:
    """A vision transformer of width 64 that tells the digits 0 to 4 apart."""

    def build() -> Any:
        torch.manual_seed(0)
        model = ViTForImageClassification(ViTConfig(
            hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128, image_size=8,
            patch_size=2, num_channels=1, num_labels=5,
        ))  # fmt: skip
        pictures, labels = digit_rows(first=0)
        chosen = torch.randint(len(labels), (STEPS, BATCH))

        def loss(step: int) -> torch.Tensor:
            logits = model(pixel_values=pictures[chosen[step]]).logits
            return torch.nn.functional.cross_entropy(logits, labels[chosen[step]])

        return trained(model, loss, 1e-3)

    return kept(data, "vit-digits", build)
