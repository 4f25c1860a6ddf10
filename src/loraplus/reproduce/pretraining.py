"""Pre-trains a small decoder on transformers' Trainer; an interrupted one goes on from its last checkpoint."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import (
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from loraplus.errors import InputError
from loraplus.files.output import data_changes, hold_output
from loraplus.files.single import read_json, write_json

_RECIPE_FILE = "recipe.json"
_SECONDS_FILE = "seconds.json"
_MODEL_FOLDER = "folder"


@dataclass(frozen=True)
class Pretrained:
    """The model in single precision, its losses by step, and the seconds it took by the clock and of the CPU."""

    model: LlamaForCausalLM
    curve: list[dict[str, float]]
    seconds: dict[str, float]


class ProgressLines(TrainerCallback):
    """A line for every report of a loss, with the time left; on a terminal Trainer shows a bar under them."""

    def __init__(self) -> None:
        self._started, self._first_step = time.monotonic(), 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        self._started, self._first_step = time.monotonic(), state.global_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: object,
    ) -> None:
        known = {"loss": "loss", "eval_loss": "validation loss"}
        parts = [f"{known[key]} {value:.4f}" for key, value in (logs or {}).items() if key in known]
        done = state.global_step - self._first_step
        if parts and done > 0:
            left = (time.monotonic() - self._started) / done * (state.max_steps - state.global_step)
            parts.append(f"about {left / 60:.0f} min left")
        if parts:
            print(f"step {state.global_step}/{state.max_steps}", *parts, sep=" · ", flush=True)


class _Seconds(TrainerCallback):
    """Keeps the time spent beside the checkpoints, so that what was spent before an interruption counts."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._before = read_json(path) if path.exists() else {"clock": 0.0, "cpu": 0.0}
        self._started = {"clock": time.monotonic(), "cpu": time.process_time()}

    @property
    def total(self) -> dict[str, float]:
        now = {"clock": time.monotonic(), "cpu": time.process_time()}
        return {name: self._before[name] + now[name] - self._started[name] for name in now}

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        write_json(self._path, self.total)


def pretrain_into(
    output: Path,
    recipe: Mapping[str, Any],
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    rows: Sequence[Mapping[str, Any]],
    arguments: Mapping[str, Any],
    *,
    finish: Callable[[Path, Pretrained], None] = lambda folder, trained: None,
    callbacks: Sequence[TrainerCallback] = (),
    mean_of_batch: bool = False,
    **trainer_options: object,
) -> None:
    """Pre-trains a model, or goes on with it, and makes its folder.

    Args:
        output: folder to make. Until it is whole, checkpoints lie beside it in a folder that ends in `.training`.
        recipe: all that the outcome depends on, in JSON's types.
        model: before training; changed in place.
        tokenizer: saved beside it.
        rows: training sequences, {"input_ids", "labels"} as the collator takes them.
        arguments: of TrainingArguments; `max_steps` must be among them.
        finish: takes the model's folder before it is put in place, and how training went.
        callbacks: of Trainer, to show how far it is.
        mean_of_batch: the loss is the model's own mean over a batch's targets. Trainer's divides by all labelled tokens
            of a batch, and so counts each row's first token, which nothing predicts.
        **trainer_options: of Trainer: validation data, a collator, an optimizer.

    Raises:
        InputError: the output is there already, or checkpoints beside it are of another recipe.
    """
    if output.exists():
        raise InputError(f"{output} exists; delete it to build the decoder again")
    work = output.with_name(output.name + ".training")
    with hold_output(work):
        _note_recipe(work, recipe)
        trained = _pretrain(work, model, rows, arguments, callbacks, mean_of_batch, trainer_options)
        folder = work / _MODEL_FOLDER
        shutil.rmtree(folder, ignore_errors=True)
        tokenizer.save_pretrained(folder)
        trained.model.save_pretrained(folder)
        finish(folder, trained)
        folder.rename(output)
        shutil.rmtree(work)


def _pretrain(
    work: Path,
    model: LlamaForCausalLM,
    rows: Sequence[Mapping[str, Any]],
    arguments: Mapping[str, Any],
    callbacks: Sequence[TrainerCallback],
    mean_of_batch: bool,
    trainer_options: dict[str, Any],
) -> Pretrained:
    seconds = _Seconds(work / _SECONDS_FILE)
    last = get_last_checkpoint(str(work))
    done = TrainerState.load_from_json(str(Path(last) / TRAINER_STATE_NAME)) if last else TrainerState()
    if last and done.global_step >= arguments["max_steps"]:  # interrupted after its last step; Trainer would add one
        model = LlamaForCausalLM.from_pretrained(last)
        return Pretrained(model.eval(), _curve(done.log_history), seconds.total)
    args = TrainingArguments(
        output_dir=str(work),
        save_strategy="steps",
        save_total_limit=1,
        report_to="none",
        disable_tqdm=not sys.stderr.isatty(),
        dataloader_pin_memory=False,
        **{**arguments, "eval_on_start": last is None and "eval_dataset" in trainer_options},
    )
    data: Any = rows
    trainer = Trainer(model, args, train_dataset=data, callbacks=[seconds, *callbacks], **trainer_options)
    trainer.remove_callback(PrinterCallback)
    if mean_of_batch:
        trainer.model_accepts_loss_kwargs = False
    trainer.train(resume_from_checkpoint=last)
    return Pretrained(model.eval(), _curve(trainer.state.log_history), seconds.total)


def _note_recipe(work: Path, recipe: Mapping[str, Any]) -> None:
    noted = work / _RECIPE_FILE
    if not noted.exists():
        write_json(noted, recipe)
    elif changes := data_changes(read_json(noted), recipe):
        raise InputError(f"{work} holds checkpoints of another recipe ({changes}); delete it to start again")


def _curve(history: list[dict[str, float]]) -> list[dict[str, float]]:
    """Trainer's log as one row a step."""
    rows: dict[float, dict[str, float]] = {}
    for entry in history:
        kept = {key: entry[key] for key in ("loss", "eval_loss") if key in entry}
        if kept:
            rows.setdefault(entry["step"], {"step": entry["step"]}).update(kept)
    return [rows[step] for step in sorted(rows)]
