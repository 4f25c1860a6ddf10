"""Memory of training on millions of rows, and over many thousand steps.

    python benchmarks/faults/long_and_large.py rows --rows 5000000 --output benchmarks/results/faults/large-data.json
    python benchmarks/faults/long_and_large.py rows --task sft --output benchmarks/results/faults/large-data-sft.json
    python benchmarks/faults/long_and_large.py rows --task lm --output benchmarks/results/faults/large-data-lm.json
    python benchmarks/faults/long_and_large.py steps --steps 20000 --output benchmarks/results/faults/long-runs.json

rows: a file of so many rows of some fifty characters is made (classification: a CSV of labelled texts; sft: prompts
with completions, one JSON object a line; lm: lines of text), and `loraplus train` is run on it with a small model, to
its first steps. Told are the peak of the process's memory and the time to the first step, for a hundredth of the rows
and for all; the difference by rows is what a row takes.

steps: `LoraPlusTrainer` trains a small encoder, with fixed and with automatic rates, and writes a checkpoint now and
then. The memory is read at twenty points; told are the readings after the first quarter, and the slope of
the line through them.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import small
from transformers import TrainerCallback

from loraplus.tasks.config import TrainConfig
from loraplus.tasks.train import train

_WORDS = "a film indeed fine great dull poor the plot music story was very quite".split()
_WARM = 0.25


def memory(name: str) -> float:
    """Megabytes that /proc tells of this process: VmHWM is the peak, VmRSS what it has now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(round(int(line.split()[1]) / 1024, 1) for line in lines if line.startswith(f"{name}:"))


def _texts(rows: int) -> Iterator[tuple[str, str]]:
    """Texts that differ, each with one of three classes."""
    draw = random.Random(0)
    for number in range(rows):
        yield f"{' '.join(draw.choices(_WORDS, k=8))} {number}", draw.choice(("good", "bad", "so-so"))


def _write(task: str, folder: Path, rows: int) -> Path:
    """A file of so many rows in the format of a task."""
    name, head, line = {
        "classification": ("data.csv", "text,label\n", "{0},{1}\n"),
        "sft": ("data.jsonl", "", '{{"prompt": "{0}", "completion": " {1}"}}\n'),
        "lm": ("data.txt", "", "{0} {1}\n"),
    }[task]
    with (folder / name).open("w") as file:
        file.write(head)
        file.writelines(line.format(*row) for row in _texts(rows))
    return folder / name


class FirstStep(TrainerCallback):
    """Notes when the first step begins, and the memory then."""

    def __init__(self) -> None:
        self.measured: dict[str, Any] = {"megabytes_before": memory("VmHWM")}
        self._wall, self._processor = time.perf_counter(), time.process_time()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.measured.setdefault("seconds_to_first_step", round(time.perf_counter() - self._wall, 1))
        self.measured.setdefault("processor_seconds_to_first_step", round(time.process_time() - self._processor, 1))
        self.measured.setdefault("megabytes_at_first_step", memory("VmHWM"))


def train_on(task: str, rows: int) -> dict[str, Any]:
    """A few steps on a table of so many rows."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = _write(task, folder, rows)
        model = (small.encoder if task == "classification" else small.llama)(folder / "model")
        first = FirstStep()
        config = TrainConfig(
            task=task, model=str(model), data=str(data), output=str(folder / "run"), max_steps=20,
            max_eval_samples=1000,
        )  # fmt: skip
        metrics = train(config, callbacks=[first])
        return {
            "task": task, "rows": rows, "bytes": data.stat().st_size,
            "train_examples": metrics["data"]["train_examples"], **first.measured, "megabytes_at_most": memory("VmHWM"),
        }  # fmt: skip


class Readings(TrainerCallback):
    """Reads the memory every so many steps."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.megabytes: list[tuple[int, float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.every == 0:
            self.megabytes.append((state.global_step, memory("VmRSS")))


def train_long(steps: int, lr: str) -> dict[str, Any]:
    """Many steps, with twenty evaluations, a checkpoint at each."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data, model = small.texts(folder / "data.csv", 400), small.encoder(folder / "model")
        readings = Readings(steps // 20)
        begun = time.perf_counter()
        config = TrainConfig(
            model=str(model), data=str(data), output=str(folder / "run"), max_steps=steps, eval_steps=steps // 20,
            batch_size=8, lr=lr if lr == "auto" else float(lr),
        )  # fmt: skip
        train(config, callbacks=[readings])
        seconds = time.perf_counter() - begun
    warm = [(step, megabytes) for step, megabytes in readings.megabytes if step > steps * _WARM]
    slope = float(np.polyfit([step for step, _ in warm], [megabytes for _, megabytes in warm], 1)[0])
    return {
        "lr": lr, "steps": steps, "checkpoints": 20, "seconds": round(seconds), "megabytes": readings.megabytes,
        "megabytes_per_1000_steps": round(1000 * slope, 3),
    }  # fmt: skip


def _in_process(kind: str, *arguments: str) -> dict[str, Any]:
    """One case in a process of its own, so that its memory is its own."""
    command = [sys.executable, __file__, kind, "--one", *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        sys.exit(result.stderr)
    print(result.stdout.splitlines()[-1], flush=True)
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("rows", "steps"))
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--task", choices=("classification", "sft", "lm"), default="classification")
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--lr", default="2e-4")
    parser.add_argument("--one", action="store_true", help="a single case, in this process")
    parser.add_argument("--output")
    options = parser.parse_args()
    if options.one:
        rows = options.kind == "rows"
        print(json.dumps(train_on(options.task, options.rows) if rows else train_long(options.steps, options.lr)))
        return
    result: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]), "machine": platform.machine(), "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "pyarrow")},
    }  # fmt: skip
    if options.kind == "rows":
        few_and_many = (options.rows // 100, options.rows)
        cases = [_in_process("rows", "--task", options.task, "--rows", str(rows)) for rows in few_and_many]
        few, many = cases
        more = many["megabytes_at_most"] - few["megabytes_at_most"]
        result |= {"runs": cases, "bytes_of_memory_per_row": round(more * 2**20 / (many["rows"] - few["rows"]))}
    else:
        result["runs"] = [
            _in_process("steps", "--steps", str(options.steps), "--lr", lr) for lr in (options.lr, "auto")
        ]
    text = json.dumps(result, indent=1) + "\n"
    if options.output:
        Path(options.output).write_text(text)


if __name__ == "__main__":
    main()
