"""`loraplus bench`: the rows that were asked for, each measured within its share of the time."""

from __future__ import annotations

import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from loraplus.bench.arms import ablation_of, arms_of
from loraplus.bench.asked import OWN_MODEL, SCHEMA_VERSION, rows_of
from loraplus.bench.machine import machine
from loraplus.bench.measure import Measurement, Told
from loraplus.bench.prepared import prepare
from loraplus.bench.shapes import SHAPES, make
from loraplus.errors import InputError
from loraplus.files.scratch import scratch_folder
from loraplus.speed import LEVERS
from loraplus.tasks.config import CLASSIFICATION, MULTI_LABEL, REGRESSION, BenchConfig, TaskConfig

_OWN_BATCHES = 8


def bench(config: BenchConfig, told: Told = lambda text: None) -> dict[str, Any]:
    """Runs the comparison.

    Args:
        config: What to run, and for how long.
        told: Is told what is going on, a line at a time.

    Returns:
        Machine, settings and rows; what --json prints.

    Raises:
        InputError: settings or data that cannot be used.

    Example:
        >>> bench(BenchConfig(rows="reviews", minutes=1))["rows"][0]["ratios"]  # doctest: +SKIP
    """
    names = rows_of(config)
    started = time.perf_counter()
    result: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "machine": machine(), "settings": asdict(config)}
    rows = result["rows"] = []
    with scratch_folder() as scratch:
        for done, name in enumerate(names):
            left = 60 * config.minutes - (time.perf_counter() - started)
            rows.append(_measurement(config, name, left / (len(names) - done), Path(scratch), told).row())
    result["seconds"] = time.perf_counter() - started
    return result


def _measurement(config: BenchConfig, name: str, seconds: float, scratch: Path, told: Told) -> Measurement:
    """A row, its model and data made or read."""
    wanted = {field.name: getattr(config, field.name) for field in fields(TaskConfig)}
    if name == OWN_MODEL:
        if config.task in (REGRESSION, MULTI_LABEL):
            raise InputError(f"--task {config.task} is not for bench; its steps cost what those of classification do")
        title, batches, memory = f"{config.model} on {config.data}", _OWN_BATCHES, True
        unit = "examples" if config.task == CLASSIFICATION else "tokens"
    else:
        shape, folder = SHAPES[name], scratch / name
        folder.mkdir()
        told(f"{shape.title}: making the model")
        wanted |= make(shape, folder, config.seed)
        title, batches, memory, unit = shape.title, shape.batches, shape.memory, shape.unit
    wanted["speed_up"] = False  # each arm does it, or does not, by itself
    task = TaskConfig(**{**wanted, "output": str(scratch), "max_steps": None})
    arms = ablation_of(LEVERS) if config.ablation else arms_of(task.task)
    prepared = prepare(task, batches)
    return Measurement(
        name, title, unit, prepared, arms, seconds, str(scratch), memory and config.memory, config.profile, told
    )
