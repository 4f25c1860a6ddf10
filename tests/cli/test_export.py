"""`loraplus export`: its result is read by the project's own reader where it installs here, else by its fields."""

from __future__ import annotations

import ast
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import tiny_bert
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer

from loraplus.export.write import TARGETS, export_run
from loraplus.integrations.axolotl import LoraPlusArgs
from loraplus.tasks.config import TrainConfig

ADAPTER = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 16.0, "lora_dropout": 0.05,
    "target_modules": ["v_proj", "q_proj"], "use_dora": False, "use_rslora": False, "inference_mode": True,
    "base_model_name_or_path": "some/model", "modules_to_save": None, "bias": "none",
}  # fmt: skip


@pytest.fixture
def run(tmp_path):
    def make(adapter: dict[str, Any] | None = None, metrics: dict[str, Any] | None = None, **settings: Any) -> str:
        folder = tmp_path / "my-run"
        folder.mkdir()
        given = {"task": "sft", "model": "some/model", "data": "chats.jsonl", "output": str(folder), "max_steps": 200,
                 "lr": 2e-4, "lr_ratio": 8.0, "batch_size": 8, "weight_decay": 0.1, "rank": 4, **settings}  # fmt: skip
        config = dataclasses.asdict(TrainConfig(**given))
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        (folder / "adapter_config.json").write_text(json.dumps({**ADAPTER, **(adapter or {})}))
        (folder / "adapter_model.safetensors").write_bytes(b"")
        facts = {"lr": 2e-4, "lr_ratio": 8.0, "steps": 200, "packing": False, "data": {"max_length": 512}}
        (folder / "metrics.json").write_text(json.dumps({**facts, **(metrics or {})}))
        return str(folder)

    return make


def exported(path: str, target: str, tmp_path: Path) -> tuple[Any, list[str]]:
    place, notes = export_run(path, target, str(tmp_path / f"out{'' if target == 'peft-benchmark' else '.yaml'}"))
    return (place if place.is_dir() else yaml.safe_load(place.read_text())), notes


def test_peft_reads_the_benchmarks_entry_and_its_function_takes_the_optimizer(run, tmp_path):
    folder, notes = exported(run(), "peft-benchmark", tmp_path)
    adapter = LoraConfig.from_pretrained(folder)
    assert (adapter.r, adapter.lora_alpha, set(adapter.target_modules)) == (4, 16.0, {"q_proj", "v_proj"})
    assert not adapter.inference_mode and adapter.base_model_name_or_path is None
    params = json.loads((folder / "training_params.json").read_text())
    fields = set(
        "model_id dtype max_seq_length batch_size batch_size_eval max_steps eval_steps compile use_gc query_template "
        "seed grad_norm_clip optimizer_type optimizer_kwargs lr_scheduler use_amp autocast_adapter_dtype "
        "generation_kwargs attn_implementation init_kv_cache_prefix".split()
    )  # of its TrainConfig, which takes no others
    assert params.keys() <= fields and params["optimizer_type"] == "lora+"
    assert params["eval_steps"] <= params["max_steps"] == 200 and params["lr_scheduler"] in (None, "cosine")
    model = get_peft_model(tiny_bert(), LoraConfig(r=4, target_modules=["query"]))  # type: ignore[arg-type]
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, **params["optimizer_kwargs"])  # type: ignore[arg-type]
    used = sorted((group["lr"], group["weight_decay"]) for group in optimizer.param_groups if group["params"])
    assert used == [(2e-4, 0.1), (pytest.approx(1.6e-3), 0.1)]
    assert any("becomes cosine" in note for note in notes) and any("MetaMathQA" in note for note in notes)


def test_ratio_one_is_the_benchmarks_adamw_with_its_decay(run, tmp_path):
    folder, _ = exported(run(lr_ratio=1.0), "peft-benchmark", tmp_path)
    params = json.loads((folder / "training_params.json").read_text())
    assert params["optimizer_type"] == "AdamW" and params["optimizer_kwargs"] == {"lr": 2e-4, "weight_decay": 0.1}


