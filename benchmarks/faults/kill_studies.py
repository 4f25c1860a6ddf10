"""Kills compare, tune and reproduce anywhere, resumes them, and compares what they leave with an uninterrupted run.

    python benchmarks/faults/kill_studies.py --minutes 20 --output benchmarks/results/faults/kill-studies.json

Each command is killed (SIGKILL to it and its workers) at random moments and before each file operation under its
output folder, then run again with --resume. Right is: the resumed run ends well; results are those of the uninterrupted
run but for times; no run that had finished is done again; nothing of a file half written is left. What has been tried
is in --output and is not tried again, so that a longer run can be had in parts.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent))
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
OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link")


def in_child(arguments: list[str], output: Path, operation: int | None) -> None:
    """The command, which kills itself and its workers before file operation number `operation` under its output."""
    done = 0

    def watch(event: str, details: tuple[Any, ...]) -> None:
        nonlocal done
        if event in OPERATIONS and any(isinstance(at, (str, os.PathLike)) and str(output) in str(at) for at in details):
            done += 1
            if done == operation:
                os.killpg(0, signal.SIGKILL)

    sys.addaudithook(watch)
    from loraplus.cli.main import main

    try:
        main(arguments)
    finally:
        print(f"operations: {done}", file=sys.stderr)


def run(kind: str, work: Path, output: Path, *, resume: bool = False, operation: int = 0,
        seconds: float | None = None) -> tuple[int, str]:  # fmt: skip
    """(exit code, what was said)"""
    data = [] if kind == "reproduce" else ["--model", str(work / "m"), "--data", str(work / "d.csv")]
    arguments = [*COMMANDS[kind], *data, "--output", str(output), *(["--resume"] if resume else [])]
    command = [sys.executable, __file__, "--child", str(output), str(operation), "--", *arguments]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                             start_new_session=True)  # fmt: skip
    try:
        said, _ = child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        said, _ = child.communicate()
    return child.returncode, said


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(inner) for key, inner in value.items() if not key.startswith(TIMES)}
    return [without_times(inner) for inner in value] if isinstance(value, list) else value


def results(output: Path) -> dict[str, Any]:
    """What a study has left, without times and names of folders."""
    found: dict[str, Any] = {}
    for path in (output / name for name in RESULTS):
        if path.exists():
            text = path.read_text()
            whole = list(csv.DictReader(text.splitlines())) if path.suffix == ".csv" else yaml.safe_load(text)
            found[path.name] = without_times(whole if isinstance(whole, list) else {
                key: value for key, value in whole.items() if key != "output"})  # fmt: skip
    return found


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
    code, said = run(kind, work, output, resume=resume)
    if code:
        return f"exit code {code}: {said.strip()[-300:]}"
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
    found: dict[str, Any] = json.loads(output.read_text())["tried"] if output.exists() else {}
    work = Path(tempfile.mkdtemp(prefix="kill-studies-"))
    try:
        texts(work / "d.csv")
        encoder(work / "m")
        state = {}
        for kind in options.kinds.split(","):
            started = time.monotonic()
            code, said = run(kind, work, work / kind)
            if code:
                raise SystemExit(f"{kind}: {said}")
            counts = [line for line in said.splitlines() if line.startswith("operations: ")]
            state[kind] = (results(work / kind), time.monotonic() - started, int(counts[-1].split()[1]))
        draw = random.Random(sum(map(len, found.values())))
        while time.monotonic() < deadline:
            kind = draw.choice(list(state))
            expected, seconds, operations = state[kind]
            tried = found.setdefault(kind, {})
            left = [n for n in range(1, operations + 1) if f"operation {n}" not in tried]
            folder = work / "killed"
            if left and draw.random() < 0.6:
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
                      for kind, all in found.items()}  # fmt: skip
            command = "python benchmarks/faults/kill_studies.py --output ..."
            text = json.dumps({"command": command, "file_operations": {k: s[2] for k, s in state.items()},
                               "totals": totals, "tried": found}, indent=1)  # fmt: skip
            output.write_text(text + "\n")
            print(kind, name, tried[name], flush=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    sys.exit(any(how != "survived" for tried in found.values() for how in tried.values()))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        in_child(sys.argv[5:], Path(sys.argv[2]), int(sys.argv[3]) or None)
    else:
        main()
