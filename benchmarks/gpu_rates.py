"""Automatic rates at width 1,024, on one GPU: a decoder is pre-trained, then one automatic run against a grid.

    python benchmarks/gpu_rates.py --output gpu-rates.json        # width 1,024, bf16; meant to take under 8 minutes
    python benchmarks/gpu_rates.py --toy --output toy-rates.json  # the same at a toy size, on the CPU

The text at hand is Python's standard library, whose source the decoder reads byte by byte: it is pre-trained on the
modules whose names begin with a to m, and fine-tuned on the pages and scripts of this repository. All runs of the
fine-tuning have rank 16 on all linear layers, AdamW, a linear schedule, and start and data in common. The grid is λ =
1, 4 and 16 with √(η_A·η_B) from 3e-4 to 1e-2 in half decades, twelve points; the automatic run and the grid's best
have three seeds. Results are written after every run; what --minutes does not leave time for is left out, and listed.
Needs torch, transformers and peft.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, get_linear_schedule_with_warmup, set_seed

import loraplus
from loraplus.bench.machine import machine

ROOT = Path(__file__).resolve().parent.parent
RATIOS, HALF_DECADES = (1.0, 4.0, 16.0), (-1, 0, 1, 2)
SEEDS = (0, 1, 2)
SIZES: dict[str, dict[str, Any]] = {
    "full": {"width": 1024, "layers": 8, "heads": 16, "length": 512, "batch": 16, "pretrained": 2500, "tuned": 200},
    "toy": {"width": 64, "layers": 2, "heads": 4, "length": 64, "batch": 8, "pretrained": 60, "tuned": 20},
}


def bytes_of(paths: list[Path], most: int = 40_000_000) -> torch.Tensor:
    """The content of files, one after the other: (bytes,)."""
    read = b"\n".join(path.read_bytes() for path in sorted(paths))[:most]
    return torch.frombuffer(bytearray(read), dtype=torch.uint8).long()


def texts() -> tuple[torch.Tensor, torch.Tensor]:
    """(what is pre-trained on, what is fine-tuned on)."""
    library = Path(sysconfig.get_paths()["stdlib"])
    first = [
        path for path in library.rglob("*.py") if "a" <= path.stem[:1] <= "m" and "site-packages" not in path.parts
    ]
    second = [*(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").glob("*.py"), ROOT / "README.md"]
    return bytes_of(first), bytes_of(second)


class Text:
    """Windows of a text, drawn at random; the last tenth is held out."""

    def __init__(self, content: torch.Tensor, length: int, device: torch.device) -> None:
        cut = len(content) * 9 // 10
        self.train, self.held = content[:cut].to(device), content[cut:].to(device)
        self.length = length

    def batch(self, size: int, generator: torch.Generator) -> torch.Tensor:
        """(size, length)."""
        starts = torch.randint(len(self.train) - self.length, (size,), generator=generator).tolist()
        return torch.stack([self.train[start : start + self.length] for start in starts])

    def judged(self, most: int) -> torch.Tensor:
        """(windows, length) of the text held out, side by side."""
        count = min(most, len(self.held) // self.length)
        return self.held[: count * self.length].view(count, self.length)


def loss_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Cross-entropy a byte, in bf16."""
    with torch.autocast(ids.device.type, dtype=torch.bfloat16):
        return model(input_ids=ids, labels=ids).loss


def trained(model: Any, optimizer: torch.optim.Optimizer, text: Text, steps: int, batch: int, seed: int) -> float:
    """Trains, and gives the loss on what was held out."""
    schedule = get_linear_schedule_with_warmup(optimizer, math.ceil(0.06 * steps), steps)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(steps):
        loss_of(model, text.batch(batch, generator)).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()
    with torch.no_grad():
        windows = text.judged(64).split(batch)
        loss = sum(float(loss_of(model, part)) * len(part) for part in windows) / sum(map(len, windows))
    return loss if math.isfinite(loss) else math.inf


