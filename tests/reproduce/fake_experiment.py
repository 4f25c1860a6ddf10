"""An experiment without training, importable by worker processes: a parabola whose grid extends until it has its top.

python tests/reproduce/fake_experiment.py reproduce fake …    # the command line, with this experiment registered
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

from loraplus.reproduce.experiment import Experiment
from loraplus.reproduce.registry import EXPERIMENTS
from loraplus.reproduce.report import Figure, HeatMap, LinePlot, Report, Series, Table
from loraplus.study.records import CurvePoint, Record, Run

BEST = 4
DIVERGES_FROM = 6


@dataclass(frozen=True)
class Fake(Experiment):
    name = "fake"
    title = "A parabola <b>"
    claims = ("It has a lowest point.",)
    main_value = "loss"

    def settings(self):
        return {"best": BEST}

    def next_runs(self, results):
        k = 0
        while True:
            runs = [Run({"kind": "point", "k": k, "lr": 10.0**-k, "seed": seed}) for seed in range(self.seeds)]
            if missing := [run for run in runs if run.key not in results]:
                return missing
            if math.isinf(sum(results[run.key].values["loss"] for run in runs)):
                return []
            k += 1

    def run(self, run, on_step):
        """Takes as long as the file `slow` in the data folder says, and notes who did it."""
        note(self.data, f"{os.getppid()} {run.key}")
        slow = Path(self.data) / "slow"
        for step in (1, 2):
            on_step(step, 2, eval_loss=1.0 / step)
            time.sleep(float(slow.read_text()) / 2 if slow.exists() else 0)
        if run["k"] >= DIVERGES_FROM:
            return Record(run, "diverged", values={"loss": math.inf})
        loss = 0.1234567890123 + (run["k"] - BEST) ** 2 + run["seed"] / 100
        rows = tuple({"eta": 10.0**-j, "row_loss": loss + j} for j in range(2))
        return Record(run, "done", curve=(CurvePoint(1, 1.0), CurvePoint(2, loss)), values={"loss": loss}, rows=rows)

    def figures(self, results):
        finite = [result for result in results.values() if result.status == "done"]
        best = min(finite, key=lambda result: result.values["loss"])
        return {"best_k": best.trial["k"], "rows": sum(len(result.rows) for result in finite)}

    def report(self, results, figures):
        line = LinePlot("loss", "k", "loss", [Series("seed 0", [1, 2], [1.0, 2.0], [0.9, 1.8], [1.1, 2.2])], log_x=True)
        heat = HeatMap("map", "x", "y", "loss", [0.1, 1.0], [0.1, 1.0], [[1.0, None], [2.0, 3.0]], [("best", 0.1, 0.1)])
        table = Table("Points", ("k", "loss"), [[figures["best_k"], 0.25], ["<i>", None]])
        return Report([f"The best k is {figures['best_k']}."], [table, Figure("curve", "Loss", [line, heat])])


def note(folder: str, line: str) -> None:
    with (Path(folder) / "noted").open("a") as file:
        file.write(line + "\n")


def noted(folder: Path) -> list[list[str]]:
    return [line.split(" ", 1) for line in (folder / "noted").read_text().splitlines()]


EXPERIMENTS["fake"] = "reproduce.fake_experiment:Fake"

if __name__ == "__main__":
    from loraplus.cli import main

    main()
