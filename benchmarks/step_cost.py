"""What LoRA+ costs a step: the same AdamW over one group against one over groups by role, on MiniLM.

    python benchmarks/step_cost.py [STEPS]

Processor time of whole steps and of the optimizer alone, medians of interleaved pairs in one process, and the bytes of
the optimizers' states. Written to benchmarks/results/step-cost.json, too.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging

import loraplus
from loraplus.files.single import json_text, write_json

HERE = Path(__file__).resolve().parent
MODEL = HERE.parent / "data" / "minilm-l6"
RESULT = HERE / "results" / "step-cost.json"
BATCH, LENGTH = 8, 24
WARM_UP = 3


def build(lr_ratio: float | None) -> tuple[Any, torch.optim.Optimizer]:
    """The adapted model with LoRA+ groups, or for None with one group."""
    torch.manual_seed(0)
    lora = LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=["query", "value"])
    model = get_peft_model(AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=2), lora)
    if lr_ratio is None:
        return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    return model, loraplus.create_optimizer(model, torch.optim.AdamW, lr=1e-4, lr_ratio=lr_ratio)


def step(model: Any, optimizer: torch.optim.Optimizer, batch: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Seconds of a step, and of the optimizer in it."""
    started = time.process_time()
    model(**batch).loss.backward()
    before = time.process_time()
    optimizer.step()
    optimizer.zero_grad()
    now = time.process_time()
    return now - started, now - before


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 60
    arms = {"LoRA": build(None), "LoRA+": build(16.0)}
    batch = {"input_ids": torch.randint(1000, 2000, (BATCH, LENGTH)), "labels": torch.randint(2, (BATCH,))}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    for i in range(WARM_UP + steps):
        for name in list(arms)[:: 1 if i % 2 else -1]:
            taken = step(*arms[name], batch)
            if i >= WARM_UP:
                times[name].append(taken)
    ratios = [plus / lora for (lora, _), (plus, _) in zip(times["LoRA"], times["LoRA+"], strict=True)]
    costs = {
        "steps": steps,
        "seconds_per_step": {name: median(whole for whole, _ in taken) for name, taken in times.items()},
        "seconds_in_optimizer": {name: median(optimizer for _, optimizer in taken) for name, taken in times.items()},
        "ratio": median(ratios),
        "ratio_quartiles": quantiles(ratios, n=4)[::2],
        "state_bytes": {name: state_bytes(optimizer) for name, (_, optimizer) in arms.items()},
    }
    write_json(RESULT, costs)
    print(json_text(costs))


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Size of all tensors that the optimizer keeps."""
    kept = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    return sum(tensor.numel() * tensor.element_size() for tensor in kept)


if __name__ == "__main__":
    main()