def test_trls_own_parser_reads_all_keys(run, tmp_path):
    trl = pytest.importorskip("trl", reason="trl is not installed")
    from loraplus.integrations.trl import LoraPlusArguments

    exported(run(lr_ratio_overrides='{"v_proj": 4.0}'), "trl", tmp_path)
    kinds = (trl.ScriptArguments, trl.SFTConfig, trl.ModelConfig, LoraPlusArguments)
    _, args, model, rates = trl.TrlParser(kinds).parse_args_and_config(
        args=["--config", str(tmp_path / "out.yaml")], fail_with_unknown_args=True
    )
    assert (args.learning_rate, args.weight_decay, args.max_steps, args.warmup_steps) == (2e-4, 0.1, 200, 12)
    assert (args.max_length, args.per_device_train_batch_size) == (512, 8)
    assert (model.lora_r, model.lora_alpha, model.lora_dropout) == (4, 16, 0.05)
    assert model.lora_target_modules == ["q_proj", "v_proj"]
    assert rates.loraplus_settings().rates.lr_ratio_overrides == {"v_proj": 4.0}


def test_published_interface_of_axolotl_whose_plugin_takes_the_rates(run, tmp_path):
    config, _ = exported(run(lr_magnitude=1e-4, load_in_4bit=True), "axolotl", tmp_path)
    assert config["plugins"] == ["loraplus.integrations.axolotl.Plugin"] and config["adapter"] == "qlora"
    args = LoraPlusArgs(**{name: value for name, value in config.items() if name.startswith("loraplus_")})
    assert (args.loraplus_lr_ratio, args.loraplus_lr_magnitude) == (8.0, 1e-4)
    assert config["learning_rate"] == 2e-4 and config["lora_target_modules"] == ["q_proj", "v_proj"]


def test_published_interface_of_llamafactory_with_further_rates_in_optim_args(run, tmp_path):
    from loraplus.integrations.trainer_settings import in_optim_args

    config, notes = exported(run({"lora_alpha": 12.5}, lr_magnitude=1e-4), "llamafactory", tmp_path)
    assert (config["loraplus_lr_ratio"], config["lora_target"], config["cutoff_len"]) == (8.0, "q_proj,v_proj", 512)
    assert in_optim_args(config["optim_args"])[0]["lr_magnitude"] == 1e-4
    assert "alpha = 12.5 becomes 12: LLaMA-Factory takes whole numbers" in notes


def test_published_interface_of_torchtitan_gets_groups_by_pattern(run, tmp_path):
    place, notes = export_run(run(), "torchtitan", str(tmp_path / "config.py"))
    ast.parse(text := place.read_text())
    made: dict[str, Any] = {}

    class Recorder:
        def __init__(self, **given: Any) -> None:
            vars(self).update(given)

    class Holder:
        Config = Recorder

    source = "\n".join(line for line in text.splitlines() if not line.startswith("from torchtitan"))
    exec(source, made | {"LoRAConverter": Holder, "OptimizersContainer": Holder, "ParamGroupConfig": Recorder}, made)
    made["with_loraplus"].__globals__.update(
        LoRAConverter=Holder, OptimizersContainer=Holder, ParamGroupConfig=Recorder
    )
    config = Recorder(lr_scheduler=Recorder(), training=Recorder(), debug=Recorder())
    made["with_loraplus"](config, lambda converters: converters)
    (adapter,) = config.model_spec
    assert (adapter.rank, adapter.alpha, adapter.target_modules) == (4, 16.0, ["wkv", "wq"])
    rates = {group.pattern: group.optimizer_kwargs["lr"] for group in config.optimizer.param_groups}
    assert rates == {r"\.lora_b\.weight$": pytest.approx(1.6e-3), r"\.lora_a\.weight$": 2e-4}
    assert (config.training.steps, config.lr_scheduler.warmup_steps) == (200, 12)
    assert "wkv adapts k and v: torchtitan has one configuration for both" in notes


