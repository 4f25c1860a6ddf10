"""Every flag that takes a number, at values that no run can have: each must be taken or refused in one line.

    python benchmarks/faults/flag_numbers.py --commands train,generate

`train`, `compare` and `tune` are asked with --check, so nothing is trained for longer than four steps.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import small

from loraplus.cli.main import main as loraplus
from loraplus.tasks.config import CompareConfig, TrainConfig, TuneConfig

VALUES = (
    "1e400",
    "nan",
    "inf",
    "-1",
    "0",
    "1e-320",
    "1e308",
    "9" * 400,
    "9" * 5000,
    str(2**63),
    str(2**31),
    "\x1b[31m1",
)
CONFIGS = {"train": TrainConfig, "compare": CompareConfig, "tune": TuneConfig}
OTHERS = {"generate": "max-new-tokens temperature top-p seed num-samples batch-size", "reproduce": "seeds workers"}
LONGEST = 500
SECONDS = 60


class LateError(BaseException):
    """A command that does not end."""


def flags_of(command: str) -> list[str]:
    """The flags of a command that take a number."""
    if command in OTHERS:
        return OTHERS[command].split()
    fields = dataclasses.fields(CONFIGS[command])
    return [field.name.replace("_", "-") for field in fields if "int" in str(field.type) or "float" in str(field.type)]


def command_line(command: str, folder: Path) -> list[str]:
    """A command that would do, with small models and data."""
    if command == "generate":
        return [command, "--model", str(folder / "llama"), "--prompt", "is film", "--max-new-tokens", "2", "--plain"]
    if command == "reproduce":
        return [command, "toy", "--dry-run", "--output", str(folder / "toy"), "--plain"]
    given = ["--model", str(folder / "bert"), "--data", str(folder / "d.csv"), "--output", str(folder / "out")]
    return [command, *given, "--max-steps", "1", "--batch-size", "4", "--rank", "2", "--plain", "--check"]


def fault_of(arguments: list[str]) -> str | None:
    """What is wrong with how a command ended; None if it went well or was refused in one line."""

    def late(*_: Any) -> None:
        raise LateError

    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (io.TextIOWrapper(io.BytesIO(), "utf-8") for _ in streams)
    signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    code: object = 0
    try:
        loraplus(arguments)
    except SystemExit as ended:
        code = ended.code
    except LateError:
        return f"no end within {SECONDS} s"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:80]}"
    finally:
        signal.alarm(0)
        sys.stderr.flush()
        said = sys.stderr.buffer.getvalue().decode().strip().splitlines() or [""]
        sys.stdout, sys.stderr = streams
    if any(len(line) > LONGEST or "\x1b" in line for line in said):
        return "a line that is too long, or holds an escape code"
    if code not in (0, 2) or (code == 2 and not any(line.startswith("loraplus: ") for line in said)):
        return f"exit code {code}: {said[-1][:80]}"
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commands", default=",".join([*CONFIGS, *OTHERS]))
    parser.add_argument("--output", type=Path, help="JSON file for the counts")
    options = parser.parse_args()
    tried, failed = 0, 0
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        small.encoder(folder / "bert")
        small.llama(folder / "llama")
        small.texts(folder / "d.csv")
        for command in options.commands.split(","):
            for flag in flags_of(command):
                for value in VALUES:
                    fault = fault_of([*command_line(command, folder), f"--{flag}", value])
                    tried, failed = tried + 1, failed + (fault is not None)
                    if fault:
                        print(f"{command} --{flag} {value[:12]!r}: {fault}", flush=True)
    print(f"{tried} tried, {failed} failed")
    if options.output:
        options.output.write_text(json.dumps({"commands": options.commands, "tried": tried, "failed": failed}) + "\n")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
