"""Kills compare, tune and reproduce anywhere, resumes them, and compares what they leave with an uninterrupted run.

    python benchmarks/faults/kill_studies.py --minutes 20 --output benchmarks/results/faults/kill-studies.json

Each command is killed (SIGKILL to it and its workers) at random moments and before each file operation under its
output folder, then run again with --resume. Right is: the resumed run ends well; results are those of the uninterrupted
run but for times; no run that had finished is done again; nothing of a file half written is left. What has been tried
is in --output and is not tried again, so that a longer run can be had in parts.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent))
from forks import Ended
from forks import run as fork
from small import encoder, texts

from loraplus.files.whole import TEMPORARY
from loraplus.study.records import KEY

TIMES = ("seconds", "cost", "training_seconds", "config", "train_command")
SMALL = ["--max-steps", "4", "--eval-steps", "2", "--batch-size", "4", "--workers", "1", "--plain"]
COMMANDS = {
    "compare": ["compare", *SMALL, "--tuning-runs", "2", "--seeds", "2"],
    "tune": ["tune", *SMALL, "--tuning-runs", "2"],
    "reproduce": ["reproduce", "coordinates", "--seeds", "1", "--workers", "1", "--plain"],
}
RESULTS = ("summary.json", "runs.csv", "tune.json", "trials.csv", "best.yaml")


def loraplus(arguments: Sequence[str]) -> None:
    from loraplus.cli import main

    main(list(arguments))


def preload() -> None:
    """Imports what the runs need, and computes nothing: threads do not survive a fork."""
    import torch

    torch.set_num_threads(1)
    import loraplus.cli.console
    import loraplus.compare
    import loraplus.reproduce.command
    import loraplus.reproduce.coordinates
    import loraplus.study.tune
    import loraplus.tasks.classification  # noqa: F401


def fork_workers() -> None:
    """Workers are forked instead of started anew, which takes ten times as long."""
    context = multiprocessing.get_context("fork")
    multiprocessing.get_context = lambda method=None: context


def run(kind: str, work: Path, output: Path, *, resume: bool = False, operation: int | None = None,
        seconds: float | None = None) -> Ended:  # fmt: skip
    """The command; what it was asked to be killed at ends its workers, too."""
    data = [] if kind == "reproduce" else ["--model", str(work / "m"), "--data", str(work / "d.csv")]
    arguments = [*COMMANDS[kind], *data, "--output", str(output), *(["--resume"] if resume else [])]
    return fork(loraplus, arguments, output, operation=operation, seconds=seconds, before=fork_workers, group=True)


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(inner) for key, inner in value.items() if not key.startswith(TIMES)}
    return [without_times(inner) for inner in value] if isinstance(value, list) else value


def results(output: Path) -> dict[str, Any]:
    """What a study has left, without times and names of folders."""
    contents: dict[str, Any] = {}
    for path in (output / name for name in RESULTS):
        if path.exists():
            text = path.read_text()
            whole = list(csv.DictReader(text.splitlines())) if path.suffix == ".csv" else yaml.safe_load(text)
            contents[path.name] = without_times(whole if isinstance(whole, list) else {
                key: value for key, value in whole.items() if key != "output"})  # fmt: skip
    return contents


def repeated(journal: Path) -> list[str]:
    """Runs that were begun again although they had finished."""
    keys, done, again = [], set(), []
    for line in map(json.loads, journal.read_text().splitlines()):
        if line["op_code"] == 4:
            keys.append(line["user_attrs"][KEY])
            again += [keys[-1]] if keys[-1] in done else []
        elif line["op_code"] == 6 and line["state"] in (1, 3):
            done.add(keys[line["trial_id"]])
    return again


def wrong(kind: str, work: Path, output: Path, expected: dict[str, Any]) -> str:
    """What is wrong after a kill and --resume; empty if nothing is."""
    resume = output.exists() and (output / "config.yaml").exists()
    ended = run(kind, work, output, resume=resume)
    if ended.code:
        return f"exit code {ended.code}: {ended.output.strip()[-300:]}"
    if results(output) != expected:
        return "other results"
    if again := repeated(output / "study.journal"):
        return f"done again: {', '.join(again)}"
    left = [path.name for path in output.rglob("*") if TEMPORARY.fullmatch(path.name)]
    return f"left: {', '.join(left)}" if left else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--kinds", default=",".join(COMMANDS))
    parser.add_argument("--output", required=True)
    options = parser.parse_args()
    deadline, output = time.monotonic() + 60 * options.minutes, Path(options.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    outcomes: dict[str, Any] = json.loads(output.read_text())["tried"] if output.exists() else {}
    work = Path(tempfile.mkdtemp(prefix="kill-studies-"))
    preload()
    try:
        texts(work / "d.csv")
        encoder(work / "m")
        state = {}
        for kind in options.kinds.split(","):
            ended = run(kind, work, work / kind)
            if ended.code:
                raise SystemExit(f"{kind}: {ended.output}")
            state[kind] = (results(work / kind), ended.seconds, ended.operations)
        draw = random.Random(sum(map(len, outcomes.values())))
        while time.monotonic() < deadline:
            kind = draw.choice(list(state))
            expected, seconds, operations = state[kind]
            tried = outcomes.setdefault(kind, {})
            left = [n for n in range(1, operations + 1) if f"operation {n}" not in tried]
            folder = work / "killed"
            if left and draw.random() < 0.8:
                number = draw.choice(left)
                run(kind, work, folder, operation=number)
                name = f"operation {number}"
            else:
                moment = draw.uniform(0.3, 1) * seconds
                run(kind, work, folder, seconds=moment)
                name = f"random {len(tried)}: second {moment:.2f}"
            tried[name] = wrong(kind, work, folder, expected) or "survived"
            shutil.rmtree(folder, ignore_errors=True)
            totals = {kind: {"kills": len(all), "survived": sum(how == "survived" for how in all.values())}
                      for kind, all in outcomes.items()}  # fmt: skip
            command = "python benchmarks/faults/kill_studies.py --output ..."
            text = json.dumps({"command": command, "file_operations": {k: s[2] for k, s in state.items()},
                               "totals": totals, "tried": outcomes}, indent=1)  # fmt: skip
            output.write_text(text + "\n")
            print(kind, name, tried[name], flush=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    sys.exit(any(how != "survived" for tried in outcomes.values() for how in tried.values()))


if __name__ == "__main__":
    main()
