"""`loraplus train` killed at each of its file operations and at random moments, then resumed.

    python benchmarks/faults/kill_train.py --kills 200 --output benchmarks/results/faults/kill-train.json

Each run is killed once, or several times in a row, and resumed until it ends. It has survived if it ends with exit code
0 in the bytes of a run that nobody killed, and if no file of its folder was ever half written.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from forks import Ended, run
from small import chats, encoder, llama, texts

FINAL = ("adapter_model.safetensors", "adapter_config.json", "loraplus.json", "data_facts.json", "curves.csv")
KINDS = ("classification", "auto", "accumulation", "sft")


def commands(folder: Path) -> dict[str, list[str]]:
    """A short run of each kind, two passes or more over its data."""
    model, decoder = encoder(folder / "encoder"), llama(folder / "decoder")
    table, talks = texts(folder / "texts.csv"), chats(folder / "chats.jsonl")
    short = ["--max-steps", "14", "--eval-steps", "4", "--batch-size", "8", "--rank", "2", "--plain"]
    classify = ["train", "--model", str(model), "--data", str(table), "--lr", "5e-2", *short]
    return {
        "classification": classify,
        "auto": [*classify[: -2 - len(short)], "--lr", "auto", *short],
        "accumulation": [*classify, "--gradient-accumulation-steps", "2", "--lr-scheduler-type", "constant"],
        "sft": ["train", "--task", "sft", "--model", str(decoder), "--data", str(talks), "--samples", "0", *short],
    }


def loraplus(arguments: list[str]) -> None:
    from loraplus.cli import main

    main(arguments)


def preload() -> None:
    """Imports what the runs need, and computes nothing: threads do not survive a fork."""
    import torch

    torch.set_num_threads(1)
    import loraplus.cli.console
    import loraplus.report.training
    import loraplus.tasks.classification
    import loraplus.tasks.language
    import loraplus.tasks.train  # noqa: F401


def digest(folder: Path) -> dict[str, str]:
    return {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FINAL if (folder / name).exists()
    }


def half_written(folder: Path) -> list[str]:
    """Files under their own names that cannot be read; those of temporary names do not count."""
    from loraplus.files.checkpoints import checkpoint_fault, checkpoints
    from loraplus.files.single import read_json

    bad = [f"{path.name}: {fault}" for path in checkpoints(folder) if (fault := checkpoint_fault(path))]
    for path in folder.glob("*.json"):
        try:
            read_json(path)
        except Exception as error:
            bad.append(str(error))
    return bad


def killed_and_resumed(arguments: list[str], output: Path, kills: list[dict[str, Any]]) -> tuple[Ended, list[str], int]:
    """The run that ended, what was found half written, and how often it was killed in fact."""
    shutil.rmtree(output, ignore_errors=True)
    bad: list[str] = []
    killed = 0
    for kill in kills:
        ended = run(loraplus, [*arguments, "--output", str(output), "--resume"], output, **kill)
        if ended.code != -9:
            return ended, bad, killed
        killed += 1
        bad += half_written(output) if output.exists() else []
    return run(loraplus, [*arguments, "--output", str(output), "--resume"], output), bad, killed


def main() -> None:
    from loraplus.files.single import write_json

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="random ones, over all kinds")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--every", type=int, default=1, help="take each n-th file operation")
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.output:
        options.output = options.output.resolve()
    place = Path(tempfile.mkdtemp(prefix="kill-train-"))
    os.chdir(place)
    preload()
    stop = time.monotonic() + 60 * options.minutes
    draw = random.Random(options.seed)
    tried: Counter[str] = Counter()
    kills_done, failures = 0, []
    everything = commands(place)
    for kind in options.kinds.split(","):
        arguments, output = everything[kind], place / "r"
        shutil.rmtree(output, ignore_errors=True)
        whole = run(loraplus, [*arguments, "--output", str(output)], output)
        assert whole.code == 0, whole.output
        expected = digest(output)
        points = [[{"operation": at}] for at in range(1, whole.operations + 1, options.every)]
        several = options.kills // len(options.kinds.split(","))
        at_random = [{"seconds": draw.uniform(0.02, 1.0) * whole.seconds} for _ in range(several)]
        points += [at_random[start : start + 2] for start in range(0, several, 2)]
        draw.shuffle(points)  # so that a run that is cut short has tried some of each
        for kills in points:
            if time.monotonic() > stop:
                break
            ended, bad, killed = killed_and_resumed(arguments, output, kills)
            kills_done += killed
            tried[f"{kind}, {'file operations' if 'operation' in kills[0] else 'by the clock'}"] += 1
            actual = digest(output)
            if ended.code or bad or actual != expected or "Traceback" in ended.output:
                differing = sorted(name for name in expected if expected[name] != actual.get(name))
                failures.append({"kind": kind, "kills": kills, "code": ended.code, "half_written": bad,
                                 "differing": differing, "says": ended.output[-600:]})  # fmt: skip
                print(json.dumps(failures[-1]), flush=True)
            result = {
                "command": " ".join(["python", "benchmarks/faults/kill_train.py", *sys.argv[1:]]),
                "runs": dict(tried), "kills": kills_done, "survived": sum(tried.values()) - len(failures),
                "lost": failures,
            }  # fmt: skip
            if options.output:
                write_json(options.output, result)
        print(
            f"{kind}: {whole.operations} file operations; {sum(tried.values())} tried, {len(failures)} lost", flush=True
        )
    shutil.rmtree(place)
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
