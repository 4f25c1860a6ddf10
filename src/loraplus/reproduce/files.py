"""runs.csv: all runs of an experiment as one table, and back, so that results can be drawn again without training."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from loraplus.errors import InputError
from loraplus.files.single import write_csv
from loraplus.study.records import CurvePoint, Record, Run, Value, parsed

RUNS_FILE = "runs.csv"
SUMMARY_FILE = "summary.json"
_OWN = ("status", "seconds", "curve")


def columns_of(results: Iterable[Record]) -> dict[str, list[str]]:
    """Which columns of runs.csv are parameters, values of a run, and values of a row of a run.

    Raises:
        ValueError: one name is two of these.
    """
    names_of: dict[str, dict[str, None]] = {"params": {}, "values": {}, "rows": {}}
    for result in results:
        names_of["params"] |= dict.fromkeys(result.trial.params)
        names_of["values"] |= dict.fromkeys(result.values)
        for row in result.rows:
            names_of["rows"] |= dict.fromkeys(row)
    names = [*_OWN, *names_of["params"], *names_of["values"], *names_of["rows"]]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"names used twice in one experiment: {', '.join(sorted(twice))}")
    return {kind: list(names) for kind, names in names_of.items()}


def write_runs(path: Path, results: Sequence[Record]) -> None:
    """Writes one line a run; of a run with rows one a row, and what it holds as a whole on the first of them."""
    lines: list[dict[str, Any]] = []
    for result in results:
        whole: dict[str, Any] = {"status": result.status, "seconds": round(result.seconds, 3)}
        whole |= {name: _short(value) for name, value in result.values.items()}
        if result.curve:
            whole["curve"] = " ".join(f"{point.step}:{_short(point.eval_loss)}" for point in result.curve)
        for place, row in enumerate(result.rows or ({},)):
            of_row = {name: _short(value) for name, value in row.items()}
            lines.append({**result.trial.params, **(whole if place == 0 else {}), **of_row})
    write_csv(path, lines)


def read_runs(path: Path, columns: Mapping[str, Sequence[str]]) -> dict[str, Record]:
    """Inverse of `write_runs`.

    Args:
        path: The table.
        columns: As `columns_of` gave them when it was written.

    Raises:
        InputError: the table cannot be read or is not one of these.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    results: dict[str, Record] = {}
    grouped: dict[str, list[dict[str, str]]] = {}
    for number, line in enumerate(lines, 2):
        if None in line.values():
            raise InputError(f"{path}: line {number} is cut short")
        try:
            grouped.setdefault(Run(_cells(line, columns["params"])).key, []).append(line)
        except (KeyError, ValueError) as error:
            raise InputError(f"{path} is no table of runs of this experiment: {error}") from None
    for key, group in grouped.items():
        try:
            results[key] = _result(group, columns)
        except (KeyError, ValueError, AttributeError) as error:
            raise InputError(f"{path}: the run {key} cannot be read: {error}") from None
    return results


def _result(lines: Sequence[dict[str, str]], columns: Mapping[str, Sequence[str]]) -> Record:
    first = lines[0]
    status = first["status"]
    if status != "done" and status != "diverged":  # one by one, so that a type checker sees what is left
        raise ValueError(f"status {status!r}")
    curve = [point.split(":") for point in (first.get("curve") or "").split()]
    rows = tuple(row for line in lines if (row := _cells(line, columns["rows"])))
    return Record(
        trial=Run(_cells(first, columns["params"])),
        status=status,
        values={name: float(value) for name, value in _cells(first, columns["values"]).items()},
        curve=tuple(CurvePoint(int(step), float(value)) for step, value in curve),
        rows=rows,
        seconds=float(first["seconds"]),
    )


def _cells(line: Mapping[str, str], names: Sequence[str]) -> dict[str, Value]:
    return {name: parsed(line[name]) for name in names if line[name] != ""}


def _short(value: Value) -> Value:
    """Seven digits are more than a float32 run has."""
    return float(f"{value:.7g}") if isinstance(value, float) else value
