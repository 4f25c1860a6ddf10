"""Machine seconds from a new task to the loss of tuned LoRA: one automatic run against a search.

    python benchmarks/new_task.py [TASK …] [--trials 20] [--output benchmarks/results/new-task.json]
    python benchmarks/new_task.py --table

The search is Optuna's TPE over the rate (1e-5 to 1e-2, on a log scale), each trial a run of PEFT + Trainer at its
defaults; its best validation loss is the loss of tuned LoRA. Beside it `loraplus train` is run once, with automatic
rates, on the same files, model, adapter, batch and steps, and evaluated at every tenth of its steps. Counted is
processor time on one thread, of everything but imports: data, model, training, evaluation. Trials are kept in --output
as they end, so that an interrupted search goes on.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "data"
RESULTS = ROOT / "benchmarks" / "results" / "new-task.json"
LOWEST, HIGHEST = 1e-5, 1e-2
HELD_OUT = 400


@dataclass(frozen=True)
class Task:
    """What is trained: a model, a domain of the rated snippets, and a length."""

    domain: str
    kind: str  # classification or lm
    model: Path
    steps: int
    batch: int
    targets: tuple[str, ...]


TASKS = {
    "reviews": Task("movies", "classification", DATA / "minilm-l6", 100, 16, ("query", "value")),
    "products": Task("products", "classification", DATA / "minilm-l6", 80, 16, ("query", "value")),
    "editorials": Task("editorials", "lm", DATA / "small-models" / "decoder-64", 300, 16, ("q_proj", "v_proj")),
}


def rows_of(task: Task) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(training rows, validation rows) of text and, for classes, label."""
    from loraplus.reproduce.small_tasks import domain_rows

    rows = [row for row in domain_rows(DATA, task.domain) if float(row["rating"])]
    unique = {row["text"]: "positive" if float(row["rating"]) > 0 else "negative" for row in rows}
    texts = sorted(unique)
    random.Random(0).shuffle(texts)
    made = [{"text": text, "label": unique[text]} if task.kind != "lm" else {"text": text} for text in texts]
    return made[HELD_OUT:], made[:HELD_OUT]


def written(task: Task, folder: Path) -> tuple[Path, Path]:
    """The rows as two CSV files."""
    paths = []
    for name, rows in zip(("train", "validation"), rows_of(task), strict=True):
        path = folder / f"{name}.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        paths.append(path)
    return paths[0], paths[1]


def automatic(task: Task, folder: Path) -> dict[str, Any]:
    """One run of `loraplus train`, without a word about rates."""
    from loraplus.tasks.config import TrainConfig
    from loraplus.tasks.train import train

    train_file, validation_file = written(task, folder)
    config = TrainConfig(
        task=task.kind, model=str(task.model), data=str(train_file), eval_data=str(validation_file),
        output=str(folder / "run"), target_modules=",".join(task.targets), rank=8, alpha=16.0, max_steps=task.steps,
        batch_size=task.batch, eval_steps=max(1, task.steps // 10), max_eval_samples=HELD_OUT, samples=0,
    )  # fmt: skip
    started = time.process_time()
    metrics = train(config)
    seconds = time.process_time() - started
    with (folder / "run" / "curves.csv").open(newline="") as file:
        curve = [(int(row["step"]), float(row["eval_loss"])) for row in csv.DictReader(file) if row["eval_loss"]]
    return {
        "seconds": seconds, "steps": task.steps, "loss": metrics["eval_loss"], "curve": curve, "lr": metrics["lr"],
        "lr_ratio": metrics["lr_ratio"],
    }  # fmt: skip


def trial(task: Task, lr: float) -> dict[str, float]:
    """One run of PEFT + Trainer at its defaults: AdamW, linear decay, padded batches."""
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorForLanguageModeling,
        DataCollatorWithPadding,
        PreTrainedTokenizerFast,
        Trainer,
        TrainingArguments,
        set_seed,
    )

    started = time.process_time()
    set_seed(0)
    lm = task.kind == "lm"
    if lm:
        model: Any = AutoModelForCausalLM.from_pretrained(task.model)
        tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(task.model)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(task.model, num_labels=2)
        tokenizer = AutoTokenizer.from_pretrained(task.model)
    kind: Any = "CAUSAL_LM" if lm else "SEQ_CLS"
    model = get_peft_model(model, LoraConfig(task_type=kind, r=8, lora_alpha=16, target_modules=list(task.targets)))

    def encoded(row: dict[str, Any]) -> dict[str, Any]:
        tokens = dict(tokenizer(row["text"], truncation=True, max_length=128))
        return tokens if lm else {**tokens, "labels": int(row["label"] == "positive")}

    tables = [Dataset.from_list(rows) for rows in rows_of(task)]
    parts = [rows.map(encoded, remove_columns=rows.column_names, keep_in_memory=True) for rows in tables]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, learning_rate=lr, max_steps=task.steps, per_device_train_batch_size=task.batch,
            per_device_eval_batch_size=64, report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True,
            logging_strategy="no",
        )  # fmt: skip
        collator = DataCollatorForLanguageModeling(tokenizer, mlm=False) if lm else DataCollatorWithPadding(tokenizer)
        trainer = Trainer(model, arguments, collator, train_dataset=parts[0], eval_dataset=parts[1])
        trainer.train()
        loss = trainer.evaluate()["eval_loss"]
    return {"lr": lr, "loss": loss if math.isfinite(loss) else math.inf, "seconds": time.process_time() - started}


