"""Finds (η_A, λ) for a task within a budget: checks, runs, and the files that say what was found."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from loraplus.errors import DivergedError
from loraplus.files.commands import NOT_COMPARED
from loraplus.files.output import check_output, hold_output, prepare_output
from loraplus.files.single import write_csv, write_json, write_yaml
from loraplus.study.pairs import finite_perplexity
from loraplus.study.records import Record
from loraplus.study.runner import JOURNAL_FILE, LOG_FILE, Event, default_workers, has_begun, run_all
from loraplus.study.search import Point
from loraplus.study.search.halving import RATIO
from loraplus.study.search.pattern import START_GEOMETRIC_MEAN_LR
from loraplus.study.storage import without_password
from loraplus.study.store import StudyStore
from loraplus.study.trial import data_facts, data_seen, run_trial
from loraplus.study.tuning import TuningPlan
from loraplus.tasks.checks import check_settings
from loraplus.tasks.command_line import command_of_settings
from loraplus.tasks.config import DEFAULT_TUNING_RUNS, TaskConfig, TrainConfig, TuneConfig
from loraplus.tasks.measures import ACCURACY, PERPLEXITY, measures_of
from loraplus.tasks.seen import Seen

SCHEMA_VERSION = 1
RESULT_FILE = "tune.json"
TRIALS_FILE = "trials.csv"
BEST_FILE = "best.yaml"
ADAPTER_FOLDER = "adapter"
# Processes of one study may differ in these: where each of them works and writes.
MAY_DIFFER = (*NOT_COMPARED, "storage", "study")
# Machines may keep these files in different folders, so their names are compared, and of data the content.
COMPARED_BY_NAME = ("model", "data", "eval_data")


def tune(
    config: TuneConfig,
    *,
    overwrite: bool = False,
    resume: bool = False,
    progress: Callable[[Event], None] | None = None,
    on_seen: Callable[[Seen], None] | None = None,
) -> dict[str, Any]:
    """Searches η_A and λ by successive halving and writes the best pair with everything that was run.

    Several processes, on one machine or on many, work on one study if they are called with the same settings and the
    same `storage`, each with an output folder of its own. Each of them writes the whole result.

    Runs train in processes of their own, so a script that calls this needs `if __name__ == "__main__":`.

    Args:
        config: The task, the budget, the study and the output folder.
        overwrite: Replace an earlier run's output; a study in a storage of its own stays.
        resume: Go on with an earlier run of the same configuration; finished runs are not done again.
        progress: Called with every `Event` of the study.
        on_seen: Told what was seen of the data, before the first run. What is doubtful is logged as a warning.

    Returns:
        The content of tune.json. The folder also holds config.yaml, trials.csv, best.yaml for `loraplus train --config`
        and, without a storage of its own, study.journal.

    Raises:
        InputError: a setting, the data, the storage or the output folder cannot be used.
        InterruptedRun: SIGINT or SIGTERM came; `resume=True` goes on.
        DivergedError: all runs of full length diverged.

    Example:
        >>> config = TuneConfig(model="bert-base-uncased", data="reviews.csv", output="runs/tune")
        >>> tune(config)["best"]  # doctest: +SKIP
    """
    check_settings(config)
    config = _with_budget(config)
    settings = settings_of(config)
    check_output(config.output, settings, overwrite=overwrite, resume=resume)
    start = Point.from_geometric_mean(START_GEOMETRIC_MEAN_LR, RATIO)
    facts = data_facts(config, start.lr, start.lr_ratio)
    seen = data_seen(config)
    if on_seen:
        on_seen(seen)
    seen.tell()
    plan = TuningPlan(facts["steps"], config.seed, config.tuning_runs, config.minutes)
    begun = resume and has_begun(config.output, RESULT_FILE, TRIALS_FILE)
    store = None if config.storage is None else _open(config.storage, config, facts, begun)
    with hold_output(config.output):
        folder = prepare_output(config.output, settings, overwrite=overwrite, resume=resume)
        records = run_all(
            plan,
            store or _open(str(folder / JOURNAL_FILE), config, facts, begun),
            partial(run_trial, config),
            workers=config.workers or default_workers(),
            on_event=progress,
            log=folder / LOG_FILE,
        )
        best = plan.best(records)
        if best is None:
            lowest = min(record.trial.lr for record in records.values() if record.trial.steps == plan.full_steps)
            raise DivergedError(
                f"every run of full length diverged, down to η_A = {lowest:g}; check the data and the model, or start "
                "again with more --tuning-runs"
            )
        result = _result(config, settings, facts, plan, records, best)
        write_csv(folder / TRIALS_FILE, result["trials"])
        write_yaml(folder / BEST_FILE, asdict(train_config(config, best)))
        write_json(folder / RESULT_FILE, result)  # last: who sees it knows that the rest is there
    return result


def settings_of(config: TuneConfig) -> dict[str, Any]:
    """The configuration as it is saved and shown: without the password of a storage."""
    return asdict(config) | {"storage": config.storage and without_password(config.storage)}


def train_config(config: TuneConfig, best: Record) -> TrainConfig:
    """Training with the rates found and all else as in the search, into a folder inside the search's."""
    shared = {spec.name: getattr(config, spec.name) for spec in fields(TaskConfig)}
    shared["output"] = str(Path(config.output) / ADAPTER_FOLDER)
    return TrainConfig(**shared, lr=best.trial.lr, lr_ratio=best.trial.lr_ratio)


