"""Pre-trains the decoder: one recipe, transformers' Trainer, checkpoints to go on from."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)  # fmt: skip
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from loraplus.errors import InputError
from loraplus.files.output import data_changes, read_json, write_json
from loraplus.tasks.decoder.text import Chapters, pack, passage, training_texts

_RECIPE_FILE = "recipe.json"
_SECONDS_FILE = "seconds.json"


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


@dataclass(frozen=True)
class Pretrained:
    """The model, its losses by step, the held-out sequences, and the seconds it took by the clock and of the CPU."""

    model: LlamaForCausalLM
    curve: list[dict[str, float]]
    held_out: torch.Tensor
    seconds: dict[str, float]


class _Seconds(TrainerCallback):
    """Keeps the time spent beside the checkpoints, so that what was spent before an interruption counts."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._before = read_json(path) if path.exists() else {"clock": 0.0, "cpu": 0.0}
        self._started = time.monotonic(), time.process_time()

    @property
    def total(self) -> dict[str, float]:
        clock, cpu = self._started
        return {"clock": self._before["clock"] + time.monotonic() - clock,
                "cpu": self._before["cpu"] + time.process_time() - cpu}  # fmt: skip

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        write_json(self._path, self.total)


def fresh_model(recipe: Recipe, tokenizer: Any) -> LlamaForCausalLM:
    """The decoder before training."""
    set_seed(recipe.seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=recipe.hidden, num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads, intermediate_size=recipe.intermediate,
        max_position_embeddings=recipe.context, tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    ))  # fmt: skip


def pretrain(
    recipe: Recipe, chapters: Chapters, tokenizer: PreTrainedTokenizerFast, work: Path,
    callbacks: Sequence[TrainerCallback] = (),
) -> Pretrained:  # fmt: skip
    """Trains, or goes on from the last checkpoint in `work`.

    Args:
        recipe: what to train, and how.
        chapters: from `read_chapters`.
        tokenizer: from `train_tokenizer`.
        work: folder of the checkpoints; `clear` removes it.
        callbacks: of Trainer, to show how far it is.

    Returns:
        The trained model in single precision, and how it went.

    Raises:
        InputError: `work` holds checkpoints of another recipe.
    """
    _note_recipe(work, recipe)
    held_out = pack((passage(tokenizer, chapter) for chapter in chapters.held_out), recipe.context)
    training = pack(training_texts(tokenizer, chapters.training, recipe.conversation_every), recipe.context)
    seconds = _Seconds(work / _SECONDS_FILE)
    last = get_last_checkpoint(str(work))
    done = TrainerState.load_from_json(str(Path(last) / TRAINER_STATE_NAME)) if last else TrainerState()
    if last and done.global_step >= recipe.steps:  # interrupted after its last step; Trainer would add one
        model = LlamaForCausalLM.from_pretrained(last)
        return Pretrained(model.eval(), _curve(done.log_history), held_out, seconds.total)
    trainer = Trainer(
        fresh_model(recipe, tokenizer), _arguments(recipe, work, starts=last is None), train_dataset=_rows(training),
        eval_dataset=_rows(held_out), callbacks=[seconds, *callbacks],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=last)
    return Pretrained(trainer.model.eval(), _curve(trainer.state.log_history), held_out, seconds.total)  # type: ignore


def clear(work: Path) -> None:
    """Removes the checkpoints once their outcome is saved."""
    shutil.rmtree(work)


@torch.inference_mode()
def held_out_loss(model: Any, rows: torch.Tensor, batch: int = 8) -> float:
    """Mean cross-entropy in nats a token, in the precision the model is in."""
    losses = [
        float(model(input_ids=part, labels=part).loss) * len(part)
        for part in rows.to(model.device).split(batch)
    ]  # fmt: skip
    return sum(losses) / len(rows)


def _note_recipe(work: Path, recipe: Recipe) -> None:
    work.mkdir(parents=True, exist_ok=True)
    noted = work / _RECIPE_FILE
    if not noted.exists():
        write_json(noted, asdict(recipe))
    elif changes := data_changes(read_json(noted), asdict(recipe)):
        raise InputError(f"{work} holds checkpoints of another recipe ({changes}); delete it to start again")


def _arguments(recipe: Recipe, work: Path, *, starts: bool) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(work), max_steps=recipe.steps, per_device_train_batch_size=recipe.batch,
        per_device_eval_batch_size=recipe.batch, learning_rate=recipe.lr, warmup_steps=recipe.warmup,
        lr_scheduler_type="cosine", weight_decay=recipe.weight_decay, adam_beta2=0.95, optim="adamw_torch_fused",
        seed=recipe.seed, data_seed=recipe.seed, logging_steps=25, eval_strategy="steps",
        eval_steps=recipe.evaluate_every, eval_on_start=starts, save_strategy="steps", save_steps=recipe.save_every,
        save_total_limit=1, report_to="none", disable_tqdm=not sys.stderr.isatty(), dataloader_pin_memory=False,
        prediction_loss_only=True,
    )  # fmt: skip


def _rows(rows: torch.Tensor) -> Any:
    return [{"input_ids": row, "labels": row} for row in rows]


def _curve(history: list[dict[str, float]]) -> list[dict[str, float]]:
    """Trainer's log as one row a step."""
    rows: dict[float, dict[str, float]] = {}
    for entry in history:
        kept = {key: entry[key] for key in ("loss", "eval_loss") if key in entry}
        if kept:
            rows.setdefault(entry["step"], {"step": entry["step"]}).update(kept)
    return [rows[step] for step in sorted(rows)]
