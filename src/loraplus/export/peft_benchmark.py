"""An entry of PEFT's method comparison: a folder with adapter_config.json and training_params.json.

Source: PEFT, method_comparison/MetaMathQA (`utils.TrainConfig`).
"""

from __future__ import annotations

from typing import Any

from loraplus.export.run import Run
from loraplus.files.single import json_text
from loraplus.tasks.config import OF_LABELS

_SCHEDULES = {"cosine": "cosine", "constant": None}


def export(run: Run) -> dict[str, str]:
    """{name of a file: its text}; they belong to `experiments/lora/NAME` of a checkout."""
    rates = run.rates()
    params: dict[str, Any] = {"model_id": run.get("model")}
    params["dtype"] = "int4" if run.get("load_in_4bit") else "bfloat16" if run.get("bf16") else "float32"
    if (longest := run.max_length()) is not None:
        params["max_seq_length"] = longest
    params |= {"batch_size": run.get("batch_size"), "max_steps": run.metrics["steps"]}
    params["eval_steps"] = min(run.get("eval_steps") or 250, params["max_steps"])
    params["seed"] = run.get("seed")
    params |= _optimizer(run, rates)
    schedule = run.get("lr_scheduler_type")
    params["lr_scheduler"] = _SCHEDULES.get(schedule, "cosine")
    if schedule not in _SCHEDULES:
        run.note(f"lr_scheduler_type = {schedule} becomes cosine: the benchmark has that or none")
    if (warmup := run.get("warmup_ratio")) != 0.1:
        run.note(f"warmup_ratio = {warmup:g} is left out: the benchmark warms up over a tenth of the steps")
    run.note(f"data = {run.get('data')} is left out: the benchmark trains on MetaMathQA, with a prompt of its own")
    run.leave_out("gradient_accumulation_steps", why="the benchmark computes a batch at once")
    if (task := run.get("task")) in OF_LABELS:
        run.note(f"task = {task} is left out: the benchmark trains a language model")
    for name in ("rank", "alpha", "lora_dropout", "use_rslora", "use_dora", "target_modules", "max_steps", "epochs"):
        run.get(name)  # said by the adapter's configuration, and by the steps that were taken
    adapter = {**run.adapter, "base_model_name_or_path": None, "inference_mode": False}
    if isinstance(adapter["target_modules"], list):
        adapter["target_modules"] = sorted(adapter["target_modules"])
    run.leave_out_the_rest("the benchmark")
    return {"adapter_config.json": json_text(adapter) + "\n", "training_params.json": json_text(params) + "\n"}


def _optimizer(run: Run, rates: dict[str, Any]) -> dict[str, Any]:
    """The optimizer; `optimizer_kwargs` replaces the benchmark's defaults whole, weight decay among them."""
    decay = run.get("weight_decay")
    if rates["lr_ratio"] == 1 and rates.keys() <= {"lr", "lr_ratio"}:
        return {"optimizer_type": "AdamW", "optimizer_kwargs": {"lr": rates["lr"], "weight_decay": decay}}
    kwargs = {
        "lr": rates["lr"],
        "loraplus_lr_ratio": rates["lr_ratio"],
        "loraplus_lr_embedding": rates.get("lr_embedding", rates["lr"]),  # PEFT's 1e-6 would not train them
        "loraplus_weight_decay": decay,
    }
    run.leave_out(
        "lr_head", "lr_magnitude", "lr_overrides", "lr_ratio_overrides", why="PEFT's function has no such rate"
    )
    if run.adapter.get("use_dora"):
        run.note("DoRA's magnitudes learn at B's rate there: PEFT's function gives it to every vector")
    return {"optimizer_type": "lora+", "optimizer_kwargs": kwargs}
