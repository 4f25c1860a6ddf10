"""Bad input by the thousand: every reader of other people's files gets changed and invented ones.

    python benchmarks/faults/bad_input.py --count 100000 --output benchmarks/results/faults/bad-input.json

Right is what is read, or refused with an error of loraplus in one line of at most 500 characters, within ten seconds.
All else is a failure: another exception, a longer message, a process that dies or does not come back. The same seed
makes the same inputs.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parent))

BLOCK = 2500
"""Inputs of one process."""
SECONDS, GIVEN_UP = 10.0, 120.0
MEMORY = 6 * 2**30


def one_input(reader: Any, name: str, content: bytes, work: Path) -> tuple[str, str, float]:
    """(what came of it: read, refused, failed; why; seconds)"""
    from loraplus.errors import LONGEST_MESSAGE, LoraPlusError

    for other, good in reader.seeds.items():
        path = work / other
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if other == name else good)
    started = time.monotonic()
    why = ""
    try:
        reader.read(work, name)
        result = "read"
    except LoraPlusError as error:
        message = str(error)
        result = "refused" if len(message) <= LONGEST_MESSAGE and len(message.splitlines()) == 1 else "failed"
        why = message if result == "refused" else f"message of {len(message)} characters: {message[:200]!r}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        result = "failed"
        place = traceback.extract_tb(error.__traceback__)[-1]
        why = f"{type(error).__name__}: {str(error)[:200]} ({place.filename.rpartition('/')[2]}:{place.lineno})"
    seconds = time.monotonic() - started
    if seconds > SECONDS:
        result, why = "failed", f"{seconds:.1f} s"
    return result, why, seconds


def _check_good(reader: Any) -> None:
    """Makes sure that a reader takes its files as they are; otherwise it would refuse whatever it is given."""
    work = Path(tempfile.mkdtemp(prefix="bad-input-"))
    for name, good in reader.seeds.items():
        result, why, _ = one_input(reader, name, good, work)
        if result != "read":
            raise SystemExit(f"{reader.name} does not read its own {name}: {result} {why}")
    shutil.rmtree(work)


def try_inputs(models: Path, count: int, seed: int, on_result: Callable[..., None]) -> None:
    """Tries so many inputs and tells what came of each.

    Args:
        models: folder for small good files; filled if it is empty.
        count: inputs.
        seed: the same seed makes the same inputs.
        on_result: called with reader, file, content, result, why, seconds.
    """
    import hypothesis
    from hypothesis import strategies as st
    from mutations import changed, changes
    from readers import readers

    found = readers(models)
    for reader in found:
        _check_good(reader)
    weighted = [reader for reader in found for _ in range(reader.share)]

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count, database=None, deadline=None, phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    @hypothesis.given(data=st.data())
    def run(data: Any) -> None:
        reader = data.draw(st.sampled_from(weighted))
        name = data.draw(st.sampled_from(sorted(reader.seeds)))
        if reader.texts is not None and data.draw(st.booleans()):
            content = data.draw(reader.texts)
        else:
            content = changed(reader.seeds[name], data.draw(changes))
        work = Path(tempfile.mkdtemp(prefix="bad-input-"))
        faulthandler.dump_traceback_later(GIVEN_UP, exit=True)
        try:
            on_result(reader.name, name, content, *one_input(reader, name, content, work))
        finally:
            faulthandler.cancel_dump_traceback_later()
            shutil.rmtree(work, ignore_errors=True)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run()


def one_block(models: Path, count: int, seed: int) -> dict[str, Any]:
    """Counts by reader, failures, and the slowest call of so many inputs."""
    counts: dict[str, Counter[str]] = {}
    failures: list[dict[str, Any]] = []
    slowest = {"seconds": 0.0, "reader": ""}

    def note(reader: str, name: str, content: bytes, result: str, why: str, seconds: float) -> None:
        counts.setdefault(reader, Counter())[result] += 1
        if seconds > slowest["seconds"]:
            slowest.update(seconds=round(seconds, 2), reader=f"{reader}, {name}")
        if result == "failed":
            failures.append({"reader": reader, "file": name, "why": why, "input": content[:400].hex()})

    try_inputs(models, count, seed, note)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return {"counts": counts, "failures": failures, "slowest": slowest, "peak_mb": peak}


def _in_a_process(models: Path, count: int, seed: int) -> dict[str, Any]:
    """One block in a process of its own, so that one that dies is a failure and not the end."""
    command = [sys.executable, __file__, "--block", str(seed), "--count", str(count), "--models", str(models)]
    limit = lambda: resource.setrlimit(resource.RLIMIT_AS, (8 * MEMORY, 8 * MEMORY))  # noqa: E731
    ended = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit)
    try:
        return json.loads(ended.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        why = f"the process ended with {ended.returncode}: {' '.join(ended.stderr.split()[-60:])}"
        failure = {"reader": "?", "file": f"block {seed}", "why": why, "input": ""}
        return {"counts": {"?": {"failed": 1}}, "failures": [failure], "slowest": {"seconds": 0.0, "reader": ""},
                "peak_mb": 0}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--count", type=int, default=2000, help="inputs")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    parser.add_argument("--block", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--models", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.block is not None:
        from loraplus.cli.console import quiet_libraries

        quiet_libraries()
        print(json.dumps(one_block(options.models, options.count, options.block)))
        return 0
    started = time.monotonic()
    counts: dict[str, Counter[str]] = {}
    failures: list[dict[str, Any]] = []
    slowest, peak = {"seconds": 0.0, "reader": ""}, 0
    with tempfile.TemporaryDirectory(prefix="bad-input-models-") as scratch:
        models = options.models or Path(scratch)
        for index, start in enumerate(range(0, options.count, BLOCK)):
            found = _in_a_process(models, min(BLOCK, options.count - start), options.seed * 10_000 + index)
            for reader, results in found["counts"].items():
                counts.setdefault(reader, Counter()).update(results)
            failures += found["failures"]
            for failure in found["failures"]:
                print(f"{failure['reader']}, {failure['file']}: {failure['why']}")
            slowest = max(slowest, found["slowest"], key=lambda call: call["seconds"])
            peak = max(peak, found["peak_mb"])
            total = sum(map(Counter.total, counts.values()))
            print(f"{total:,} inputs, {len(failures)} failures, {time.monotonic() - started:.0f} s", flush=True)
    total: Counter[str] = sum(counts.values(), Counter())
    result = {
        "inputs": total.total(), "refused_in_one_line": total["refused"], "read": total["read"],
        "failures": total["failed"], "seed": options.seed, "slowest_call": slowest, "peak_mb": peak,
        "seconds": round(time.monotonic() - started), "python": platform.python_version(),
        "readers": {name: dict(sorted(found.items())) for name, found in sorted(counts.items())},
        "failed": failures[:200],
    }  # fmt: skip
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(
        f"{result['inputs']:,} inputs: {result['refused_in_one_line']:,} refused in one line, {result['read']:,} read, "
        f"{result['failures']} failures; slowest {slowest['seconds']:.1f} s ({slowest['reader']}), peak {peak} MB"
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
