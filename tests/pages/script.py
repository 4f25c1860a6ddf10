"""What the code of a page takes for granted: a reader's model, data, trainer, in small. Made when a block names it."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from stacks import trainers
from stacks.contract import Setup
from stacks.models import Tokens, classifier
from torch import nn
from torch.utils.data import DataLoader

Make = Callable[["Script"], Any]


def imported(module: str, name: str = "") -> Make:
    def make(script: Script) -> Any:
        found = importlib.import_module(module)
        return getattr(found, name) if name else found

    return make


def network(layers: tuple[str, ...], prefix: str = "") -> nn.Module:
    """A model with adapters on linear layers of these names."""
    from peft import LoraConfig, get_peft_model

    base = nn.Sequential()
    for layer in layers:
        base.add_module(prefix + layer, nn.Linear(8, 8))
    return get_peft_model(base, LoraConfig(r=2, target_modules=[prefix + layer for layer in layers])).base_model.model


def on_decoder(script: Script) -> nn.Module:
    """An adapter on a model that was loaded from a folder with its tokenizer."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    return get_peft_model(AutoModelForCausalLM.from_pretrained("decoder"), LoraConfig(task_type="CAUSAL_LM", r=2))


def kohya() -> nn.Module:
    """kohya's names: the adapters of U-Net and text encoder are told apart by their first letters."""
    root = nn.Module()
    for name in ("lora_unet_to_q", "lora_te_q_proj"):
        pair = nn.ModuleDict({"lora_down": nn.Linear(8, 2, bias=False), "lora_up": nn.Linear(2, 8, bias=False)})
        root.add_module(name, pair)
    return root


def accelerator(script: Script) -> Any:
    from accelerate import Accelerator

    made = Accelerator(cpu=True)
    made.init_trackers("pages")
    return made


def arguments(script: Script) -> Any:
    from transformers import TrainingArguments

    return TrainingArguments(**{**trainers.common(Setup(script.folder / "out")), "max_steps": 2, "warmup_steps": 0})


def trainer(script: Script) -> Any:
    from transformers import Trainer

    return Trainer(classifier(), script["args"], train_dataset=Tokens())


def trl_trainer(kind: str) -> Make:
    def make(script: Script) -> Any:
        made = trainers.trl_trainer(kind, Setup(script.folder / kind))
        made.args.max_steps = 2
        return made

    return make


def in_a_group(script: Script) -> nn.Module:
    """A model in a process that is a group by itself, as under torchrun."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    return classifier()


MAKERS: dict[str, Make] = {
    "torch": imported("torch"),
    "transformers": imported("transformers"),
    "loraplus": imported("loraplus"),
    "pl": imported("lightning.pytorch"),
    "AdamW": imported("torch.optim", "AdamW"),
    "AutoModelForCausalLM": imported("transformers", "AutoModelForCausalLM"),
    "AutoPeftModelForCausalLM": imported("peft", "AutoPeftModelForCausalLM"),
    "AutoTokenizer": imported("transformers", "AutoTokenizer"),
    "DPOConfig": imported("trl", "DPOConfig"),
    "DPOTrainer": imported("trl", "DPOTrainer"),
    "SFTTrainer": imported("trl", "SFTTrainer"),
    "TrlParser": imported("trl", "TrlParser"),
    "Trainer": imported("transformers", "Trainer"),
    "model": lambda script: classifier(),
    "text_encoder": lambda script: network(("q_proj", "v_proj")),
    "unet": lambda script: network(("to_q", "to_v")),
    "loader": lambda script: DataLoader(Tokens(), batch_size=8),
    "batch": lambda script: next(iter(script["loader"])),
    "data": lambda script: Tokens(),
    "args": arguments,
    "trainer": trainer,
    "accelerator": accelerator,
    "optimizer": lambda script: torch.optim.AdamW(script["model"].parameters(), lr=2e-4),
    "scheduler": lambda script: torch.optim.lr_scheduler.ConstantLR(script["optimizer"], 1.0),
    "step": lambda script: 1,
}


class Script(dict[str, Any]):
    """The names of a page's blocks, which run one after another as one script."""

    def __init__(self, folder: Path, makers: dict[str, Make]) -> None:
        super().__init__(__name__="__page__")
        self.folder, self.makers = folder, {**MAKERS, **makers}

    def __missing__(self, name: str) -> Any:
        self[name] = self.makers[name](self)
        return self[name]

    def run(self, code: str, where: str) -> None:
        tree = ast.parse(code, where)
        for node in ast.walk(tree):  # before it runs: what functions look up does not ask __missing__
            if isinstance(node, ast.Name) and node.id in self.makers:
                self[node.id]
        exec(compile(tree, where, "exec"), self)