def fine_tuned(
    base: Any, text: Text, size: dict[str, Any], seed: int, lr: float | None, lr_ratio: float
) -> dict[str, Any]:
    """One run; without lr the rates are automatic."""
    started = time.perf_counter()
    set_seed(seed)
    lora = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
    model = get_peft_model(copy.deepcopy(base), lora)
    rates = {"lr": "auto"} if lr is None else {"lr": lr, "lr_ratio": lr_ratio}
    optimizer = loraplus.create_optimizer(model, torch.optim.AdamW, weight_decay=0.0, **rates)  # type: ignore[arg-type]
    loss = trained(model, optimizer, text, size["tuned"], size["batch"], seed)
    row = {"lr": lr, "lr_ratio": lr_ratio, "seed": seed, "loss": loss, "seconds": time.perf_counter() - started}
    return row if lr is not None else {**row, "lr_ratio": None, "auto": str(optimizer.loraplus_auto)}  # type: ignore[attr-defined]


def conclude(results: dict[str, Any]) -> dict[str, Any]:
    """The automatic run over the grid's best on the first seed, and on the seeds that nothing was chosen on."""
    grid = [row for row in results["grid"] if row["seed"] == SEEDS[0]]
    auto = {row["seed"]: row["loss"] for row in results["auto"]}
    if not grid or SEEDS[0] not in auto:
        return {}
    best = min(grid, key=lambda row: row["loss"])
    lora = min((row for row in grid if row["lr_ratio"] == 1.0), key=lambda row: row["loss"], default=best)
    again = {row["seed"]: row["loss"] for row in results["again"]}
    others = [auto[seed] / again[seed] for seed in SEEDS[1:] if seed in auto and seed in again]
    return {
        "best": {"lr": best["lr"], "lr_ratio": best["lr_ratio"], "loss": best["loss"]},
        "points": len(grid),
        "auto_over_best": auto[SEEDS[0]] / best["loss"],
        "auto_over_lora": auto[SEEDS[0]] / lora["loss"],
        "auto_over_best_on_other_seeds": statistics.fmean(others) if others else None,
        "untrained": results["untrained"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu-rates.json"))
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--minutes", type=float, default=7.5, help="no run begins after so many")
    options = parser.parse_args()
    started = time.monotonic()
    size = SIZES["toy" if options.toy else "full"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results: dict[str, Any] = {"machine": machine(), "size": size, "grid": [], "auto": [], "again": [], "left_out": []}

    def keep() -> None:
        results["conclusion"] = conclude(results)
        part = options.output.with_name(f"{options.output.name}.part")
        part.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        part.replace(options.output)

    def run(kind: str, seed: int, lr: float | None, lr_ratio: float = 1.0) -> None:
        if time.monotonic() - started > 60 * options.minutes:
            results["left_out"].append({"kind": kind, "seed": seed, "lr": lr, "lr_ratio": lr_ratio})
        else:
            results[kind].append(fine_tuned(base, text, size, seed, lr, lr_ratio))
            print(kind, json.dumps(results[kind][-1]), flush=True)
        keep()

    first, second = (Text(content, size["length"], device) for content in texts())
    text = second
    set_seed(0)
    base = LlamaForCausalLM(LlamaConfig(
        vocab_size=256, hidden_size=size["width"], intermediate_size=8 * size["width"] // 3 // 32 * 32,
        num_hidden_layers=size["layers"], num_attention_heads=size["heads"], max_position_embeddings=size["length"],
        use_cache=False,
    )).to(device)  # fmt: skip
    optimizer = torch.optim.AdamW(base.parameters(), lr=6e-4 if not options.toy else 3e-3, weight_decay=0.01)
    results["pretrained"] = {"loss": trained(base, optimizer, first, size["pretrained"], size["batch"], 0)}
    results["pretrained"]["seconds"] = time.monotonic() - started
    del optimizer
    base.requires_grad_(False)
    with torch.no_grad():
        results["untrained"] = float(loss_of(base, text.judged(64)))
    print(
        "pre-trained",
        json.dumps(results["pretrained"]),
        "untrained on the second text:",
        results["untrained"],
        flush=True,
    )

    run("auto", SEEDS[0], None)
    for ratio in RATIOS:
        for k in HALF_DECADES:
            run("grid", SEEDS[0], 1e-3 * 10 ** (k / 2) / math.sqrt(ratio), ratio)
    grid = [row for row in results["grid"] if math.isfinite(row["loss"])]
    best = min(grid, key=lambda row: row["loss"], default=None)
    for seed in SEEDS[1:]:
        run("auto", seed, None)
        if best is not None:
            run("again", seed, best["lr"], best["lr_ratio"])
    results["seconds"] = time.monotonic() - started
    keep()
    print(json.dumps(results["conclusion"], indent=1))


if __name__ == "__main__":
    main()
