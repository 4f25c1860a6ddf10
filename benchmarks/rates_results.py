"""What the runs of the rates benchmark came to: a file a setting, a line a run."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from statistics import fmean
from typing import Any

from rates_settings import SETTINGS, Setting

from loraplus.study.search.grid import HALF_DECADE, Point, lr_of

RESULTS = Path(__file__).resolve().parent / "results" / "rates"
SEEDS = (0, 1, 2)
COLUMNS = ("method", "lr_ratio", "half_decade", "lr", "seed", "eval_loss", "accuracy", "seconds")
UNTRAINED = "untrained"
GROWN, NOT_GROWN = "growth", "no-growth"
"""Automatic runs whose rates may grow, and the same without that."""
PARTS = (0.25, 0.5, 0.75)
"""Of a setting's length, at which shorter automatic runs are tried."""

Row = dict[str, Any]


def read(setting: str) -> list[Row]:
    """The runs of a setting so far."""
    path = RESULTS / f"{setting}.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows: list[Row] = list(csv.DictReader(file))
    for row in rows:
        row["seed"], row["eval_loss"] = int(row["seed"]), float(row["eval_loss"])
    return rows


def append(setting: str, row: Row) -> None:
    """Adds one run; a line is written whole."""
    path = RESULTS / f"{setting}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def point_of(row: Row) -> Point:
    """The point of the grid that a row was run at."""
    return float(row["lr_ratio"]), HALF_DECADE * int(row["half_decade"])


def grid_losses(rows: list[Row], seed: int = 0) -> dict[Point, float]:
    """Loss of every grid point on one seed."""
    return {point_of(row): row["eval_loss"] for row in rows if row["method"] == "grid" and row["seed"] == seed}


def finalists(rows: list[Row]) -> list[Point]:
    """The grid's three best points and LoRA's two best, by the first seed."""
    losses = grid_losses(rows)
    by_loss = sorted(losses, key=lambda point: losses[point])
    tied = [point for point in by_loss if point[0] == 1.0]
    return list(dict.fromkeys([*by_loss[:3], *tied[:2]]))


def of_method(rows: list[Row], method: str) -> dict[int, float]:
    """{seed: loss} of a method that has one run a seed."""
    return {row["seed"]: row["eval_loss"] for row in rows if row["method"] == method}


def counted(rows: list[Row], loss: float) -> float:
    """A loss as it counts in a mean: a run that diverges counts as if nothing had been learnt."""
    return loss if math.isfinite(loss) else of_method(rows, UNTRAINED).get(SEEDS[0], math.inf)


def mean_loss(rows: list[Row], method: str) -> float:
    """Over the seeds; infinite while some are missing."""
    losses = of_method(rows, method)
    return fmean(counted(rows, losses[seed]) for seed in SEEDS) if losses.keys() >= set(SEEDS) else math.inf


def judged(rows: list[Row], point: Point) -> float | None:
    """Mean loss of a point on the seeds that it was not chosen on."""
    losses = [grid_losses(rows, seed).get(point) for seed in SEEDS[1:]]
    return None if None in losses else fmean(counted(rows, loss) for loss in losses if loss is not None)


def summary(setting: Setting, method: str = "auto") -> dict[str, float] | None:
    """Mean losses over the seeds: best grid point, best λ = 1, automatic; None while runs are missing."""
    rows = read(setting.name)
    points = finalists(rows)
    means = {}
    for point in points:
        losses = [grid_losses(rows, seed).get(point) for seed in SEEDS]
        if None in losses:
            return None
        means[point] = fmean(losses)  # type: ignore[arg-type]
    auto = [counted(rows, loss) for loss in of_method(rows, method).values()]
    if not means or len(auto) < len(SEEDS):
        return None
    tied = [means[point] for point in points if point[0] == 1.0]
    best = min(means, key=lambda point: means[point])
    return {
        "grid": means[best], "best_ratio": best[0], "best_lr": lr_of(best), "lora": min(tied), "auto": fmean(auto),
        "to_grid": fmean(auto) / means[best], "to_lora": fmean(auto) / min(tied),
    }  # fmt: skip


def chosen(names: list[str]) -> list[Setting]:
    """The settings named, or all."""
    unknown = [name for name in names if name not in SETTINGS]
    if unknown:
        raise SystemExit(f"there is no setting {unknown[0]!r}; there are {', '.join(SETTINGS)}")
    return [SETTINGS[name] for name in names] or list(SETTINGS.values())
