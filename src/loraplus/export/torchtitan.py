"""Settings as torchtitan's configuration, which is Python: a function that changes a registered configuration.

Source: torchtitan 0.3 (`components/lora.py`, `components/optimizer`, `config/configs.py`).
"""

from __future__ import annotations

from typing import Any

from loraplus.export.run import Run

_SCHEDULES = {"linear": "linear", "cosine": "cosine"}
_LAYERS = {"q_proj": "wq", "k_proj": "wkv", "v_proj": "wkv", "o_proj": "wo", "gate_proj": "w1", "down_proj": "w2",
           "up_proj": "w3"}  # fmt: skip
"""The configurations of its Llama's layers; one of them is that of k and of v."""

_FILE = '''"""LoRA+ as `loraplus train` trained {name}: call `with_loraplus` in torchtitan's config_registry.

def llama3_8b_loraplus() -> Trainer.Config:
    return with_loraplus(llama3_8b(), lambda converters: model_registry("8B", converters=converters))
"""

from torchtitan.components.lora import LoRAConverter
from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig


def with_loraplus(config, model_spec):
    """Gives a configuration this run's adapter, rates and length.

    Args:
        config: a Trainer.Config.
        model_spec: makes the specification of the model from a list of converters.
    """
    adapter = LoRAConverter.Config(rank={rank!r}, alpha={alpha!r}, target_modules={targets!r})
    config.model_spec = model_spec([adapter])

    def group(pattern, lr):
        return ParamGroupConfig(
            pattern=pattern,
            optimizer_name="AdamW",
            optimizer_kwargs={{"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": {weight_decay!r}}},
        )

    config.optimizer = OptimizersContainer.Config(
        param_groups=[group(r"\\.lora_b\\.weight$", {lr_b!r}), group(r"\\.lora_a\\.weight$", {lr_a!r})]
    )
    config.lr_scheduler.warmup_steps = {warmup_steps!r}
    config.lr_scheduler.decay_ratio = {decay_ratio!r}
    config.lr_scheduler.decay_type = {decay_type!r}
    config.training.local_batch_size = {micro_batch_size!r}
    config.training.global_batch_size = {batch_size!r}
    config.training.steps = {steps!r}{length}
    config.debug.seed = {seed!r}
    return config
'''


def export(run: Run) -> dict[str, str]:
    """{name of the file: its text}"""
    rates, targets, steps = run.rates(), run.targets(), run.metrics["steps"]
    if isinstance(targets, str):
        run.note(f"target_modules = {targets} becomes None, all linear layers: torchtitan takes names")
        names: list[str] | None = None
    else:
        names = sorted({_LAYERS.get(name, name) for name in targets})
        if changed := [f"{name} is {_LAYERS[name]}" for name in targets if name in _LAYERS]:
            run.note(f"names of layers are those of its Llama: {', '.join(changed)}")
        if len({"k_proj", "v_proj"}.intersection(targets)) == 1:
            run.note("wkv adapts k and v: torchtitan has one configuration for both")
    schedule = run.get("lr_scheduler_type")
    constant = schedule in ("constant", "constant_with_warmup")
    if not constant and schedule not in _SCHEDULES:
        run.note(f"lr_scheduler_type = {schedule} becomes linear: torchtitan has linear, sqrt and cosine")
    longest = run.max_length()
    values: dict[str, Any] = {
        "name": run.name, "rank": run.adapter["r"], "alpha": float(run.adapter["lora_alpha"]), "targets": names,
        "weight_decay": run.get("weight_decay"), "lr_a": rates["lr"], "lr_b": rates["lr"] * rates["lr_ratio"],
        "warmup_steps": 0 if schedule == "constant" else run.warmup(),
        "decay_ratio": 0.0 if constant else None, "decay_type": _SCHEDULES.get(schedule, "linear"),
        "micro_batch_size": run.micro_batch_size(), "batch_size": run.get("batch_size"), "steps": steps,
        "seed": run.get("seed"),
        "length": "" if longest is None else f"\n    config.training.seq_len = {longest!r}",
    }  # fmt: skip
    for name in ("rank", "alpha", "max_steps", "epochs", "gradient_accumulation_steps"):
        run.get(name)  # said by the adapter, the steps, and the two sizes of a batch
    run.leave_out("lora_dropout", "use_rslora", "use_dora", why="torchtitan's LoRA has none")
    run.leave_out("load_in_4bit", why="torchtitan has other converters for that")
    run.leave_out("lr_embedding", "lr_magnitude", why="torchtitan's LoRA trains no such parameter")
    run.leave_out("lr_overrides", "lr_ratio_overrides", why="add a ParamGroupConfig for each in front")
    run.note(f"model = {run.get('model')} is left out: call with_loraplus on the configuration of that model")
    run.note(f"data = {run.get('data')} is left out: torchtitan's loader has data sets of its own")
    if run.get("task") != "lm":
        run.note(f"task = {run.settings['task']} is left out: torchtitan learns every token of a text")
    run.leave_out_the_rest("torchtitan")
    return {"loraplus_config.py": _FILE.format(**values)}
