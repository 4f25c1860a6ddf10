"""Bad input by the thousand: every reader of other people's files gets changed and invented ones.

    python benchmarks/faults/bad_input.py --inputs 100000 --output benchmarks/results/faults/bad-input.json

Right is what is read, or refused with an error of loraplus in one line of at most 500 characters, within ten seconds.
All else is a failure: another exception, a longer message, a process that dies or does not come back. The same seed
makes the same inputs. The output is written after every few thousand; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
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
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parent))

BLOCK = 2500
"""Inputs of one process."""
SECONDS, GIVEN_UP = 10.0, 120.0
"""Of processor time for one input, and by the clock, which counts what other programs do."""
MEMORY = 48 * 2**30
"""Addresses of one process, most of which torch reserves and does not use."""
PACKAGES = ("torch", "transformers", "peft", "tokenizers", "safetensors", "pyarrow", "datasets", "PyYAML", "hypothesis")


def one_input(reader: Any, name: str, content: bytes, work: Path) -> tuple[str, str, float]:
    """(what came of it: read, refused, failed; why; seconds)"""
    from loraplus.errors import LoraPlusError

    for other, good in reader.seeds.items():
        path = work / other
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if other == name else good)
    started, clock = time.process_time(), time.monotonic()
    why = ""
    try:
        reader.read(work, name)
        result = "read"
    except LoraPlusError as error:
        message = str(error)
        result = "refused" if len(message) <= error.longest and len(message.splitlines()) == 1 else "failed"
        why = message if result == "refused" else f"message of {len(message)} characters: {message[:200]!r}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        result = "failed"
        place = traceback.extract_tb(error.__traceback__)[-1]
        why = f"{type(error).__name__}: {str(error)[:200]} ({place.filename.rpartition('/')[2]}:{place.lineno})"
    seconds, waited = time.process_time() - started, time.monotonic() - clock
    if seconds > SECONDS or waited > GIVEN_UP:
        result, why = "failed", f"{seconds:.1f} s of processor time, {waited:.1f} s in all"
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

    all_readers = readers(models)
    for reader in all_readers:
        _check_good(reader)
    weighted = [reader for reader in all_readers for _ in range(reader.share)]

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
    command = [sys.executable, __file__, "--block", str(seed), "--inputs", str(count), "--models", str(models)]
    limit = lambda: resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))  # noqa: E731
    ended = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit)
    try:
        return json.loads(ended.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        why = f"the process ended with {ended.returncode}: {' '.join(ended.stderr.split()[-60:])}"
        failure = {"reader": "?", "file": f"block {seed}", "why": why, "input": ""}
        return {"counts": {"?": {"failed": 1}}, "failures": [failure], "slowest": {"seconds": 0.0, "reader": ""},
                "peak_mb": 0}  # fmt: skip


@dataclass
class Result:
    """What came of all inputs so far; as JSON, the output."""

    command: str
    seed: int
    block: int = BLOCK
    blocks: int = 0
    inputs: int = 0
    read: int = 0
    refused_in_one_line: int = 0
    failures: int = 0
    slowest_call: dict[str, Any] = field(default_factory=lambda: {"seconds": 0.0, "reader": ""})
    peak_mb: int = 0
    seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=lambda: {name: version(name) for name in PACKAGES})
    readers: dict[str, dict[str, int]] = field(default_factory=dict)
    failed: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, output: Path | None, seed: int) -> Result:
        """The one that was written by the same command, or a new one."""
        if output is not None and output.exists():
            earlier = cls(**json.loads(output.read_text(encoding="utf-8")))
            if (earlier.seed, earlier.block) != (seed, BLOCK):
                raise SystemExit(f"{output} holds inputs of another seed; name another file")
            return earlier
        return cls(command="", seed=seed)

    def add(self, block: dict[str, Any]) -> None:
        """Counts another block."""
        for reader, results in block["counts"].items():
            self.readers[reader] = dict(Counter(self.readers.get(reader, {})) + Counter(results))
        total: Counter[str] = sum(map(Counter, self.readers.values()), Counter())
        self.inputs, self.failures = total.total(), total["failed"]
        self.read, self.refused_in_one_line = total["read"], total["refused"]
        self.failed = (self.failed + block["failures"])[:200]
        self.slowest_call = max(self.slowest_call, block["slowest"], key=lambda call: call["seconds"])
        self.peak_mb = max(self.peak_mb, block["peak_mb"])
        self.blocks += 1

    def write(self, output: Path | None) -> None:
        """As JSON, whole or not at all."""
        if output is None:
            return
        from loraplus.files.single import write_json

        output.parent.mkdir(parents=True, exist_ok=True)
        write_json(output, {**asdict(self), "readers": dict(sorted(self.readers.items()))})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--inputs", type=int, default=2000, help=f"how many; in whole blocks of {BLOCK}")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    parser.add_argument("--block", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--models", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.block is not None:
        from loraplus.cli.console import quiet_libraries

        quiet_libraries()
        print(json.dumps(one_block(options.models, options.inputs, options.block)))
        return 0
    result = Result.of(options.output, options.seed)
    result.command = " ".join(["python benchmarks/faults/bad_input.py", *sys.argv[1:]])
    with tempfile.TemporaryDirectory(prefix="bad-input-models-") as scratch:
        while result.inputs < options.inputs:
            started = time.monotonic()
            wanted = min(BLOCK, options.inputs - result.inputs)
            block = _in_a_process(options.models or Path(scratch), wanted, options.seed * 10_000 + result.blocks)
            result.add(block)
            result.seconds = round(result.seconds + time.monotonic() - started)
            result.write(options.output)
            for failure in block["failures"]:
                print(f"{failure['reader']}, {failure['file']}: {failure['why']}")
            print(f"{result.inputs:,} inputs, {result.failures} failures, {result.seconds:.0f} s", flush=True)
    print(
        f"{result.inputs:,} inputs: {result.refused_in_one_line:,} refused in one line, {result.read:,} read, "
        f"{result.failures} failures; slowest {result.slowest_call['seconds']:.1f} s "
        f"({result.slowest_call['reader']}), peak {result.peak_mb} MB"
    )
    return 1 if result.failures else 0


if __name__ == "__main__":
    sys.exit(main())
