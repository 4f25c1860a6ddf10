"""Machine seconds from a new task to the loss of tuned LoRA: one automatic run against a search.

    python benchmarks/new_task.py [TASK …] [--trials 20] [--output benchmarks/results/new-task.json]
    python benchmarks/new_task.py --table

The search is Optuna's TPE over the rate (1e-5 to 1e-2, on a log scale), each trial a run of PEFT + Trainer at its
defaults on texts that are encoded once; its best validation loss is the loss of tuned LoRA. Beside it `loraplus
train` is run once, with automatic rates, on the same texts, model, adapter, batch and steps, and evaluated at every
tenth of its steps; the seconds are those at which an evaluation first ends at or below that loss. The best of twenty
runs is lucky on its seed, so the best rate and the automatic run are trained on two other seeds as well; the seconds of
those runs are not counted. Counted is processor time on one thread: data, model, training, evaluation. Both sides are
judged by the mean cross-entropy of the same 400 texts, `train` at its best evaluation, whose weights it keeps, a trial
at its end. Trials are kept in --output as they end, so that an interrupted search goes on.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "data"
RESULTS = ROOT / "benchmarks" / "results" / "new-task.json"
LOWEST, HIGHEST = 1e-5, 1e-2
HELD_OUT = 400
OTHER_SEEDS = (1, 2)


@dataclass(frozen=True)
class Task:
    """A domain of the rated snippets (is the rating above 0?), and a length."""

    domain: str
    steps: int
    batch: int


MODEL, TARGETS = DATA / "minilm-l6", ("query", "value")
TASKS = {
    "reviews": Task("movies", 100, 16),
    "products": Task("products", 80, 16),
    "editorials": Task("editorials", 60, 32),
}


def rows_of(task: Task) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(training rows, validation rows) of text and label."""
    from loraplus.reproduce.small_tasks import domain_rows

    rows = [row for row in domain_rows(DATA, task.domain) if float(row["rating"])]
    labels = {row["text"]: "positive" if float(row["rating"]) > 0 else "negative" for row in rows}
    texts = sorted(labels)
    random.Random(0).shuffle(texts)
    made = [{"text": text, "label": labels[text]} for text in texts]
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


def automatic(task: Task, folder: Path, seed: int = 0) -> dict[str, Any]:
    """One run of `loraplus train`, without a word about rates."""
    from transformers import TrainerCallback

    from loraplus.tasks.config import TrainConfig
    from loraplus.tasks.train import train

    curve: list[dict[str, float]] = []

    class Clock(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
            seconds = time.process_time() - started
            curve.append({"step": state.global_step, "loss": metrics["eval_loss"], "seconds": seconds})

    train_file, validation_file = written(task, folder)
    config = TrainConfig(
        model=str(MODEL), data=str(train_file), eval_data=str(validation_file), output=str(folder / "run"),
        target_modules=",".join(TARGETS), rank=8, alpha=16.0, max_steps=task.steps, batch_size=task.batch,
        eval_steps=max(1, task.steps // 10), max_eval_samples=HELD_OUT, seed=seed,
    )  # fmt: skip
    started = time.process_time()
    metrics = train(config, callbacks=[Clock()])
    seconds = time.process_time() - started
    return {
        "seconds": seconds,
        "loss": metrics["eval_loss"],
        "lr": metrics["lr"],
        "lr_b": metrics["lr_b"],
        "curve": curve,
    }


def encoded(task: Task) -> tuple[list[Any], float]:
    """(training and validation examples as Trainer takes them, processor seconds that it took)."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    started = time.process_time()
    tokenizer: Any = AutoTokenizer.from_pretrained(MODEL)
    parts = []
    for rows in rows_of(task):
        tokens = tokenizer([row["text"] for row in rows], truncation=True, max_length=128)
        labels = [int(row["label"] == "positive") for row in rows]
        parts.append(Dataset.from_dict({**tokens, "labels": labels}))
    return parts, time.process_time() - started


def trial(task: Task, parts: list[Any], lr: float, seed: int = 0) -> dict[str, float]:
    """One run of PEFT + Trainer at its defaults: AdamW, linear decay, padded batches."""
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
        set_seed,
    )

    started = time.process_time()
    set_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=2)
    adapter = LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=list(TARGETS))  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, learning_rate=lr, max_steps=task.steps, per_device_train_batch_size=task.batch,
            per_device_eval_batch_size=64, report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True,
            logging_strategy="no", seed=42 + seed,  # Trainer's default, which orders the data
        )  # fmt: skip
        collator = DataCollatorWithPadding(AutoTokenizer.from_pretrained(MODEL))
        adapted: Any = get_peft_model(model, adapter)
        trainer = Trainer(adapted, arguments, collator, train_dataset=parts[0], eval_dataset=parts[1])
        trainer.train()
        loss = trainer.evaluate()["eval_loss"]
    return {"lr": lr, "loss": loss if math.isfinite(loss) else math.inf, "seconds": time.process_time() - started}


def search(task: Task, trials: int, one: dict[str, Any], keep: Any) -> None:
    """The trials that are missing, proposed by TPE from those that there are."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    known = one["search"]
    parts, seconds = encoded(task)
    one.setdefault("encoding_seconds", seconds)
    # A sampler draws the same numbers again from the same seed.
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=len(known)))
    range_of_rates = optuna.distributions.FloatDistribution(LOWEST, HIGHEST, log=True)
    distributions: dict[str, optuna.distributions.BaseDistribution] = {"lr": range_of_rates}
    for row in known:
        study.add_trial(
            optuna.trial.create_trial(params={"lr": row["lr"]}, distributions=distributions, value=row["loss"])
        )
    while len(known) < trials:
        asked = study.ask(distributions)
        known.append(trial(task, parts, asked.params["lr"]))
        study.tell(asked, known[-1]["loss"])
        keep()
    lr = best_of(known)["lr"]
    # After further trials the best rate may be another one.
    again = one["again"] = [row for row in one.get("again", []) if row["lr"] == lr]
    for seed in OTHER_SEEDS[len(again) :]:
        again.append(trial(task, parts, lr, seed))
        keep()


