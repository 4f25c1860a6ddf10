"""Settings as files of axolotl, LLaMA-Factory and TRL: one YAML each, with the plugin that makes the ratio right.

Sources: axolotl 0.19 (`utils/schemas`), LLaMA-Factory 0.9.5 (`hparams`), TRL 1.16 (`SFTConfig`, `ModelConfig`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from loraplus.export.run import Run
from loraplus.tasks.config import OF_LABELS

_DATA = "data = {data}: {how}"


def axolotl(run: Run) -> dict[str, str]:
    """{name of the file: its text}"""
    data = run.get("data")
    config: dict[str, Any] = {
        "base_model": run.get("model"),
        "plugins": ["loraplus.integrations.axolotl.Plugin"],
        "adapter": "qlora" if run.get("load_in_4bit") else "lora",
        "lora_r": run.adapter["r"],
        "lora_alpha": run.adapter["lora_alpha"],
        "lora_dropout": run.adapter["lora_dropout"],
        "lora_target_modules": run.targets(),
        **({"load_in_4bit": True} if run.get("load_in_4bit") else {}),
        **({"peft_use_dora": True} if run.adapter.get("use_dora") else {}),
        **({"peft_use_rslora": True} if run.adapter.get("use_rslora") else {}),
        **_prefixed(run.rates()),
        "datasets": [{"path": data, "type": "completion" if run.get("task") == "lm" else "chat_template"}],
        "micro_batch_size": run.micro_batch_size(),
        "gradient_accumulation_steps": run.get("gradient_accumulation_steps"),
        "lr_scheduler": run.get("lr_scheduler_type"),
        "optimizer": "adamw_torch",
        **({} if run.max_length() is None else {"sequence_len": run.max_length()}),
        "sample_packing": bool(run.metrics.get("packing")),
        **_training(run, epochs="num_epochs"),
    }
    run.note(_DATA.format(data=data, how="give it the `type` that its rows have (axolotl's names of formats)"))
    _of_the_adapter(run)
    return _yaml("axolotl.yml", config, run, "axolotl")


def llamafactory(run: Run) -> dict[str, str]:
    """{name of the file: its text}"""
    rates, targets = run.rates(), run.targets()
    others = [f"{name}={rates[name]!r}" for name in ("lr_head", "lr_magnitude") if name in rates]
    config: dict[str, Any] = {
        "model_name_or_path": run.get("model"),
        "stage": "pt" if run.get("task") == "lm" else "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": run.adapter["r"],
        "lora_alpha": run.whole_alpha("LLaMA-Factory"),
        "lora_dropout": run.adapter["lora_dropout"],
        "lora_target": targets if isinstance(targets, str) else ",".join(targets),
        "use_dora": bool(run.adapter.get("use_dora")),
        "use_rslora": bool(run.adapter.get("use_rslora")),
        **({"quantization_bit": 4} if run.get("load_in_4bit") else {}),
        "loraplus_lr_ratio": float(rates["lr_ratio"]),
        **({"loraplus_lr_embedding": rates["lr_embedding"]} if "lr_embedding" in rates else {}),
        **({"optim_args": ",".join(others)} if others else {}),
        "learning_rate": rates["lr"],
        "per_device_train_batch_size": run.micro_batch_size(),
        "gradient_accumulation_steps": run.get("gradient_accumulation_steps"),
        "lr_scheduler_type": run.get("lr_scheduler_type"),
        "dataset": run.name,
        "packing": bool(run.metrics.get("packing")),
        **({} if run.max_length() is None else {"cutoff_len": run.max_length()}),
        **_training(run, epochs="num_train_epochs"),
    }
    run.note("train with python -m loraplus.integrations.llamafactory; llamafactory-cli gives vectors B's rate")
    run.note(_DATA.format(data=run.get("data"), how=f"list it in dataset_info.json under the name {run.name}"))
    run.leave_out("lr_overrides", "lr_ratio_overrides", why="LLaMA-Factory has no rates by name")
    _of_the_adapter(run)
    return _yaml("llamafactory.yaml", config, run, "LLaMA-Factory")


def trl(run: Run) -> dict[str, str]:
    """{name of the file: its text}"""
    rates, targets, data = run.rates(), run.targets(), run.get("data")
    if "." in Path(str(data)).name:
        run.note(
            _DATA.format(data=data, how="dataset_name takes a folder or a name on the hub; load the file yourself")
        )
    for name in ("lr_overrides", "lr_ratio_overrides"):
        if name in rates:
            rates[name] = json.dumps(rates[name])
    config: dict[str, Any] = {
        "model_name_or_path": run.get("model"),
        "dataset_name": data,
        "use_peft": True,
        "lora_r": run.adapter["r"],
        "lora_alpha": run.whole_alpha("TRL"),
        "lora_dropout": run.adapter["lora_dropout"],
        "lora_target_modules": targets if isinstance(targets, list) else [targets],
        "use_dora": bool(run.adapter.get("use_dora")),
        "use_rslora": bool(run.adapter.get("use_rslora")),
        "load_in_4bit": bool(run.get("load_in_4bit")),
        **_prefixed(rates),
        "per_device_train_batch_size": run.micro_batch_size(),
        "gradient_accumulation_steps": run.get("gradient_accumulation_steps"),
        "lr_scheduler_type": run.get("lr_scheduler_type"),
        "packing": bool(run.metrics.get("packing")),
        **({} if run.max_length() is None else {"max_length": run.max_length()}),
        **_training(run, epochs="num_train_epochs"),
    }
    run.note("the loraplus_ keys are read by a script whose TrlParser has LoraPlusArguments; `trl sft` refuses them")
    _of_the_adapter(run)
    return _yaml("trl.yaml", config, run, "TRL")


def _prefixed(rates: dict[str, Any]) -> dict[str, Any]:
    """The rates under the names of the ecosystem."""
    return {"learning_rate": rates["lr"]} | {f"loraplus_{name}": rates[name] for name in rates if name != "lr"}


def _training(run: Run, *, epochs: str) -> dict[str, Any]:
    """What all three call alike: length, warm-up, decay, precision, seed, output."""
    steps, passes = run.get("max_steps"), run.get("epochs")
    return {
        **({epochs: passes} if steps is None else {"max_steps": steps}),
        "warmup_steps": run.warmup(),
        "weight_decay": run.get("weight_decay"),
        "bf16": bool(run.get("bf16")),
        "seed": run.get("seed"),
        "output_dir": f"outputs/{run.name}",
    }


def _of_the_adapter(run: Run) -> None:
    """Settings whose values were read off the adapter, and those that every framework decides itself."""
    for name in ("rank", "alpha", "lora_dropout", "use_rslora", "use_dora", "packing"):
        run.get(name)
    if run.get("task") in OF_LABELS:
        run.note(f"task = {run.settings['task']} is left out: this configuration trains a language model")


def _yaml(name: str, config: dict[str, Any], run: Run, target: str) -> dict[str, str]:
    run.leave_out_the_rest(target)
    return {name: yaml.safe_dump(config, sort_keys=False, allow_unicode=True)}
