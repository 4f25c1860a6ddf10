"""What automatic rates cost: processor time a step, and peak memory, beside the same run at fixed rates.

    python benchmarks/auto_overhead.py [SETTING …] [--steps 100] [--pairs 5]

Both kinds of run are interleaved, each in a process of its own; the figures are medians over the pairs.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from statistics import median
from typing import Any

from rates_results import chosen
from rates_settings import Setting

DEFAULT = ["deep224", "minilm-products-b8", "lm64-editorials-linear-dropout"]
DEEP = Setting("deep224", "tuned", "random-256", "deep", 100, 4, 8, 16, targets="all-linear", length=64)


def one_run(name: str, kind: str, steps: int) -> dict[str, float]:
    """{"seconds": of processor time in the steps, "mib": peak of the process}."""
    import torch
    from rates_peers import automatic
    from rates_training import fixed, run

    torch.set_num_threads(1)
    times: list[float] = []

    def method(problem: Any, setting: Any) -> Any:
        optimizers = (automatic() if kind == "auto" else fixed(1e-3, 4.0))(problem, setting)
        optimizers[0].register_step_post_hook(lambda *_: times.append(time.process_time()))
        times.append(time.process_time())
        return optimizers

    (setting,) = [DEEP] if name == DEEP.name else chosen([name])
    run(setting, 0, method, steps=steps)
    return {"seconds": times[-1] - times[0], "mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", default=DEFAULT)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--one", choices=("fixed", "auto"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        return print(json.dumps(one_run(options.settings[0], options.one, options.steps)))
    for name in options.settings:
        pairs = []
        for _ in range(options.pairs):
            pair = {}
            for kind in ("fixed", "auto"):
                command = [sys.executable, "-W", "ignore", __file__, name, "--steps", str(options.steps)]
                done = subprocess.run([*command, "--one", kind], capture_output=True, text=True, check=True)
                pair[kind] = json.loads(done.stdout.splitlines()[-1])
            pairs.append(pair)
        time_ratio = median(pair["auto"]["seconds"] / pair["fixed"]["seconds"] for pair in pairs)
        memory = {kind: median(pair[kind]["mib"] for pair in pairs) for kind in ("fixed", "auto")}
        print(f"{name}: {100 * (time_ratio - 1):+.1f}% processor time over {options.steps} steps, peak "
              f"{memory['auto']:.0f} MiB against {memory['fixed']:.0f}", flush=True)  # fmt: skip
    return None


if __name__ == "__main__":
    main()
