"""What `loraplus tune` finds for the cost of four full runs, against the best of the exhaustive grid of rates.py.

    python benchmarks/tuning.py --run [SETTING …]    searches that are missing
    python benchmarks/tuning.py --table              what the committed results come to

The search is the one of `loraplus tune` (successive halving, budget 4), on the settings, models and data of rates.py,
with seed 0, which the grid has too. Results: benchmarks/results/tuning.csv, a line a run.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from rates_results import chosen, grid_losses, read
from rates_settings import SETTINGS, Setting

from loraplus.study.search import Point
from loraplus.study.search.grid import lr_of
from loraplus.study.search.halving import Candidate, Halving

RESULTS = Path(__file__).resolve().parent / "results" / "tuning.csv"
COLUMNS = ("setting", "steps", "lr", "lr_ratio", "eval_loss", "seconds")
BUDGET = 4
SEED = 0


def losses_so_far() -> dict[str, dict[Candidate, float]]:
    """{setting: {run: loss}} so far."""
    runs: dict[str, dict[Candidate, float]] = {}
    if RESULTS.exists():
        with RESULTS.open(newline="") as file:
            for row in csv.DictReader(file):
                candidate = Candidate(Point(float(row["lr"]), float(row["lr_ratio"])), int(row["steps"]))
                runs.setdefault(row["setting"], {})[candidate] = float(row["eval_loss"])
    return runs


def search(setting: Setting, losses: dict[Candidate, float]) -> None:
    """Runs what is missing, one after the other, and writes each down."""
    from rates_training import fixed, run

    while runs := Halving(setting.steps, BUDGET).next(losses):
        candidate = runs[0]
        method = fixed(candidate.point.lr, candidate.point.lr_ratio)
        outcome = run(setting, SEED, method, steps=candidate.steps)
        losses[candidate] = outcome.values["eval_loss"]
        new = not RESULTS.exists()
        with RESULTS.open("a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if new:
                writer.writerow(COLUMNS)
            row = (setting.name, candidate.steps, candidate.point.lr, candidate.point.lr_ratio,
                   f"{losses[candidate]:.5f}", f"{outcome.seconds:.1f}")  # fmt: skip
            writer.writerow(row)
            print(*row, flush=True)


def table() -> None:
    """Prints the loss of the pair found over that of the grid's best point."""
    print(f"{'setting':32s} {'found η_A':>10s} {'λ':>5s} {'loss':>8s} {'grid η_A':>10s} {'λ':>5s} {'loss':>8s} "
          f"{'ratio':>7s} {'cost':>5s}")  # fmt: skip
    for name, losses in losses_so_far().items():
        setting, grid = SETTINGS[name], grid_losses(read(name))
        best = Halving(setting.steps).best(losses)
        if best is None or Halving(setting.steps, BUDGET).next(losses):
            print(f"{name:32s} runs are missing")
            continue
        point = min(grid, key=lambda point: grid[point])
        spent = Halving(setting.steps).cost(losses)
        print(f"{name:32s} {best.point.lr:10.3g} {best.point.lr_ratio:5g} {losses[best]:8.4f} {lr_of(point):10.3g} "
              f"{point[0]:5g} {grid[point]:8.4f} {losses[best] / grid[point]:7.4f} {spent:5.2f}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--run", nargs="*", metavar="SETTING")
    action.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.table:
        return table()
    import torch

    torch.set_num_threads(1)
    for setting in chosen(options.run):
        search(setting, losses_so_far().get(setting.name, {}))
    return None


if __name__ == "__main__":
    main()
