"""Automatic rates with optimizers other than Adam, beside the best of a grid of rates: 60 steps of two tiny models.

    python benchmarks/auto_optimizers.py [OPTIMIZER …]

A decoder that knows one law of pairs of tokens learns another, a classifier another threshold; both were trained in
full for 400 steps before. The grid is η_A = 10^(k/2) with λ = 4; all rates fall linearly to zero. Losses of the last
eight steps, means of two seeds.
"""

from __future__ import annotations

import argparse
import copy
import functools
import math
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import loraplus

STEPS, SEEDS, RATIO = 60, (0, 1), 4
GRID = [10 ** (k / 2) for k in range(-7, 3)]
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}


class Lion(torch.optim.Optimizer):
    """Chen et al., arXiv 2302.06675."""

    def __init__(self, params: Any, lr: float = 1e-4) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    m = self.state[p].setdefault("m", torch.zeros_like(p))
                    p.sub_(group["lr"] * (0.9 * m + 0.1 * p.grad).sign())
                    m.mul_(0.99).add_(p.grad, alpha=0.01)


OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "AdamW": (torch.optim.AdamW, {}),
    "SGD": (torch.optim.SGD, {}),
    "SGD, momentum 0.9": (torch.optim.SGD, {"momentum": 0.9}),
    "Adagrad": (torch.optim.Adagrad, {}),
    "RMSprop": (torch.optim.RMSprop, {}),
    "Lion": (Lion, {}),
}


def batch(task: str, generator: torch.Generator, size: int, second: bool) -> dict[str, torch.Tensor]:
    """Tokens and targets, of the first law or of the second."""
    ids = torch.randint(1, 64, (size, 8), generator=generator)
    if task == "classifier":
        return {"input_ids": ids, "labels": (ids[:, 0] > (23 if second else 31)).long()}
    ids[:, 1::2] = (ids[:, 0::2] * (5 if second else 3) + 1) % 64
    labels = ids.clone()
    labels[:, 0::2] = -100
    return {"input_ids": ids, "labels": labels}


@functools.cache
def base(task: str, seed: int) -> torch.nn.Module:
    """The model that knows the first law."""
    torch.manual_seed(seed)
    if task == "decoder":
        model: Any = LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=2))
    else:
        still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        model = BertForSequenceClassification(BertConfig(**SHAPE, **still))
    generator, optimizer = torch.Generator().manual_seed(seed + 1), torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(400):
        model(**batch(task, generator, 32, second=False)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def run(task: str, name: str, lr: float | None, seed: int) -> float:
    """The loss of the last eight steps; infinite if it is no number. Without lr the rates are automatic."""
    model, (optimizer_cls, options) = copy.deepcopy(base(task, seed)), OPTIMIZERS[name]
    targets = ["q_proj", "v_proj", "o_proj", "down_proj"] if task == "decoder" else ["query", "value", "dense"]
    torch.manual_seed(seed)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=targets))  # type: ignore[arg-type]
    ratio = 1 if lr is None else RATIO
    optimizer = loraplus.create_optimizer(model, optimizer_cls, lr=lr or 1.0, lr_ratio=ratio, **options)
    if lr is None:
        loraplus.AutoRates(model, optimizer)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    generator, losses = torch.Generator().manual_seed(seed + 2), []
    for _ in range(STEPS):
        loss = model(**batch(task, generator, 8 if task == "decoder" else 16, second=True)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        losses.append(loss.item())
    mean = sum(losses[-8:]) / 8
    return mean if math.isfinite(mean) else math.inf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("optimizers", nargs="*", default=list(OPTIMIZERS))
    torch.set_num_threads(1)
    heads = ["untrained", "grid's best (η_A)", "automatic"]
    print(f"| optimizer | {' | '.join(f'{task}: {head}' for task in ('decoder', 'classifier') for head in heads)} |")
    print("|---|---|---|---|---|---|---|")
    for name in parser.parse_args().optimizers:
        cells = [name]
        for task in ("decoder", "classifier"):
            losses = {lr: sum(run(task, name, lr, seed) for seed in SEEDS) / len(SEEDS) for lr in [1e-12, *GRID]}
            best = min(losses, key=lambda lr: losses[lr])
            automatic = sum(run(task, name, None, seed) for seed in SEEDS) / len(SEEDS)
            cells += [f"{losses[1e-12]:.2f}", f"{losses[best]:.2f} ({best:.2g})", f"{automatic:.2f}"]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
