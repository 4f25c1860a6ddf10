"""The decoder of examples/decoder: its recipe, and its folder without the card."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, set_seed

from loraplus.errors import InputError
from loraplus.reproduce.pretraining import Pretrained, pretrain_into
from loraplus.reproduce.verses import pack, passage, read_chapters, train_tokenizer, training_texts

_WEIGHTS_FILE = "model.safetensors"


@dataclass(frozen=True)
class Recipe:
    """All that the decoder depends on, beside its text.

    Args:
        vocabulary: pieces of the tokenizer.
        hidden, layers, heads, intermediate: the Llama's shape; embeddings are tied.
        context: tokens of a training sequence, and what the model takes.
        batch: sequences a step.
        steps: of AdamW, `warmup` of them rising to `lr`, then along a cosine to 0.
        lr, warmup, weight_decay: the optimizer's.
        held_out_every: one chapter in so many is for validation.
        conversation_every: one chapter in so many is also read as a chat.
        evaluate_every: steps between validations.
        save_every: steps between checkpoints.
        seed: of the start and the order.
    """

    vocabulary: int = 4096
    hidden: int = 256
    layers: int = 4
    heads: int = 4
    intermediate: int = 688
    context: int = 256
    batch: int = 8
    steps: int = 1700
    lr: float = 2e-3
    warmup: int = 100
    weight_decay: float = 0.1
    held_out_every: int = 20
    conversation_every: int = 8
    evaluate_every: int = 200
    save_every: int = 50
    seed: int = 0


Describe = Callable[[Path, Pretrained, torch.Tensor], None]
"""Takes the decoder's folder, how its training went, and the held-out sequences (sequences, context)."""


def build(
    verses: str,
    output: Path,
    recipe: Recipe | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    describe: Describe = lambda folder, trained, held_out: None,
) -> None:
    """Pre-trains the decoder, or goes on where that was interrupted, and saves it in half precision.

    Args:
        verses: file of book, chapter, verse, text rows.
        output: folder to make, see `pretrain_into`.
        recipe: what to train, and how.
        callbacks: of Trainer, to show how far it is.
        describe: adds to the folder before it is put in place.

    Raises:
        InputError: the verses cannot be used, the output is there already, or checkpoints are of another recipe.
    """
    if output.exists():  # before minutes go by
        raise InputError(f"{output} exists; delete it to build the decoder again")
    recipe = recipe or Recipe()
    chapters = read_chapters(verses, recipe.held_out_every)
    texts = (verse for chapter in chapters.training for verse in chapter)
    tokenizer = train_tokenizer(texts, recipe.vocabulary, recipe.context)
    held_out = pack((passage(tokenizer, chapter) for chapter in chapters.held_out), recipe.context)
    training = pack(training_texts(tokenizer, chapters.training, recipe.conversation_every), recipe.context)

    def finish(folder: Path, trained: Pretrained) -> None:
        _save_in_half(folder)
        describe(folder, trained, held_out)

    pretrain_into(
        output,
        asdict(recipe),
        _fresh_model(recipe, tokenizer),
        tokenizer,
        _rows(training),
        _arguments(recipe),
        finish=finish,
        callbacks=callbacks,
        eval_dataset=_rows(held_out),
    )


def _fresh_model(recipe: Recipe, tokenizer: Any) -> LlamaForCausalLM:
    set_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        intermediate_size=recipe.intermediate,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def _arguments(recipe: Recipe) -> dict[str, Any]:
    return {
        "max_steps": recipe.steps,
        "per_device_train_batch_size": recipe.batch,
        "per_device_eval_batch_size": recipe.batch,
        "learning_rate": recipe.lr,
        "warmup_steps": recipe.warmup,
        "lr_scheduler_type": "cosine",
        "weight_decay": recipe.weight_decay,
        "adam_beta2": 0.95,
        "optim": "adamw_torch_fused",
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        "logging_steps": 25,
        "eval_strategy": "steps",
        "eval_steps": recipe.evaluate_every,
        "save_steps": recipe.save_every,
        "prediction_loss_only": True,
    }


def _rows(rows: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """Examples (length,) of token rows (sequences, length)."""
    return [{"input_ids": row, "labels": row} for row in rows]


def _save_in_half(folder: Path) -> None:
    """Halves the weights' file. The configuration still says float32, so the model loads in float32."""
    weights = load_file(folder / _WEIGHTS_FILE)
    halves = {name: tensor.to(torch.float16) for name, tensor in weights.items()}
    save_file(halves, folder / _WEIGHTS_FILE, metadata={"format": "pt"})