@pytest.mark.parametrize("target", TARGETS)
def test_a_setting_that_has_no_place_there_is_named(run, tmp_path, target):
    notes = exported_notes(run(encoding="cp1252", trust_remote_code=True, eval_data="held-out.jsonl"), target, tmp_path)
    for name in ("encoding = cp1252", "trust_remote_code = true", "eval_data = held-out.jsonl"):
        assert sum(note.startswith(f"{name} is left out") for note in notes) == 1, notes


@pytest.mark.parametrize("target", TARGETS)
def test_every_setting_is_written_or_named(run, tmp_path, target):
    """The witness: two runs that differ in one setting give other files, or other notes."""
    changes = {"rank": 5, "weight_decay": 0.3, "warmup_ratio": 0.5, "lr_scheduler_type": "constant", "max_length": 77,
               "max_steps": 7, "batch_size": 16, "gradient_accumulation_steps": 2, "seed": 9, "bf16": True, "lr": 1e-3,
               "lr_ratio": 3.0, "lr_embedding": 1e-5, "lr_magnitude": 1e-5, "lr_overrides": '{"a": 2.0}',
               "lr_ratio_overrides": '{"v": 2.0}', "load_in_4bit": True, "model": "another", "data": "d", "task": "lm",
               "use_dora": True, "use_rslora": True, "lora_dropout": 0.5, "loss_on": "all", "eval_steps": 3,
               "packing": True, "epochs": 9.0, "samples": 1}  # fmt: skip
    in_adapter = {"rank": "r", "use_dora": "use_dora", "use_rslora": "use_rslora", "lora_dropout": "lora_dropout"}

    def result(number: int, **settings: Any) -> tuple[str, list[str]]:
        home = tmp_path / str(number)
        home.mkdir()
        adapter = {in_adapter[name]: value for name, value in settings.items() if name in in_adapter}
        metrics = {"steps": settings.get("max_steps") or 200}
        metrics |= {"packing": True} if settings.get("packing") else {}
        if "epochs" in settings:
            settings["max_steps"] = None
        path = run(adapter, metrics, **settings)
        place, notes = export_run(path, target, str(home / "out"))
        texts = [file.read_text() for file in sorted(place.iterdir())] if place.is_dir() else [place.read_text()]
        Path(path).rename(home / "run")
        return "".join(texts), notes

    plain = result(0)
    silent = [name for i, (name, value) in enumerate(changes.items(), 1) if result(i, **{name: value}) == plain]
    # The steps that were taken are written; and sft and lm are one thing where the data says which.
    assert set(silent) <= {"epochs", "task"}, silent


def exported_notes(path: str, target: str, tmp_path: Path) -> list[str]:
    return export_run(path, target, str(tmp_path / "out"))[1]


def test_automatic_rates_become_those_arrived_at(run, tmp_path):
    config, notes = exported(run(metrics={"lr": 0.003, "lr_ratio": 2.0}, lr="auto", lr_ratio=None), "trl", tmp_path)
    assert (config["learning_rate"], config["loraplus_lr_ratio"]) == (0.003, 2.0)
    assert "lr = auto becomes what it had arrived at, 0.003 and a ratio of 2" in notes


def test_the_command_says_what_is_left_out_and_writes_over_nothing(run, tmp_path, loraplus_command, refused):
    path, output = run(), tmp_path / "out.yaml"
    told = loraplus_command("export", path, "--to", "trl", "--output", output)
    assert told.code == 0 and "`trl sft` refuses them" in told.out and str(output) in told.out + told.err
    before = output.read_bytes()
    assert "is there already" in refused("export", path, "--to", "trl", "--output", output)
    assert output.read_bytes() == before
    assert "there are peft-benchmark, axolotl" in refused("export", path, "--to", "nemo")
    assert "there is no folder" in refused("export", tmp_path / "nothing", "--to", "trl")
    assert "no run of `loraplus train`" in refused("export", tmp_path, "--to", "trl")
    assert "there is no folder" in refused("export", path, "--to", "trl", "--output", tmp_path / "no" / "out.yaml")
    (Path(path) / "metrics.json").unlink()
    assert "is not finished" in refused("export", path, "--to", "trl", "--output", tmp_path / "other.yaml")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["my-run", "out.yaml"]
