"""One automatic run against the exhaustive grid of (η_A, λ), setting by setting.

    python benchmarks/rates.py --grid [SETTING …] [--minutes N]   runs of the grid that are missing, piece by piece
    python benchmarks/rates.py --auto [SETTING …]                 the automatic runs that are missing
    python benchmarks/rates.py --table                            what the committed results come to
    python benchmarks/rates.py --arms                             LoRA+ against LoRA in the same results
    python benchmarks/rates.py --rerun SETTING                    trains the runs behind one row of the table again

Results: benchmarks/results/rates/SETTING.csv, a line a run. Runs of a setting share steps, initialisation and data
order by seed. The grid is one seed; its three best points, LoRA's two best and the automatic run have three.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, median
from typing import Any

from rates_settings import SETTINGS, Setting

from loraplus.study.records import Record
from loraplus.study.search.grid import HALF_DECADE, Point, RatioGrid, lr_of
from loraplus.study.statistics import t_interval

RESULTS = Path(__file__).resolve().parent / "results" / "rates"
SEEDS = (0, 1, 2)
GRID = RatioGrid(starting_ratios=4, equal_budgets=False)
COLUMNS = ("method", "lr_ratio", "half_decade", "lr", "seed", "eval_loss", "accuracy", "seconds")

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


def pending(setting: Setting) -> Iterator[tuple[Point, int]]:
    """Runs of the grid that are missing, in order: the grid itself, then its finalists on the other seeds."""
    while points := GRID.next(grid_losses(read(setting.name))):
        yield points[0], SEEDS[0]
    for seed in SEEDS[1:]:
        for point in finalists(read(setting.name)):
            if point not in grid_losses(read(setting.name), seed):
                yield point, seed


def row_of(method: str, seed: int, record: Record, point: Point | None = None) -> Row:
    """A finished run as a line of the table."""
    ratio, half_decade, lr = ("", "", "") if point is None else (f"{point[0]:g}", point[1] // HALF_DECADE, lr_of(point))
    return {
        "method": method, "lr_ratio": ratio, "half_decade": half_decade, "lr": lr, "seed": seed,
        "eval_loss": f"{record.values['eval_loss']:.5f}", "accuracy": f"{record.values.get('eval_accuracy', 0.0):.4f}",
        "seconds": f"{record.seconds:.1f}",
    }  # fmt: skip


def run_point(setting: Setting, point: Point, seed: int) -> Row:
    """Trains one grid point."""
    from rates_tasks import run

    return row_of("grid", seed, run(setting, seed, lr_of(point), point[0]), point)


def run_auto(setting: Setting, seed: int, name: str = "auto", rule: Any = None) -> tuple[Row, list[Row]]:
    """Trains once with automatic rates; also gives the path of the rates."""
    from rates_tasks import run

    from loraplus.auto import AutoRates

    path: list[Row] = []

    def prepare(model: Any, optimizer: Any) -> None:
        rates = AutoRates(model, optimizer, rule=rule)
        optimizer.register_step_post_hook(
            lambda *_: path.append({"step": rates.steps, "lr_a": rates.lr_a, "lr_b": rates.lr_b})
        )

    return row_of(name, seed, run(setting, seed, 1.0, 1.0, prepare)), path


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
    auto = [row["eval_loss"] for row in rows if row["method"] == method]
    if not means or len(auto) < len(SEEDS):
        return None
    tied = [means[point] for point in points if point[0] == 1.0]
    best = min(means, key=lambda point: means[point])
    return {
        "grid": means[best], "best_ratio": best[0], "best_lr": lr_of(best), "lora": min(tied), "auto": fmean(auto),
        "to_grid": fmean(auto) / means[best], "to_lora": fmean(auto) / min(tied),
    }  # fmt: skip


def table() -> None:
    """Prints the goal table, tuned and untouched half apart."""
    for half in ("tuned", "untouched"):
        print(f"\n{half} half")
        print(
            f"{'setting':40s} {'grid':>8s} {'η_A':>9s} {'λ':>5s} {'LoRA':>8s} {'auto':>8s} {'/grid':>7s} {'/LoRA':>7s}"
        )
        found = {s.name: summary(s) for s in SETTINGS.values() if s.half == half}
        done = [value for value in found.values() if value]
        for name, v in found.items():
            if v is None:
                print(f"{name:40s} runs are missing")
                continue
            print(f"{name:40s} {v['grid']:8.4f} {v['best_lr']:9.3g} {v['best_ratio']:5g} {v['lora']:8.4f} "
                  f"{v['auto']:8.4f} {v['to_grid']:7.3f} {v['to_lora']:7.3f}")  # fmt: skip
        if done:
            ratios = [v["to_grid"] for v in done]
            level = sum(v["to_lora"] <= 1 for v in done)
            print(f"{half}: auto / grid mean {fmean(ratios):.4f}, worst {max(ratios):.4f}; "
                  f"auto ≤ LoRA in {level} of {len(done)}")  # fmt: skip


def judged(rows: list[Row], point: Point) -> float | None:
    """Mean loss of a point on the seeds that it was not chosen on."""
    losses = [grid_losses(rows, seed).get(point) for seed in SEEDS[1:]]
    return None if None in losses else fmean(losses)  # type: ignore[arg-type]


def arms() -> None:
    """Prints LoRA+ over LoRA: the best points of either on the first seed, judged on the others; and at one usual rate.

    The usual rate is η_A = 1e-3 for LoRA and 7.9e-4 with λ = 16 for LoRA+, on the first seed. Last, one λ held and η_A
    tuned, against λ = 1 tuned, both on the first seed.
    """
    tuned: dict[str, float] = {}
    untuned: dict[str, float] = {}
    held: dict[float, dict[str, float]] = {4.0: {}, 16.0: {}}
    print(f"{'setting':40s} {'LoRA':>8s} {'LoRA+':>8s} {'λ':>5s} {'ratio':>7s} {'untuned':>8s}")
    for setting in SETTINGS.values():
        rows = read(setting.name)
        first = grid_losses(rows)
        known = {point: loss for point in first if (loss := judged(rows, point)) is not None}
        lora, plus = (
            min((p for p in known if (p[0] == 1.0) == tied), key=lambda p: first[p]) for tied in (True, False)
        )
        tuned[setting.name] = known[plus] / known[lora]
        untuned[setting.name] = first[16.0, HALF_DECADE] / first[1.0, 0]
        best_of = {ratio: min(loss for point, loss in first.items() if point[0] == ratio) for ratio in (1.0, *held)}
        for ratio, found in held.items():
            found[setting.name] = best_of[ratio] / best_of[1.0]
        print(f"{setting.name:40s} {known[lora]:8.4f} {known[plus]:8.4f} {plus[0]:5g} {tuned[setting.name]:7.3f} "
              f"{untuned[setting.name]:8.3f}")  # fmt: skip
    for name, ratios in {"tuned": tuned, "untuned": untuned, **{f"λ = {r:g}": one for r, one in held.items()}}.items():
        print_ratios(name, ratios)


def print_ratios(name: str, ratios: dict[str, float]) -> None:
    """Geometric means over the settings with their intervals: of all, of a kind of model, without the farthest off."""
    farthest = max(ratios, key=lambda setting: abs(math.log(ratios[setting])))
    kinds = {
        "all": list(ratios),
        "MiniLM": [setting for setting in ratios if setting.startswith("minilm")],
        "decoders": [setting for setting in ratios if not setting.startswith("minilm")],
        f"all but {farthest}": [setting for setting in ratios if setting != farthest],
    }
    for kind, settings in kinds.items():
        values = [ratios[setting] for setting in settings]
        found = t_interval([math.log(value) for value in values]).through(math.exp)
        print(f"{name}, {kind}: LoRA+ / LoRA {found.mean:.4f} [{found.low:.4f}, {found.high:.4f}], median "
              f"{median(values):.4f}, largest {max(values):.4f}, below 1 in {sum(v < 1 for v in values)} of "
              f"{len(values)}")  # fmt: skip


def chosen(names: list[str]) -> list[Setting]:
    """The settings named, or all."""
    unknown = [name for name in names if name not in SETTINGS]
    if unknown:
        raise SystemExit(f"there is no setting {unknown[0]!r}; there are {', '.join(SETTINGS)}")
    return [SETTINGS[name] for name in names] or list(SETTINGS.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--grid", nargs="*", metavar="SETTING")
    action.add_argument("--auto", nargs="*", metavar="SETTING")
    action.add_argument("--table", action="store_true")
    action.add_argument("--arms", action="store_true")
    action.add_argument("--rerun", metavar="SETTING")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no run after so many minutes")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if options.table:
        return table()
    if options.arms:
        return arms()
    import torch

    torch.set_num_threads(options.threads)
    deadline = time.monotonic() + 60 * options.minutes
    if options.rerun:
        (setting,) = chosen([options.rerun])
        for row in read(setting.name):
            if row["method"] == "grid":
                again = run_point(setting, point_of(row), row["seed"])
            else:
                again, _ = run_auto(setting, row["seed"])
            print(f"{row['method']} λ {row['lr_ratio'] or '–'} lr {row['lr'] or '–'} seed {row['seed']}: "
                  f"{row['eval_loss']:.5f} recorded, {again['eval_loss']} now", flush=True)  # fmt: skip
        return None
    if options.grid is not None:
        for setting in chosen(options.grid):
            for point, seed in pending(setting):
                if time.monotonic() > deadline:
                    return None
                row = run_point(setting, point, seed)
                append(setting.name, row)
                print(setting.name, json.dumps(row), flush=True)
        return None
    for setting in chosen(options.auto):
        done = {row["seed"] for row in read(setting.name) if row["method"] == "auto"}
        for seed in SEEDS:
            if seed not in done and time.monotonic() < deadline:
                row, path = run_auto(setting, seed)
                append(setting.name, row)
                (RESULTS / f"{setting.name}-path-{seed}.json").write_text(json.dumps(path))
                print(setting.name, json.dumps(row), flush=True)
    return None


if __name__ == "__main__":
    main()
