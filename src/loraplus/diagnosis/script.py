"""`loraplus doctor -- python train.py …`: runs a script as it is until its first steps, and stops it there."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import loraplus
from loraplus.diagnosis.diagnosis import Diagnosis, some
from loraplus.errors import InputError

VARIABLE = "LORAPLUS_DOCTOR"
SO_FAR = ".so_far"
"""Of the file of a process that goes on."""
STOPPED = ".stopped.json"
"""Of the file of a process that waits to be ended."""
_SECONDS_TO_END = 10.0  # that other processes of a launcher are given once one has written what it found
_LARGEST_READ = 2**20
_TEXTS = {".py", ".yaml", ".yml", ".json", ".toml", ".sh"}
_NAMES = re.compile(r"lora ?\+|lora_?plus|lorap_|lr_?ratio|\bratio\s*=\s*[1-9]", re.IGNORECASE)
_ASKED = re.compile(r"^--?(?:loraplus|lora_plus|lorap)?[-_]?lr[-_]ratio(?:=(.*))?$")


def diagnose_script(command: Sequence[str], *, steps: int, lr_ratio: float | None = None) -> Diagnosis:
    """Runs a command until its optimizers have taken some steps, ends it with all that it started, says what it saw.

    The script is not changed. What it prints goes to standard error. Nothing of what it would do after those steps is
    done: no checkpoint, no save at its end.

    Args:
        command: `python train.py --flags`, `torchrun …`, `accelerate launch …`, or `train.py --flags`. A bare `python`
            is the one that loraplus runs in.
        steps: of an optimizer, at a rate above 0, that are watched.
        lr_ratio: λ that it should have; None: what the command line says, else whatever it is.

    Raises:
        InputError: the command cannot be started, takes no step, or what it trains cannot be read.
    """
    command = _runnable(command)
    with tempfile.TemporaryDirectory(prefix="loraplus-doctor-") as folder:
        settings = {
            "folder": folder,
            "package": str(Path(loraplus.__file__).resolve().parent),
            "steps": steps,
            "source": " ".join(command),
            "lr_ratio": lr_ratio,
            "asked": _asked(command),
            "named": _named(command),
        }
        code = _run(command, settings, Path(folder))
        contents = _results(Path(folder))
    if not contents:
        ended = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        raise InputError(
            f"`{' '.join(command)}` {ended} before an optimizer of torch took a step, so there is nothing to see; "
            "does it train when it is run by itself?"
        )
    content = contents[0]
    if code and not any(optimizer["steps"] for optimizer in content.get("optimizers", ())):
        raise InputError(
            f"`{' '.join(command)}` ended with exit code {code} before its first step; see what it printed"
        )
    if "refused" in content:
        raise InputError(content["refused"])
    if "failed" in content:
        raise InputError(f"the script's optimizers could not be read ({content['failed']})")
    diagnosis = Diagnosis.from_dict(content)
    taken = max((optimizer.steps for optimizer in diagnosis.optimizers), default=0)
    if code and taken < steps:
        said = f"the command ended by itself after {some(taken, 'step')}, with exit code {code}; see what it printed"
        diagnosis = replace(diagnosis, notes=(*diagnosis.notes, said))
    return diagnosis


def _runnable(command: Sequence[str]) -> list[str]:
    """The command with a Python before a bare script.

    Raises:
        InputError: there is no such program or script.
    """
    first, *rest = command
    if first.endswith(".py") and Path(first).is_file() and not os.access(first, os.X_OK):
        return [sys.executable, first, *rest]
    if shutil.which(first, path=_search_path()) is None:
        raise InputError(f"{first}: no such program; give the whole command: loraplus doctor -- python train.py …")
    if Path(first).name.startswith("python"):
        script = next((word for word in rest if not word.startswith("-")), None)
        is_script = script is not None and rest[0] == script and script.endswith(".py")
        if is_script and script is not None and not Path(script).is_file():
            raise InputError(f"{script}: no such file")
    return list(command)


def _search_path() -> str:
    """PATH, with the programs of this environment first, as if it were activated."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def _run(command: list[str], settings: dict[str, Any], folder: Path) -> int:
    """Runs a command until it ends or has been seen; the exit code."""
    startup = str(Path(settings["package"], "diagnosis", "startup"))
    environment = {
        **os.environ,
        "PATH": _search_path(),
        "PYTHONPATH": os.pathsep.join(filter(None, [startup, os.environ.get("PYTHONPATH")])),
        VARIABLE: json.dumps(settings),
    }
    sys.stderr.flush()  # the script writes there, too
    program = shutil.which(command[0], path=environment["PATH"]) or command[0]
    process = subprocess.Popen(
        command, executable=program, env=environment, stdout=2,
        stdin=subprocess.DEVNULL if sys.stdin is None or sys.stdin.isatty() else None,  # in a session of its own
        start_new_session=True,
    )  # fmt: skip
    try:
        seen_at = None
        while process.poll() is None:
            if seen_at is None and any(folder.glob("*.json")):
                seen_at = time.monotonic()
            if any(folder.glob(f"0-*{STOPPED}")):  # nothing is left to wait for: rank 0 is the one that is shown
                break
            if seen_at is not None and time.monotonic() - seen_at > _SECONDS_TO_END:
                break
            time.sleep(0.05)
        return process.poll() or 0
    finally:
        _end(process, str(folder))


def _end(process: subprocess.Popen[bytes], mark: str) -> None:
    """Ends a process with all that it started, in sessions of their own too."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        others = list(_marked(mark))
        for pid in others:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)
        if number is signal.SIGTERM and (others or process.poll() is None):
            time.sleep(0.5)
    process.wait()


def _marked(mark: str) -> Iterator[int]:
    """Processes whose environment has our variable with this folder in it, where the system tells."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            environment = (entry / "environ").read_bytes()
        except OSError:  # another user's, or gone
            continue
        if VARIABLE.encode() in environment and mark.encode() in environment:
            yield int(entry.name)


def _results(folder: Path) -> list[dict[str, Any]]:
    """What the processes wrote; that of rank 0 first, and what was read before what was refused.

    A process that ended without a word (`os._exit`, a signal) has left what its last step showed.
    """
    written = list(folder.glob("*.json")) or list(folder.glob(f"*{SO_FAR}"))
    paths = sorted(written, key=lambda path: int(path.stem.partition("-")[0]))
    contents = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    return sorted(contents, key=lambda content: "verdict" not in content)


def _asked(command: Sequence[str]) -> float | None:
    """The λ that the command line names."""
    for word, following in zip(command, [*command[1:], ""], strict=True):
        match = _ASKED.match(word)
        if match:
            try:
                return float(following if match[1] is None else match[1])
            except ValueError:
                return None
    return None


def _named(command: Sequence[str]) -> str:
    """Which of the files and flags of a command speaks of a ratio; "" if none does."""
    for word in command[1:]:
        if word.startswith("-") and _NAMES.search(word):
            return f"the command line says {word}"
    for word in command[1:]:
        path = Path(word.partition("=")[2] or word)
        try:
            if path.suffix not in _TEXTS or not path.is_file():
                continue
            match = _NAMES.search(path.read_text(encoding="utf-8", errors="replace")[:_LARGEST_READ])
        except OSError:
            continue
        if match:
            return f"{path.name} speaks of {match[0]!r}"
    return ""
