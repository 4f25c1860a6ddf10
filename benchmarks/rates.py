"""One automatic run against the exhaustive grid of (η_A, λ), and against methods that need no search.

    python benchmarks/rates.py --grid [SETTING …] [--minutes N]   runs of the grid that are missing, piece by piece
    python benchmarks/rates.py --auto [SETTING …]                 the automatic runs that are missing
    python benchmarks/rates.py --peers [SETTING …]                the runs of rates_peers.py that are missing
    python benchmarks/rates.py --variants SETTING …               the rate of optimizers with a direction of their own
    python benchmarks/rates.py --steps SETTING …                  automatic runs of parts of the length
    python benchmarks/rates.py --growth [SETTING …]               automatic runs with growth and without, in pairs
    python benchmarks/rates.py --table                            what the committed results come to
    python benchmarks/rates.py --arms                             LoRA+ against LoRA in the first fourteen settings
    python benchmarks/rates.py --rerun SETTING                    trains the runs behind one row of the table again

Results: benchmarks/results/rates/SETTING.csv, a line a run. Runs of a setting share steps, initialisation and data
order by seed. The grid is one seed; its three best points, LoRA's two best, the automatic run and the peers have three.
In the later settings the grid also holds a block that all of them share, so that constants can be judged.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import time
from collections.abc import Iterator
from typing import Any

import rates_tables
from rates_results import (
    GROWN,
    NOT_GROWN,
    PARTS,
    RESULTS,
    SEEDS,
    UNTRAINED,
    Row,
    append,
    chosen,
    finalists,
    grid_losses,
    mean_loss,
    of_method,
    point_of,
    read,
    summary,
)
from rates_settings import BLOCK, LATER, Setting

from loraplus.study.records import Record, Run
from loraplus.study.search.grid import HALF_DECADE, Point, RatioGrid, lr_of, next_in_column

GRID = RatioGrid(starting_ratios=4, equal_budgets=False)


def pending(setting: Setting) -> Iterator[tuple[Point, int]]:
    """Runs of the grid that are missing, in order: the grid, the block, then finalists on the other seeds."""
    while points := GRID.next(grid_losses(read(setting.name))):
        yield points[0], SEEDS[0]
    if setting.part in LATER:
        for point in BLOCK:
            if point not in grid_losses(read(setting.name)):
                yield point, SEEDS[0]
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
    from rates_training import fixed, run

    return row_of("grid", seed, run(setting, seed, fixed(lr_of(point), point[0])), point)


def run_auto(setting: Setting, seed: int, name: str = "auto", rule: Any = None) -> tuple[Row, list[Row]]:
    """Trains once with automatic rates; also gives the path of the rates."""
    from rates_peers import automatic
    from rates_training import run

    path: list[Row] = []

    def method(problem: Any, setting: Setting) -> Any:
        seen: list[Any] = []
        optimizers = automatic(rule, seen)(problem, setting)
        (rates,) = seen
        optimizers[0].register_step_post_hook(
            lambda *_: path.append({"step": rates.steps, "lr_a": rates.lr_a, "lr_b": rates.lr_b})
        )
        return optimizers

    return row_of(name, seed, run(setting, seed, method)), path


def grid(setting: Setting) -> Iterator[Row]:
    """The missing runs of a setting's grid, as they end."""
    from rates_training import untrained

    if setting.part in LATER and not of_method(read(setting.name), UNTRAINED):
        yield row_of(UNTRAINED, SEEDS[0], Record(Run({}), "done", values={"eval_loss": untrained(setting, SEEDS[0])}))
    for point, seed in pending(setting):
        yield run_point(setting, point, seed)


def auto(setting: Setting) -> Iterator[Row]:
    """The missing automatic runs; their paths are written beside the results."""
    done = of_method(read(setting.name), "auto")
    for seed in SEEDS:
        if seed not in done:
            row, path = run_auto(setting, seed)
            (RESULTS / f"{setting.name}-path-{seed}.json").write_text(json.dumps(path))
            yield row


