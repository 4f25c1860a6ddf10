"""The patches in upstream/: each is applied to a copy of the released package, and repairs what it says it does."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import pytest
import torch
import transformers
from conftest import tiny_bert
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import nn

UPSTREAM = Path(__file__).parent.parent / "upstream"
INSTALLED = {"peft": Path(peft.__file__).parent, "transformers": Path(transformers.__file__).parent}
OPTIMIZER = "src/peft/optimizers/loraplus.py"


def patched(topic: str, folder: Path) -> Path:
    """A folder with the patched copies of the installed files that a patch changes."""
    patch = UPSTREAM / topic / "patch.diff"
    for line in patch.read_text().splitlines():
        if line.startswith("--- a/src/"):
            name = line.removeprefix("--- a/")
            package, _, path = name.removeprefix("src/").partition("/")
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((INSTALLED[package] / path).read_bytes())
    options = ["--include=src/*", "--include=method_comparison/*"]
    done = subprocess.run(["git", "apply", *options, patch], cwd=folder, capture_output=True, text=True,
                          env={**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)})  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


def module(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[name] = made  # where dataclasses look for the names in their annotations
    spec.loader.exec_module(made)
    return made


@pytest.fixture
def before_and_after(tmp_path):
    """PEFT's function as it was released, and as a patch leaves it."""

    def functions(topic: str) -> tuple[Any, Any]:
        after = module(patched(topic, tmp_path) / OPTIMIZER, "peft.optimizers.patched")
        return create_loraplus_optimizer, after.create_loraplus_optimizer

    return functions


def adapted(**options: Any) -> Any:
    return get_peft_model(tiny_bert(), LoraConfig(r=4, target_modules=["query", "value"], **options))  # type: ignore[arg-type]


def made(function: Any, model: Any, **options: Any) -> Any:
    return function(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, **options)


def rates(model: Any, optimizer: Any) -> dict[str, float]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}


def test_weight_decay(before_and_after):
    model, (before, after) = adapted(), before_and_after("peft-weight-decay")
    decays = [{g["weight_decay"] for g in made(f, model, weight_decay=0.1).param_groups[:1]} for f in (before, after)]
    assert decays == [{0.0}, {0.1}]
    assert made(after, model, loraplus_weight_decay=0.2, weight_decay=0.1).param_groups[0]["weight_decay"] == 0.2
    assert made(after, model).param_groups[0]["weight_decay"] == 0.0  # as it was, where nothing is given


def test_empty_groups(before_and_after):
    model, (before, after) = adapted(), before_and_after("peft-empty-groups")
    empty = [sum(not group["params"] for group in made(function, model).param_groups) for function in (before, after)]
    assert empty == [2, 0]
    assert rates(model, made(before, model)) == rates(model, made(after, model))


def test_magnitudes_and_biases(before_and_after):
    model, (before, after) = adapted(use_dora=True, bias="lora_only"), before_and_after("peft-magnitudes")

    def fast(function: Any) -> set[str]:
        optimizer = made(function, model)
        assert rates(model, optimizer).keys() == {name for name, p in model.named_parameters() if p.requires_grad}
        return {
            name.split(".")[-3] if "lora" in name else "bias"
            for name, lr in rates(model, optimizer).items()
            if lr > 1e-3
        }

    assert fast(before) == {"lora_B", "lora_magnitude_vector", "bias"}
    assert fast(after) == {"lora_B"}


def test_fsdp1(before_and_after):
    before, after = before_and_after("peft-fsdp1")
    model = adapted()
    for name, parameter in list(model.named_parameters()):  # what FSDP1 makes of a factor that it shards
        if "lora_A" in name:
            model.get_submodule(name.rpartition(".")[0]).weight = nn.Parameter(parameter.detach().flatten())
    a_rates = [{lr for name, lr in rates(model, made(f, model)).items() if "lora_A" in name} for f in (before, after)]
    assert a_rates == [{16e-3}, {1e-3}]
    flat = nn.Module()
    flat._flat_param = nn.Parameter(torch.zeros(8))
    assert rates(flat, made(before, flat)) == {"_flat_param": 16e-3}  # A and B, at B's rate
    with pytest.raises(ValueError, match="flattened A and B"):
        made(after, flat)


def test_benchmark_entry(tmp_path):
    (folder,) = patched("peft-benchmark-entry", tmp_path).glob("method_comparison/MetaMathQA/experiments/lora/*")
    config = LoraConfig.from_pretrained(folder)
    params = json.loads((folder / "training_params.json").read_text())
    model = adapted()
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, **params["optimizer_kwargs"])
    assert config.r == 32 and params["optimizer_type"] == "lora+"
    used = sorted((group["lr"], group["weight_decay"]) for group in optimizer.param_groups if group["params"])
    assert used == [(5e-5, 0.1), (pytest.approx(4e-4), 0.1)]


def test_transformers_optim(tmp_path, monkeypatch):
    options = {"optim": "adamw_loraplus", "optim_args": "ratio=4", "learning_rate": 1e-3, "weight_decay": 0.1}
    options |= {"use_cpu": True, "report_to": []}
    with pytest.raises(ValueError, match="adamw_loraplus"):
        transformers.TrainingArguments(str(tmp_path), **options)
    folder = patched("transformers-optim", tmp_path) / "src/transformers"
    arguments = module(folder / "training_args.py", "transformers.patched_arguments")
    with monkeypatch.context() as patch:
        patch.setattr("transformers.training_args.OptimizerNames", arguments.OptimizerNames)
        optimizers = module(folder / "trainer_optimizer.py", "transformers.patched_optimizer")
    monkeypatch.setattr("transformers.trainer._OPTIMIZER_HANDLERS", optimizers._OPTIMIZER_HANDLERS)
    args = arguments.TrainingArguments(str(tmp_path), **options)
    optimizer = transformers.Trainer(adapted(), args).create_optimizer()
    used = sorted((group["lr"], group["weight_decay"]) for group in optimizer.param_groups if group["params"])
    assert used == [(1e-3, 0.1), (4e-3, 0.1)]


def test_every_patch_has_a_text_and_minimal_context():
    folders = sorted(path for path in UPSTREAM.iterdir() if path.is_dir())
    assert len(folders) == 8
    for folder in folders:
        assert (folder / "PR.md").read_text().startswith("# ")
        for hunk in (folder / "patch.diff").read_text().split("\n@@")[1:]:
            lines = hunk.split("\n")[1:]
            runs = "".join(line[:1] if line[:1] in "+-" else "." for line in lines).strip(".")
            assert "..." not in runs and any(line.startswith("+") for line in lines)