def train_command(config: TrainConfig) -> str:
    """The command line that trains with a configuration; what is at its default is left out, the rates never.

    Example:
        >>> train_command(TrainConfig(model="m", data="d.csv", output="o", lr=1e-3, lr_ratio=4.0))
        'loraplus train --model m --data d.csv --output o --lr 0.001 --lr-ratio 4'
    """
    return command_of_settings("train", asdict(config))


def _with_budget(config: TuneConfig) -> TuneConfig:
    """The configuration with the default budget if it has none."""
    if config.minutes is not None:
        return config
    return replace(config, tuning_runs=float(DEFAULT_TUNING_RUNS if config.tuning_runs is None else config.tuning_runs))


def _open(storage: str, config: TuneConfig, facts: Mapping[str, Any], begun: bool) -> StudyStore:
    store = StudyStore.open(storage, config.study, shared=True, begun=begun)
    shared = {key: value for key, value in asdict(config).items() if key not in MAY_DIFFER}
    shared |= {key: shared[key] and Path(shared[key]).name for key in COMPARED_BY_NAME}
    store.check_settings(shared)
    facts = {key: value for key, value in facts.items() if key != "source"}
    store.check_data(facts)
    return store


def _result(
    config: TuneConfig,
    settings: Mapping[str, Any],
    facts: Mapping[str, Any],
    plan: TuningPlan,
    records: Mapping[str, Record],
    best: Record,
) -> dict[str, Any]:
    rates = [record.trial.geometric_mean_lr for record in records.values()]
    return {
        "schema_version": SCHEMA_VERSION,
        "best": {
            "lr": best.trial.lr,
            "lr_ratio": best.trial.lr_ratio,
            "eval_loss": best.eval_loss,
            **_beside_loss(best, measures_of(settings)),
            "at_edge": best.trial.geometric_mean_lr in (min(rates), max(rates)),
        },
        "cost": {
            "full_runs": round(plan.done(records)[0], 4),
            "budget": plan.budget(records),
            "steps": sum(record.steps for record in records.values()),
            "full_steps": plan.full_steps,
            "seconds": sum(record.seconds for record in records.values()),
        },
        "train_command": train_command(train_config(config, best)),
        "trials": _rows(list(records.values()), plan.full_steps, measures_of(settings)),
        "data": dict(facts),
        "config": dict(settings),
    }


def _beside_loss(record: Record, measures: Sequence[str]) -> dict[str, float | None]:
    """Accuracy, or of a language model perplexity; of numbers nothing."""
    done = record.status == "done"
    if ACCURACY in measures:
        return {"eval_accuracy": record.eval_accuracy if done else None}
    return {"eval_perplexity": finite_perplexity(record.eval_loss) if done else None} if PERPLEXITY in measures else {}


def _rows(records: Sequence[Record], full_steps: int, measures: Sequence[str]) -> list[dict[str, Any]]:
    """One row a run, short runs first and in each rung the best first."""
    rows = [
        {
            "steps": record.trial.steps,
            "part": round((record.trial.steps or full_steps) / full_steps, 4),
            "lr": record.trial.lr,
            "lr_b": record.trial.lr * record.trial.lr_ratio,
            "lr_ratio": record.trial.lr_ratio,
            "geometric_mean_lr": record.trial.geometric_mean_lr,
            "status": record.status,
            "eval_loss": record.eval_loss if math.isfinite(record.eval_loss) else None,
            **_beside_loss(record, measures),
            "seed": record.trial.seed,
            "seconds": round(record.seconds, 3),
        }
        for record in records
    ]
    return sorted(rows, key=lambda row: (row["steps"], row["eval_loss"] is None, row["eval_loss"] or 0.0, row["lr"]))