def growth(setting: Setting) -> Iterator[Row]:
    """The missing automatic runs with growth (`automatic/growth.py`) and without, on the same networks."""
    from loraplus.auto import Rule

    for name, rule in ((GROWN, Rule()), (NOT_GROWN, Rule(growth=0.0))):
        for seed in SEEDS:
            if seed not in of_method(read(setting.name), name):
                yield run_auto(setting, seed, name, rule)[0]


def peers(setting: Setting) -> Iterator[Row]:
    """The missing runs of the methods that need no search."""
    from rates_peers import PEERS
    from rates_training import run

    for name, method in PEERS.items():
        done = of_method(read(setting.name), name)
        for seed in SEEDS:
            if seed in done:
                continue
            try:
                yield row_of(name, seed, run(setting, seed, method))
            except ModuleNotFoundError as error:
                print(f"{setting.name}: {name} is left out, {error.name} is not installed", flush=True)
                break


def variants(setting: Setting) -> Iterator[Row]:
    """A column of rates for each optimizer with a direction of its own, its best one on the other seeds."""
    from rates_peers import TUNABLE
    from rates_training import run

    for name, make in TUNABLE.items():
        method = f"{name}-tuned"

        def losses(seed: int, method: str = method) -> dict[int, float]:
            rows = (row for row in read(setting.name) if row["method"] == method and row["seed"] == seed)
            return {HALF_DECADE * int(row["half_decade"]): row["eval_loss"] for row in rows}

        def trained(step: int, seed: int, make: Any = make, method: str = method) -> Row:
            point = (1.0, step)
            return row_of(method, seed, run(setting, seed, functools.partial(make, lr=lr_of(point))), point)

        while (step := next_in_column(losses(SEEDS[0]), 0)) is not None:
            yield trained(step, SEEDS[0])
        best = min(losses(SEEDS[0]), key=lambda step: losses(SEEDS[0])[step])
        for seed in SEEDS[1:]:
            if best not in losses(seed):
                yield trained(best, seed)


def shorter(setting: Setting) -> Iterator[Row]:
    """Automatic runs of a quarter, a half and three quarters of the length, up to the first that does as tuned LoRA."""
    from rates_peers import automatic
    from rates_training import run

    full = summary(setting)
    if full is None:
        print(f"{setting.name}: runs of the grid are missing", flush=True)
        return
    for part in PARTS:
        name = f"auto-{part:g}"
        for seed in SEEDS:
            if seed not in of_method(read(setting.name), name):
                yield row_of(name, seed, run(setting, seed, automatic(), steps=round(part * setting.steps)))
        if mean_loss(read(setting.name), name) <= full["lora"]:
            return


def rerun(setting: Setting) -> None:
    """Trains what the table holds of a setting again, and prints both."""
    for row in read(setting.name):
        if row["method"] not in ("grid", "auto"):
            continue
        if row["method"] == "grid":
            again = run_point(setting, point_of(row), row["seed"])
        else:
            again, _ = run_auto(setting, row["seed"])
        print(f"{row['method']} λ {row['lr_ratio'] or '–'} lr {row['lr'] or '–'} seed {row['seed']}: "
              f"{row['eval_loss']:.5f} recorded, {again['eval_loss']} now", flush=True)  # fmt: skip


TRAINED = {"grid": grid, "auto": auto, "peers": peers, "variants": variants, "steps": shorter, "growth": growth}
PRINTED = {"table": rates_tables.table, "arms": rates_tables.arms}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    for name in TRAINED:
        action.add_argument(f"--{name}", nargs="*", metavar="SETTING")
    for name in PRINTED:
        action.add_argument(f"--{name}", action="store_true")
    action.add_argument("--rerun", metavar="SETTING")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no run after so many minutes")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    for name, show in PRINTED.items():
        if getattr(options, name):
            return show()
    import torch

    torch.set_num_threads(options.threads)
    if options.rerun:
        return rerun(*chosen([options.rerun]))
    deadline = time.monotonic() + 60 * options.minutes
    for name, train in TRAINED.items():
        for setting in chosen(getattr(options, name)) if getattr(options, name) is not None else ():
            for row in train(setting):
                append(setting.name, row)
                print(setting.name, json.dumps(row), flush=True)
                if time.monotonic() > deadline:
                    return None
    return None


if __name__ == "__main__":
    main()