def best_of(trials: list[dict[str, float]]) -> dict[str, float]:
    """The trial with the lowest loss."""
    return min(trials, key=lambda row: row["loss"])


def table(runs: dict[str, Any]) -> None:
    """Prints both sides of each task: losses, the seconds to them, and what part of the search's those are."""
    from scipy import stats

    print("| task | search: trials, seconds | best, other seeds | automatic: seconds | seed 0, other seeds | mean of "
          "three | difference [95%, Welch's t] | seconds to the best | the search is as low after |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|")
    for name, one in runs.items():
        trials, again, auto, auto_again = (one.get(key) for key in ("search", "again", "auto", "auto_again"))
        if min(len(again or []), len(auto_again or [])) < len(OTHER_SEEDS):
            print(f"| {name} | {len(trials)} trials; runs are missing | | | | | | | |")
            continue
        ends = list(itertools.accumulate((row["seconds"] for row in trials), initial=one["encoding_seconds"]))[1:]
        tuned, ours = ([row["loss"] for row in rows] for rows in ([best_of(trials), *again], [auto, *auto_again]))
        low, high = stats.ttest_ind(ours, tuned, equal_var=False).confidence_interval()
        apart = f"{fmean(ours) - fmean(tuned):+.4f} [{low:+.4f}, {high:+.4f}]"
        seconds = next((point["seconds"] for point in auto["curve"] if point["loss"] <= tuned[0]), None)
        when = "not reached" if seconds is None else f"{seconds:.0f}, 1/{ends[-1] / seconds:.1f}"
        as_low = next((end for end, row in zip(ends, trials, strict=True) if row["loss"] <= auto["loss"]), None)
        after = "never" if as_low is None else f"{as_low:.0f}, {as_low / auto['seconds']:.1f} times as long"
        print(f"| {name} | {len(trials)}, {ends[-1]:.0f} | {listed(tuned)} | {auto['seconds']:.0f} | {listed(ours)} | "
              f"{fmean(tuned):.4f}, {fmean(ours):.4f} | {apart} | {when} | {after} |")  # fmt: skip


def listed(losses: Sequence[float]) -> str:
    """Losses side by side."""
    return ", ".join(f"{loss:.4f}" for loss in losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", default=list(TASKS))
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    runs: dict[str, Any] = json.loads(options.output.read_text()) if options.output.exists() else {}
    if options.table:
        return table(runs)
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
        part.write_text(json.dumps(runs, indent=1) + "\n")
        part.replace(options.output)

    for name in options.tasks:
        one = runs.setdefault(name, {"search": []})
        if "auto" not in one:
            with tempfile.TemporaryDirectory() as folder:
                one["auto"] = automatic(TASKS[name], Path(folder))
            keep()
        search(TASKS[name], options.trials, one, keep)
        for seed in OTHER_SEEDS[len(one.setdefault("auto_again", [])) :]:
            with tempfile.TemporaryDirectory() as folder:
                one["auto_again"].append(automatic(TASKS[name], Path(folder), seed))
            keep()
    return table(runs)


if __name__ == "__main__":
    main()
