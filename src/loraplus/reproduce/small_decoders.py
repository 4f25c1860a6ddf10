"""A family of small decoders, pre-trained here at several widths; cached under data/small-models.

Llama-shaped, 4 layers, trained for a few minutes on Bible verses, product reviews and tweets; movie reviews and
editorials are left for fine-tuning. One tokenizer (byte-level BPE, 2,048 pieces) serves all of them. The widest is no
member of the family: it is the decoder of examples/decoder, trained longer, on verses alone, with pieces of its own.

    python -m loraplus.reproduce.small_decoders data 32 64 128
"""

from __future__ import annotations

import math
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from loraplus.files.output import hold_output
from loraplus.reproduce import assets
from loraplus.reproduce.pretraining import ProgressLines, pretrain_into
from loraplus.reproduce.verse_decoder import build

VOCABULARY = 2048
LAYERS = 4
LENGTH = 32
STEPS = 2000
BATCH = 32
LR = {32: 4e-3, 64: 3e-3, 128: 2e-3}
WIDEST = 256
"""Width of the decoder that `make decoder` puts into data/decoder."""
SPECIAL = ["<pad>", "<s>", "</s>", "<mask>", "<unk>"]


def texts(data: Path, everything: bool = False) -> list[str]:
    """What the decoders are pre-trained on; with `everything`, what the tokenizer is."""
    verses = [row["text"] for row in assets.table("verses", data)]
    rows = assets.table("rated-snippets", data)
    return verses + [row["text"] for row in rows if everything or row["domain"] in ("products", "tweets")]


def tokenizer(data: Path, width: int) -> PreTrainedTokenizerFast:
    """That of the decoder of a width; trained now unless it is there."""
    if width == WIDEST:
        return PreTrainedTokenizerFast.from_pretrained(obtain(data, width))
    with _alone(data):
        return _family_tokenizer(data)


def _family_tokenizer(data: Path) -> PreTrainedTokenizerFast:
    folder = data / "small-models" / "tokenizer"
    if not (folder / "tokenizer.json").is_file():
        bpe = ByteLevelBPETokenizer(lowercase=True)
        bpe.train_from_iterator(texts(data, everything=True), VOCABULARY, special_tokens=SPECIAL, show_progress=False)
        made = PreTrainedTokenizerFast(
            tokenizer_object=bpe._tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", cls_token="<s>",
            mask_token="<mask>", unk_token="<unk>", model_max_length=LENGTH,
        )  # fmt: skip
        made.save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def token_ids(tok: PreTrainedTokenizerFast, lines: list[str], length: int) -> list[list[int]]:
    """<s> text </s>, cut to `length`."""
    encoded: Any = tok(lines, add_special_tokens=False, truncation=True, max_length=length - 2)["input_ids"]
    start, end = _id(tok.bos_token_id), _id(tok.eos_token_id)
    return [[start, *ids, end] for ids in encoded]


def _id(token: Any) -> int:
    """A special token's number; its type in transformers allows for much else."""
    return int(token)


def padded(rows: list[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, attention mask), as long as the longest row."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        mask[i, : len(row)] = 1
    return ids, mask


def _fresh(width: int) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=LAYERS, num_attention_heads=width // 32,
        intermediate_size=int(8 * width / 3 / 32) * 32, max_position_embeddings=64, tie_word_embeddings=True,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, use_cache=False,
    ))  # fmt: skip


def folder_of(data: Path, width: int) -> Path:
    """Where the decoder of a width is, or will be."""
    return data / "decoder" if width == WIDEST else data / "small-models" / f"decoder-{width}"


def obtain(data: Path, width: int) -> Path:
    """The folder of the decoder of a width, pre-trained now unless it is there; other processes wait meanwhile."""
    folder = folder_of(data, width)
    with _alone(data):
        if not folder.exists():
            if width == WIDEST:
                build(str(assets.obtain("verses", data)), folder)
            else:
                _pretrain(data, width, folder)
    return folder


def _alone(data: Path) -> AbstractContextManager[None]:
    return hold_output(data / "small-models", wait=True)


def _pretrain(data: Path, width: int, folder: Path) -> None:
    tok = _family_tokenizer(data)
    torch.manual_seed(0)
    model = _fresh(width)
    rows = token_ids(tok, texts(data), LENGTH)
    order = torch.randint(len(rows), (STEPS * BATCH,)).tolist()  # drawn with replacement
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR[width], weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / STEPS))
    )

    def batch_of(chosen: list[list[int]]) -> dict[str, torch.Tensor]:  # each (examples, longest)
        ids, mask = padded(chosen, _id(tok.pad_token_id))
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}

    pretrain_into(
        folder,
        {"width": width, "steps": STEPS, "batch": BATCH, "lr": LR[width]},
        model,
        tok,
        [rows[index] for index in order],
        {
            "max_steps": STEPS,
            "per_device_train_batch_size": BATCH,
            "train_sampling_strategy": "sequential",
            "max_grad_norm": 0.0,
            "logging_steps": 500,
            "save_steps": 500,
            "use_cpu": True,
            "remove_unused_columns": False,
        },
        callbacks=[ProgressLines()],
        mean_of_batch=True,
        data_collator=batch_of,
        optimizers=(optimizer, schedule),
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    for wanted in sys.argv[2:]:
        print(obtain(Path(sys.argv[1]), int(wanted)))
