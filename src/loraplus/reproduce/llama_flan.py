"""Llama-7b tuned on a part of Flan-v2, evaluated on MMLU: the published grid as a configuration.

Training is TRL's SFTTrainer with the loss on the answers only; `loraplus.attach` gives it the rates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, TaskType
from transformers import set_seed

import loraplus
from loraplus.errors import DivergedError, InputError
from loraplus.files.paths import user_path
from loraplus.files.scratch import scratch_folder
from loraplus.rates import Rates
from loraplus.reproduce import mmlu
from loraplus.reproduce.descriptions import DESCRIPTIONS
from loraplus.reproduce.glue import files_of, in_folder_or_hub
from loraplus.reproduce.llama_mnli import MODEL
from loraplus.reproduce.rate_grid import RateGrid
from loraplus.study.records import CurvePoint, Record, Run
from loraplus.study.worker import OnStep
from loraplus.tasks.callbacks import DivergenceGuard, StepClock
from loraplus.tasks.config import TaskConfig
from loraplus.tasks.pretrained import load_decoder, load_tokenizer
from loraplus.tasks.table import read_table

_COLUMNS = (("prompt", "completion"), ("inputs", "targets"))
FLAN = "flan-v2"


@dataclass(frozen=True)
class LlamaFlan(RateGrid):
    """The grid of the MNLI experiment, on Flan-v2.

    Args:
        rank, alpha: of the adapter.
        shots: solved examples in a prompt of MMLU.
        max_length: tokens that a text is cut to.
        max_steps: fewer than one epoch, for a trial.
    """

    rank: int = 8
    alpha: float = 8.0
    shots: int = 5
    max_length: int = 1024
    max_steps: int | None = None

    name = "llama-flan"
    title, claims, scales = DESCRIPTIONS[name]
    main_value = "test_accuracy"
    packages = ("matplotlib", "trl")
    unknown = (
        "Not known to us: which part of Flan-v2 and how large, rank and α (here 8 and 8), the grid (here that of "
        "MNLI), text length, batch and epochs (here 1024 tokens, 8 × 4, one epoch), how many solved examples MMLU's "
        "prompts hold (here 5).",
    )

    def settings(self) -> dict[str, Any]:
        return super().settings() | {
            "model": MODEL, "task": FLAN, "target_modules": "all-linear", "batch_size": 32, "epochs": 1,
            "gradient_accumulation_steps": 4, "lr_scheduler_type": "constant", "weight_decay": 0.0, "beta2": 0.999,
        }  # fmt: skip

    def sources(self) -> list[str]:
        return [
            f"{MODEL}: in {self.data}/llama-7b, else from the hub",
            f"Flan-v2: {self.data}/{FLAN}/train*.parquet, .jsonl or .csv with columns inputs and targets, or prompt "
            "and completion",
            f"MMLU: {self.data}/mmlu/test* and dev*, else {mmlu.HUB_NAME} from the hub",
        ]

    def check(self) -> None:
        """The part of Flan-v2 is not known by a name on the hub, so it must be there; the rest may be on the hub."""
        flan_rows(self.data)
        load_tokenizer(TaskConfig(model=in_folder_or_hub(self.data, MODEL)))
        for split in ("test", "dev"):
            mmlu.questions(in_folder_or_hub(self.data, mmlu.HUB_NAME), split)

    def train(self, lr: float, lr_ratio: float, seed: int, on_step: OnStep) -> Record:
        from datasets import Dataset
        from trl.trainer.sft_config import SFTConfig
        from trl.trainer.sft_trainer import SFTTrainer

        source = in_folder_or_hub(self.data, mmlu.HUB_NAME)
        asked, solved = mmlu.questions(source, "test"), mmlu.questions(source, "dev")
        folder = in_folder_or_hub(self.data, MODEL)
        tokenizer = load_tokenizer(TaskConfig(model=folder))
        set_seed(seed)
        model = load_decoder(folder)
        gpu = torch.cuda.is_available()
        with scratch_folder() as scratch:
            args = SFTConfig(
                scratch, learning_rate=lr, per_device_train_batch_size=8, gradient_accumulation_steps=4,
                num_train_epochs=1, max_steps=self.max_steps or -1, lr_scheduler_type="constant", weight_decay=0.0,
                max_length=min(self.max_length, tokenizer.model_max_length), completion_only_loss=True, seed=seed,
                bf16=gpu, use_cpu=not torch.accelerator.is_available(), gradient_checkpointing=gpu,
                save_strategy="no", logging_steps=10, logging_nan_inf_filter=False, report_to=[], disable_tqdm=True,
            )  # fmt: skip
            lora = LoraConfig(
                task_type=TaskType.CAUSAL_LM,
                r=self.rank,
                lora_alpha=self.alpha,  # type: ignore[arg-type]
                target_modules="all-linear",
            )
            trainer = SFTTrainer(
                model, args=args, train_dataset=Dataset.from_dict(flan_rows(self.data)), processing_class=tokenizer,
                peft_config=lora, callbacks=[StepClock(on_step), DivergenceGuard(Rates(lr, lr_ratio))],
            )  # fmt: skip
            try:
                loraplus.attach(trainer, lr_ratio=lr_ratio).train()
            except DivergedError:
                return Record(Run({}), "diverged")
        losses = tuple(CurvePoint(int(row["step"]), row["loss"]) for row in trainer.state.log_history if "loss" in row)
        accuracy = mmlu.accuracy(trainer.model, tokenizer, asked, solved, self.shots)
        return Record(Run({}), "done", curve=losses, values={"test_accuracy": accuracy})


def flan_rows(data: str) -> dict[str, list[str]]:
    """{"prompt": …, "completion": …} of all files of the Flan-v2 part.

    Raises:
        InputError: there is none, or its columns are others.
    """
    folder = user_path(data) / FLAN
    rows: dict[str, list[str]] = {"prompt": [], "completion": []}
    for file in files_of(folder, "train"):
        columns = read_table(str(file)).columns
        names = next((names for names in _COLUMNS if set(names) <= set(columns)), None)
        if names is None:
            raise InputError(f"{file} has the columns {', '.join(columns)}; expected inputs and targets")
        rows["prompt"] += [f"{text}\n" for text in columns[names[0]]]
        rows["completion"] += map(str, columns[names[1]])
    return rows
