"""The most memory that a pass over a turn's examples takes over the idle model.

On a GPU the allocator tells. On a CPU a process of its own measures its resident memory, so that:

* every allocation above 64 KiB is mapped from the system and given back at once: resident memory is what tensors hold;
* the weights are read once before, since a model's file is only mapped;
* one pass runs before the measured one, so that model, optimizer's states and libraries count as idle.

The peak is the kernel's own figure.

    python -m loraplus.bench.memory < what.json
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loraplus.bench.arms import Arm
from loraplus.tasks.config import TaskConfig

_MIB = 2**20
_GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def measured(config: TaskConfig, batches: int, arms: list[Arm], seconds: float) -> dict[str, float | str]:
    """MiB over the idle model by arm, or why it was not measured.

    Args:
        config: Model and data.
        batches: Of a turn.
        arms: To measure, one after the other.
        seconds: For all; what is not measured by then says so.
    """
    what = {"config": asdict(config), "batches": batches, "arms": [asdict(arm) for arm in arms]}
    mib_by_arm: dict[str, float | str] = {arm.name: "not measured: no time was left" for arm in arms}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "loraplus.bench.memory"], input=json.dumps(what), capture_output=True, text=True,
            timeout=seconds, env={**os.environ, **_GIVEN_BACK},
        )  # fmt: skip
        lines, last = done.stdout, done.stderr.strip().splitlines()[-1:]
    except subprocess.TimeoutExpired as late:
        output: Any = late.stdout or b""  # bytes, even where text was asked for
        lines, last = output if isinstance(output, str) else output.decode(), []
    for line in lines.splitlines():
        if line.startswith('{"arm"'):
            row = json.loads(line)
            mib_by_arm[row["arm"]] = row["mib"]
    if last and not any(isinstance(value, float) for value in mib_by_arm.values()):
        return dict.fromkeys(mib_by_arm, f"not measured: {last[0]}")
    return mib_by_arm


def _main() -> None:
    from loraplus.bench.prepared import prepare
    from loraplus.files.scratch import scratch_folder

    what = json.loads(sys.stdin.read())
    for options in what["arms"]:
        options["levers"] = tuple(options["levers"])
    prepared = prepare(TaskConfig(**what["config"]), what["batches"])
    with scratch_folder() as output:
        for options in what["arms"]:
            arm = Arm(**options)
            try:
                mib: float | str = _over_idle(arm, prepared, output)
            except Exception as error:
                mib = f"not measured: {type(error).__name__}: {str(error)[:200]}"
            _give_back()
            print(json.dumps({"arm": arm.name, "mib": mib}), flush=True)


def _over_idle(arm: Arm, prepared: Any, output: str) -> float | str:
    """MiB of a pass over what is there before it."""
    import torch

    from loraplus.bench.arms import trainer_of
    from loraplus.bench.runs import Run, ended, steps_of

    on_gpu, new_peak = torch.cuda.is_available(), Path("/proc/self/clear_refs")
    if not on_gpu and not new_peak.exists():
        return "not measured: this system does not tell a process's peak"
    trainer = trainer_of(arm, prepared, output)
    for parameter in trainer.model.parameters():
        parameter.detach().sum()
    with ended(Run(trainer, steps_of(trainer))) as run:
        run.turn()
        _give_back()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            new_peak.write_text("5")
        idle = torch.cuda.memory_allocated() / _MIB if on_gpu else _resident("VmRSS")
        run.turn()
        return round((torch.cuda.max_memory_allocated() / _MIB if on_gpu else _resident("VmHWM")) - idle, 1)


def _give_back() -> None:
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _resident(name: str) -> float:
    """MiB of a line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


if __name__ == "__main__":
    _main()
