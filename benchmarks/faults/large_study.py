"""How long a comparison of a thousand stored runs takes to open and to be drawn again.

    python benchmarks/faults/large_study.py --output benchmarks/results/faults/large-study.json

The journal holds 1,000 runs of two arms with ten evaluations each; the 500 tested ones have 500 test results.
What `compare --resume` does with such a study is timed: open it, summarise it, write report.html, runs.csv and
summary.json, in seconds of processor time (one thread). Loading torch, the model and the data is not in it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import tempfile
import time
import unittest.mock
from pathlib import Path
from typing import Any

from loraplus.compare import _write
from loraplus.study.records import ARMS, CurvePoint, Phase, Record, Trial
from loraplus.study.store import StudyStore
from loraplus.study.summary import summarise
from loraplus.tasks.config import CompareConfig

STEPS, TESTED = 200, 500
FACTS = {
    "source": "reviews.csv", "text_column": "text", "label_column": "label", "labels": ["bad", "good"],
    "train_examples": 3200, "validation_examples": 500, "test_examples": TESTED, "duplicates_removed": 0,
    "max_length": 128, "truncated_train_examples": 0, "split_seed": 0, "steps": STEPS,
}  # fmt: skip


def records(count: int) -> list[Record]:
    """Half of them tuning runs, half final ones."""
    draw = random.Random(0)
    runs = []
    for number in range(count):
        arm = ARMS[number % 2]
        phase: Phase = "tuning" if number * 2 < count else "final"
        rate = 10 ** draw.uniform(-4, -2) if phase == "tuning" else 1e-3
        trial = Trial(phase, arm, rate, 16.0 if arm == "loraplus" else 1.0, number // 2)
        curve = tuple(CurvePoint(step, draw.random(), draw.random()) for step in range(20, STEPS + 1, STEPS // 10))
        losses = tuple(draw.random() for _ in range(TESTED if phase == "final" else 0))
        runs.append(Record(trial, "done", STEPS, curve[-1].eval_loss, 0.9, 0.1, curve, losses,
                            tuple(loss < 0.9 for loss in losses)))  # fmt: skip
    return runs


def stored(journal: Path, runs: list[Record]) -> None:
    """Fills a journal; without waiting for the disk, which would take most of the time."""
    store = StudyStore.open(journal, "large")
    with unittest.mock.patch("os.fsync"):
        for record in runs:
            store.start(record.trial)
            store.finish(record)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--output")
    options = parser.parse_args()
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        begun = time.process_time()

        def lap(what: str) -> None:
            nonlocal begun
            now = time.process_time()
            seconds[what], begun = round(now - begun, 2), now

        stored(folder / "study.journal", records(options.runs))
        lap("filling, which is not counted")
        size = (folder / "study.journal").stat().st_size
        store = StudyStore.open(folder / "study.journal", "large", begun=True)
        lap("open")
        in_order = list(store.records().values())
        config: dict[str, Any] = vars(CompareConfig(model="m", data="d", output=name))
        summary = summarise(in_order, config=config, data_facts=FACTS)
        lap("summarise")
        _write(folder, summary, in_order)
        lap("write")
    counted = sum(value for what, value in seconds.items() if "not counted" not in what)
    result = {
        "command": " ".join(["python", *sys.argv]), "machine": platform.machine(), "cores": os.cpu_count(),
        "runs": len(in_order), "journal_bytes": size, "seconds": seconds, "in_all": round(counted, 2),
    }  # fmt: skip
    text = json.dumps(result, indent=2) + "\n"
    print(text)
    if options.output:
        Path(options.output).write_text(text)


if __name__ == "__main__":
    main()
