"""What a user asks of `loraplus bench`, checked before anything heavy is imported."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from loraplus.bench.shapes import SHAPES
from loraplus.errors import InputError
from loraplus.files.single import read_json
from loraplus.tasks.config import BenchConfig, TaskConfig

SCHEMA_VERSION = 1
OWN_MODEL = "own"
_OF_DATA = ("eval_data", "task", "max_length", "batch_size", "target_modules")


def rows_of(config: BenchConfig) -> list[str]:
    """The rows that a configuration asks for.

    Raises:
        InputError: half of what a model of the user's needs, a row that does not exist, no time.
    """
    if not (math.isfinite(config.minutes) and config.minutes > 0):
        raise InputError(f"--minutes must be positive and finite, got {config.minutes}")
    for given, other in (("model", "data"), ("data", "model")):
        if getattr(config, given) and not getattr(config, other):
            raise InputError(f"--{given} needs --{other} beside it; without either, built-in models are compared")
    if config.model:
        if config.rows is not None:
            raise InputError("--rows is for the built-in models; with --model there is one row, yours")
        return [OWN_MODEL]
    for name in _OF_DATA:
        if getattr(config, name) != _default(name):
            raise InputError(f"--{name.replace('_', '-')} is for a model of yours: give --model and --data, too")
    names = list(SHAPES) if config.rows is None else [name.strip() for name in config.rows.split(",") if name.strip()]
    unknown = [name for name in names if name not in SHAPES]
    if unknown or not names:
        raise InputError(f"--rows: there is no row {', '.join(unknown) or 'in it'}; all are {', '.join(SHAPES)}")
    return names


def _default(name: str) -> Any:
    return next(field.default for field in fields(TaskConfig) if field.name == name)


def saved(path: str) -> dict[str, Any]:
    """A result that was written before.

    Raises:
        InputError: the file cannot be read, or holds something else.
    """
    result = read_json(path)
    if not isinstance(result, Mapping) or not isinstance(result.get("rows"), list) or "machine" not in result:
        raise InputError(f"{path} is no result of `loraplus bench`")
    if result.get("schema_version") != SCHEMA_VERSION:
        raise InputError(
            f"{path} is of version {result.get('schema_version')}, and this loraplus reads {SCHEMA_VERSION}"
        )
    return dict(result)
