"""The command to type next, after one has ended. It runs as printed, with the user's own paths."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from loraplus.cli.terminal import Console
from loraplus.tasks.command_line import command_line, command_of_settings
from loraplus.tasks.config import OF_LABELS, CompareConfig, TaskConfig, TrainConfig, TuneConfig

_ADAPTER_FOLDER = "adapter"
_PROMPT = "Hello"


def show_next(console: Console, purpose: str, line: str) -> None:
    """Says what the next command is for, and on a line of its own the command."""
    console.say(f"next, to {purpose}:")
    console.copyable(line)


def after_check(name: str, config: TaskConfig) -> tuple[str, str]:
    """(purpose, command): what was checked is run; without an --output, into a folder named after the data."""
    output = config.output or free_path(str(Path("runs") / (Path(config.data).name.split(".")[0] or "run")))
    return "run it", command_of_settings(name, asdict(config) | {"output": output})


def after_train(config: TrainConfig, metrics: Mapping[str, Any]) -> tuple[str, str]:
    """(purpose, command): what was trained is used, or where nothing was learnt other rates are searched."""
    trust = config.trust_remote_code or None
    if config.task not in OF_LABELS:
        line = command_line("generate", adapter=config.output, prompt=_PROMPT, trust_remote_code=trust)
        return "see what it answers", line
    if metrics.get("learnt", {}).get("learnt") is False:
        search = TuneConfig(**_shared(config) | {"output": free_path(f"{_plain(config.output)}-tune")})
        return "search for better rates", command_of_settings("tune", asdict(search))
    adapter, how = config.output, {"trust_remote_code": trust, "encoding": config.encoding}
    if config.eval_data:
        return "see its scores, class by class", command_line("evaluate", adapter=adapter, data=config.eval_data, **how)
    line = command_line("predict", adapter=adapter, data=config.data, output=_predictions(adapter), **how)
    return "label texts with it", line


def after_predict(adapter: str, model: str | None, trust_remote_code: bool) -> tuple[str, str]:
    """(purpose, command): base model and adapter become one model."""
    options = {"model": model, "trust_remote_code": trust_remote_code or None}
    merged = free_path(f"{_plain(adapter)}-merged")
    return "have one model without PEFT", command_line("merge", adapter=adapter, output=merged, **options)


def after_evaluate(adapter: str, data: str, **options: object) -> tuple[str, str]:
    """(purpose, command): the answer to every text is written down."""
    given = {name: value or None for name, value in options.items()}
    line = command_line("predict", adapter=adapter, data=data, output=_predictions(adapter), **given)
    return "see the answer to every text", line


def after_evaluate_language(adapter: str, **options: Any) -> tuple[str, str]:
    """(purpose, command): the model answers a prompt."""
    given = {name: value or None for name, value in options.items()}
    return "see what it answers", command_line("generate", adapter=adapter, prompt=_PROMPT, **given)


def after_merge(output: str, task: str | None) -> tuple[str, str]:
    """(purpose, command): the model is tried, by transformers alone where it labels texts."""
    if task == "CAUSAL_LM":
        return "try it", command_line("generate", model=output, prompt=_PROMPT)
    folder = json.dumps(_path(output), ensure_ascii=False)  # in double quotes, which a shell's single ones hold
    code = f'from transformers import pipeline; print(pipeline("text-classification", {folder})("a text"))'
    return "try it", shlex.join(["python", "-c", code])


def after_compare(config: CompareConfig, summary: Mapping[str, Any]) -> tuple[str, str] | None:
    """(purpose, command): trains with the better of the two arms' rates; None where there is none."""
    if summary.get("learning", {}).get("nothing"):
        search = TuneConfig(**_shared(config) | {"output": free_path(f"{_plain(config.output)}-tune")})
        return "search for better rates", command_of_settings("tune", asdict(search))
    losses = {
        name: row["test"]["loss"]["mean"]
        for name, row in summary["arms"].items()
        if name in ("lora", "loraplus") and row.get("test") and row["test"]["loss"]["mean"] is not None
    }
    if not losses:
        return None
    best = summary["arms"][min(losses, key=lambda name: losses[name])]["best"]
    output = free_path(str(Path(config.output) / _ADAPTER_FOLDER))
    train = TrainConfig(**_shared(config) | {"output": output}, lr=best["lr"], lr_ratio=best["lr_ratio"])
    return "train with the better rates", command_of_settings("train", asdict(train))


def after_reproduce(name: str, scale: str, scales: tuple[str, ...]) -> tuple[str, str] | None:
    """(purpose, command): what the published scale would take; None where it was run, or there is none."""
    if scale != "paper" and "paper" in scales:
        return "see what the published scale takes", command_line("reproduce", name, scale="paper", dry_run=True)
    return None


def free_path(path: str) -> str:
    """A path that is free: this one, or this with a number."""
    stem, suffix = os.path.splitext(path)
    number = 2
    free = path
    while os.path.lexists(free):
        free, number = f"{stem}-{number}{suffix}", number + 1
    return free


def _predictions(folder: str) -> str:
    return free_path(str(Path(folder) / "predictions.csv"))


def _plain(folder: str) -> str:
    """A folder's name that something can be added to."""
    return str(Path(folder).resolve()) if Path(folder).name in ("", "..") else str(Path(folder))


def _path(folder: str) -> str:
    """A folder that transformers does not take for a name on the hub."""
    return folder if os.sep in folder else f".{os.sep}{folder}"


def _shared(config: TaskConfig) -> dict[str, Any]:
    return {spec.name: getattr(config, spec.name) for spec in fields(TaskConfig)}