def search(task: Task, trials: int, known: list[dict[str, float]], keep: Any) -> None:
    """The trials that are missing, proposed by TPE from those that there are."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
    range_of_rates = optuna.distributions.FloatDistribution(LOWEST, HIGHEST, log=True)
    for one in known:
        study.add_trial(
            optuna.trial.create_trial(params={"lr": one["lr"]}, distributions={"lr": range_of_rates}, value=one["loss"])
        )
    while len(known) < trials:
        asked = study.ask({"lr": range_of_rates})
        known.append(trial(task, asked.params["lr"]))
        study.tell(asked, known[-1]["loss"])
        keep()


def table(results: dict[str, Any]) -> None:
    """Prints both sides of each task."""
    print("| task | trials, seconds | loss of tuned LoRA | automatic: loss | seconds to tuned loss | of the search |")
    print("|---|---|---|---|---|---|")
    for name, one in results.items():
        trials, auto = one["search"], one.get("auto")
        if not trials or auto is None:
            continue
        best = min(row["loss"] for row in trials)
        total = sum(row["seconds"] for row in trials)
        reached = next((step for step, loss in auto["curve"] if loss <= best), None)
        if reached is None:
            when, part = f"not reached ({100 * (auto['loss'] / best - 1):.1f}% above)", "–"
        else:
            seconds = auto["seconds"] * reached / auto["steps"]
            when, part = f"{seconds:.0f}", f"1/{total / seconds:.1f}"
        print(f"| {name} | {len(trials)}, {total:.0f} | {best:.4f} | {auto['loss']:.4f} | {when} | {part} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", default=list(TASKS))
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    results: dict[str, Any] = json.loads(options.output.read_text()) if options.output.exists() else {}
    if options.table:
        return table(results)
    import torch
    from datasets.utils.logging import disable_progress_bar
    from transformers.utils import logging

    torch.set_num_threads(1)
    disable_progress_bar()
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    def keep() -> None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        part = options.output.with_name(f"{options.output.name}.part")
        part.write_text(json.dumps(results, indent=1) + "\n")
        part.replace(options.output)

    for name in options.tasks:
        one = results.setdefault(name, {"search": []})
        if "auto" not in one:
            with tempfile.TemporaryDirectory() as folder:
                one["auto"] = automatic(TASKS[name], Path(folder))
            keep()
        search(TASKS[name], options.trials, one["search"], keep)
    return table(results)


if __name__ == "__main__":
    main()
