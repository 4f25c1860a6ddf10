"""What it costs to make an optimizer, to prove it and to watch it, by the number of adapted layers.

    python benchmarks/making_cost.py [LAYERS …] [--runs 5] [--against SRC]

Processor time on a model of adapted layers alone, without a forward pass, so that the figures are the most that they
can be: of `create_optimizer` and `verify` in readings of the model, of the watch in parts of an AdamW step. With the
sources of another version, runs of the two are interleaved, each in a process of its own, and ratios are given.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
BLOCK, WIDTH, RANK = 7, 8, 2


def adapted(layers: int) -> Any:
    """Blocks of layers with PEFT's names for their factors."""
    from torch import nn

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_layer = nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(False)
            self.lora_A = nn.ModuleDict({"default": nn.Linear(WIDTH, RANK, bias=False)})
            self.lora_B = nn.ModuleDict({"default": nn.Linear(RANK, WIDTH, bias=False)})

    blocks = [nn.ModuleList(Layer() for _ in range(BLOCK)) for _ in range(layers // BLOCK)]
    return nn.ModuleDict({"blocks": nn.ModuleList(blocks)})


def seconds(call: Callable[[], Any]) -> float:
    """The least of five."""
    times = []
    for _ in range(5):
        started = time.process_time()
        call()
        times.append(time.process_time() - started)
    return min(times)


def one_run(layers: int) -> dict[str, float]:
    """Seconds of each."""
    import torch

    import loraplus
    from loraplus.roles import trainable_parameters

    torch.set_num_threads(1)
    model = adapted(layers)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = loraplus.create_optimizer(model, torch.optim.AdamW, lr=1e-3)
    watch: Any = optimizer.loraplus_watch  # type: ignore[attr-defined]
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    costs = {
        "reading": seconds(lambda: trainable_parameters(model)),
        "create_optimizer": seconds(lambda: loraplus.create_optimizer(model, torch.optim.AdamW, lr=1e-3)),
        "verify": seconds(lambda: loraplus.verify(model, optimizer, 16.0)),
        "hundred_watched": seconds(lambda: [watch.look(optimizer) for _ in range(100)]),
    }
    watch.remove()
    return {**costs, "hundred_steps": 10 * seconds(lambda: [optimizer.step() for _ in range(10)])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layers", nargs="*", type=int, default=[224, 4606])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--against", type=Path, help="the `src` of another version")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        return print(json.dumps(one_run(options.layers[0])))
    sources = [HERE.parent / "src", *([options.against] if options.against else [])]
    for layers in options.layers:
        runs: list[list[dict[str, float]]] = [[] for _ in sources]
        for i in range(options.runs):
            for place in list(range(len(sources)))[:: 1 if i % 2 else -1]:
                command = [sys.executable, "-W", "ignore", __file__, str(layers), "--one"]
                environment = {**os.environ, "PYTHONPATH": str(sources[place].resolve())}
                done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
                runs[place].append(json.loads(done.stdout.splitlines()[-1]))
        of = {name: [run[name] for run in runs[0]] for name in runs[0][0]}
        readings = {name: median(a / b for a, b in zip(of[name], of["reading"], strict=True)) for name in of}
        share = median(a / b for a, b in zip(of["hundred_watched"], of["hundred_steps"], strict=True))
        print(
            f"{layers} layers: a reading {median(of['reading']) * 1e3:.1f} ms; create_optimizer "
            f"{readings['create_optimizer']:.2f} readings, verify {readings['verify']:.2f}; the watch "
            f"{100 * share:.3f}% of AdamW's steps ({median(of['hundred_steps']) * 10:.2f} ms each)"
        )
        for name in of if options.against else ():
            ratio = median(here[name] / there[name] for here, there in zip(*runs, strict=True))
            print(f"  {name}: {ratio:.3f} times that of {options.against}", flush=True)
    return None


if __name__ == "__main__":
    main()
