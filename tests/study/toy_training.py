"""Real LoRA+ training small enough for an exhaustive grid: a frozen network learns a perturbed copy of itself.

python tests/study/toy_training.py --width 64 --steps 400    # search against grid; a minute or so a setting
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from functools import cached_property

import torch

from loraplus.study.search import Point
from loraplus.study.search.halving import Candidate, Halving

RANK, BATCH, INPUTS = 8, 64, 16


@dataclass(frozen=True)
class Toy:
    """Two adapted hidden layers of `width`, trained for `steps` steps with 6% warm-up and linear decay to zero.

    `noise` is the standard deviation of what cannot be learned: it is in the targets and in the validation loss.
    """

    width: int = 64
    steps: int = 400
    seed: int = 0
    noise: float = 0.15

    @cached_property
    def frozen(self) -> dict[str, torch.Tensor]:
        """Weights, the teacher's low-rank change to them, initial factors, and validation inputs."""
        g, n = torch.Generator().manual_seed(self.seed), self.width

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=g)

        tensors = {
            "inputs": normal(n, INPUTS) / INPUTS**0.5,
            "output": normal(1, n) / n**0.5,
            "x": normal(1000, INPUTS),
        }
        for layer in (0, 1):
            tensors[f"w{layer}"] = normal(n, n) * (2 / n) ** 0.5
            tensors[f"change{layer}"] = normal(n, RANK) @ normal(RANK, n) / (RANK * n) ** 0.5 * 0.5
            tensors[f"a{layer}"] = (torch.rand(RANK, n, generator=g) * 2 - 1) / n**0.5
        return tensors

    def target(self, x: torch.Tensor) -> torch.Tensor:
        f = self.frozen
        hidden = torch.relu(x @ f["inputs"].T)
        for layer in (0, 1):
            hidden = torch.relu(hidden @ (f[f"w{layer}"] + f[f"change{layer}"]).T)
        return hidden @ f["output"].T

    def loss(self, point: Point, part: float = 1.0) -> float:
        """Validation loss after a run of this part of the steps, with a schedule of its own; inf if it diverged."""
        steps, f = max(1, round(part * self.steps)), self.frozen
        model = torch.nn.Module()
        for layer in (0, 1):
            module = torch.nn.Module()
            module.lora_A = torch.nn.ParameterDict({"default": f[f"a{layer}"].clone()})
            module.lora_B = torch.nn.ParameterDict({"default": torch.zeros(self.width, RANK)})
            model.add_module(f"layer{layer}", module)

        def forward(x: torch.Tensor) -> torch.Tensor:
            hidden = torch.relu(x @ f["inputs"].T)
            for layer in (0, 1):
                module = model.get_submodule(f"layer{layer}")
                a, b = module.lora_A["default"], module.lora_B["default"]
                hidden = torch.relu(hidden @ f[f"w{layer}"].T + 2 * hidden @ a.T @ b.T)
            return hidden @ f["output"].T

        factors = [
            {"params": [p for n, p in model.named_parameters() if f"lora_{side}" in n], "lr": rate}
            for side, rate in (("A", point.lr), ("B", point.lr * point.lr_ratio))
        ]
        optimizer = torch.optim.AdamW(factors, weight_decay=0.0, fused=True)
        warmup = math.ceil(0.06 * steps)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
        )
        data = torch.Generator().manual_seed(self.seed + 1)
        for _ in range(steps):
            x = torch.randn(BATCH, INPUTS, generator=data)
            loss = torch.nn.functional.mse_loss(
                forward(x), self.target(x) + self.noise * torch.randn(BATCH, 1, generator=data)
            )
            if not math.isfinite(loss.item()):
                return math.inf
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            excess = torch.nn.functional.mse_loss(self.target(f["x"]), forward(f["x"])).item()
        return excess + self.noise**2 if math.isfinite(excess) else math.inf


def search(toy: Toy, budget: float = 4) -> dict[Candidate, float]:
    losses: dict[Candidate, float] = {}
    while runs := Halving(toy.steps, budget).next(losses):
        losses |= {run: toy.loss(run.point, run.steps / toy.steps) for run in runs}
    return losses


def grid(toy: Toy, per_decade: int) -> dict[Point, float]:
    rates = [10 ** (-4 + n / per_decade) for n in range(3 * per_decade + 1)]
    points = [Point.from_geometric_mean(rate, ratio) for rate in rates for ratio in (1.0, 4.0, 16.0, 64.0)]
    return {point: toy.loss(point) for point in points}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--noise", type=float, default=0.15)
    parser.add_argument("--per-decade", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    toy = Toy(options.width, options.steps, options.seed, options.noise)
    losses = search(toy)
    for run, loss in losses.items():
        print(f"{run.steps:5d} steps  √ {run.point.geometric_mean_lr:.2e}  λ {run.point.lr_ratio:4g}  {loss:.5f}")
    halving = Halving(toy.steps)
    found = halving.best(losses)
    full = grid(toy, options.per_decade)
    best = min(full, key=lambda point: full[point])
    assert found is not None
    print(f"found √ {found.point.geometric_mean_lr:.2e} λ {found.point.lr_ratio:g}: {losses[found]:.5f}, "
          f"cost {halving.cost(losses):.2f}; grid of {len(full)}: √ {best.geometric_mean_lr:.2e} "
          f"λ {best.lr_ratio:g}: {full[best]:.5f}; ratio {losses[found] / full[best]:.4f}")  # fmt: skip
