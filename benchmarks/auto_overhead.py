"""What automatic rates cost: processor time a step, and peak memory, beside the same run at fixed rates.

    python benchmarks/auto_overhead.py [SETTING …] [--steps 100] [--pairs 5]

Both kinds of run are interleaved, each in a process of its own; the figures are medians over the pairs. What a measured
step takes beside one that is not (it may be watched for growth) is of one and the same run, so that it holds where
whole runs are too noisy to compare.
Two memories are told: what the process has from the system, and what of it is in use. The C library keeps memory that
was freed between blocks still in use, so the first is larger; the second is of further, short runs in which it gives
everything back (MALLOC_MMAP_THRESHOLD_). deep224 has 256 tokens in a batch, of which a measurement keeps half;
deep224-b16 has 2,048.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from statistics import median
from typing import Any

from rates_results import chosen
from rates_settings import Setting

DEFAULT = ["deep224", "deep224-b16", "minilm-products-b8", "lm64-editorials-linear-dropout"]
MEMORY_STEPS = 13  # ten are measured
DEEP = {
    setting.name: setting
    for setting in (
        Setting("deep224", "tuned", "random-256", "deep", 100, 4, 8, 16, targets="all-linear", length=64),
        Setting("deep224-b16", "tuned", "random-256", "deep", 100, 16, 8, 16, targets="all-linear", length=128),
    )
}


def one_run(name: str, kind: str, steps: int) -> dict[str, float]:
    """Processor "seconds" in the steps and peak "mib"; of automatic rates "measured_over_plain", a ratio of medians."""
    import torch
    from rates_peers import automatic
    from rates_training import fixed, run

    torch.set_num_threads(1)
    seen: list[Any] = []
    times: list[float] = []
    measured: list[bool] = []  # whether the step after each time is

    def method(problem: Any, setting: Any) -> Any:
        optimizers = (automatic(None, seen) if kind == "auto" else fixed(1e-3, 4.0))(problem, setting)

        def mark(*_: object) -> None:
            times.append(time.process_time())
            measured.append(any(rates._recorder.on for rates in seen))

        mark()
        optimizers[0].register_step_post_hook(mark)
        return optimizers

    (setting,) = [DEEP[name]] if name in DEEP else chosen([name])
    run(setting, 0, method, steps=steps)
    one = {"seconds": times[-1] - times[0], "mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    if kind == "auto":
        took: dict[bool, list[float]] = {True: [], False: []}
        for step in range(1, steps):  # the first one warms up
            took[measured[step]].append(times[step + 1] - times[step])
        one["measured_over_plain"] = median(took[True]) / median(took[False])
    return one


def in_processes(name: str, steps: int, **environment: str) -> dict[str, dict[str, float]]:
    """`one_run` at fixed and at automatic rates, each in a process of its own."""
    pair = {}
    for kind in ("fixed", "auto"):
        command = [sys.executable, "-W", "ignore", __file__, name, "--steps", str(steps), "--one", kind]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **environment})
        pair[kind] = json.loads(done.stdout.splitlines()[-1])
    return pair


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", default=DEFAULT)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--one", choices=("fixed", "auto"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.steps < MEMORY_STEPS:
        parser.error(f"--steps: ten steps are measured at first, so give {MEMORY_STEPS} or more")
    if options.one:
        return print(json.dumps(one_run(options.settings[0], options.one, options.steps)))
    for name in options.settings:
        pairs = [in_processes(name, options.steps) for _ in range(options.pairs)]
        in_use = in_processes(name, MEMORY_STEPS, MALLOC_MMAP_THRESHOLD_="65536")
        time_ratio = median(pair["auto"]["seconds"] / pair["fixed"]["seconds"] for pair in pairs)
        measured = median(pair["auto"]["measured_over_plain"] for pair in pairs)
        memory = {kind: median(pair[kind]["mib"] for pair in pairs) for kind in ("fixed", "auto")}
        print(f"{name}: {100 * (time_ratio - 1):+.1f}% processor time over {options.steps} steps, "
              f"{100 * (measured - 1):+.1f}% in a measured one; peak {memory['auto']:.0f} MiB against "
              f"{memory['fixed']:.0f}, of which in use {in_use['auto']['mib']:.0f} and {in_use['fixed']['mib']:.0f}",
              flush=True)  # fmt: skip
    return None


if __name__ == "__main__":
    main()
