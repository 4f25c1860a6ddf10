"""Lightning's CLI: real where jsonargparse is installed; else its own method, given what the parser would give."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from stacks.models import Tokens, classifier

import loraplus
from loraplus.errors import TrainerSetupError

pl = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")
from lightning.pytorch import cli  # noqa: E402

from loraplus.integrations.lightning import LoraPlusCallback  # noqa: E402
from loraplus.integrations.lightning_cli import LoraPlusCLI  # noqa: E402

pytestmark = pytest.mark.plugin("Lightning's CLI")
REAL = bool(cli._JSONARGPARSE_SIGNATURES_AVAILABLE)


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = classifier()

    def training_step(self, batch: Any, index: int) -> Any:
        return self.model(**batch).loss

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(Tokens(), batch_size=8)  # type: ignore[arg-type]


CALLBACK = {
    "class_path": "loraplus.integrations.lightning.LoraPlusCallback",
    "init_args": {"loraplus_lr_ratio": 4, "loraplus_lr_head": 5e-4},
}
ADAMW = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3, "weight_decay": 0.1}}
DECAY = {"class_path": "torch.optim.lr_scheduler.ExponentialLR", "init_args": {"gamma": 0.5}}


def run(tmp_path, **changes: Any) -> Any:
    """What `LoraPlusCLI` leaves, as (module, trainer), after the fit that a YAML file asks for."""
    settings = {
        "accelerator": "cpu", "max_steps": 2, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "barebones": False,
    }  # fmt: skip
    config = {"trainer": {**settings, "callbacks": [CALLBACK]}, "optimizer": ADAMW, "lr_scheduler": DECAY, **changes}
    if changes.get("trainer") == "without":
        config["trainer"] = settings
    if REAL:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        whole = LoraPlusCLI(Module, save_config_callback=None, args=["fit", f"--config={path}"])
        return whole.model, whole.trainer
    callbacks = [LoraPlusCallback(**each["init_args"]) for each in config["trainer"].pop("callbacks", [])]
    part: Any = LoraPlusCLI.__new__(LoraPlusCLI)
    part.model, part.trainer = Module(), pl.Trainer(**config["trainer"], callbacks=callbacks)
    part.auto_configure_optimizers, part.trainer_defaults = True, {}
    part.config_init = {**config, "trainer": {"callbacks": callbacks}}
    part._get = lambda values, key, default=None: values.get(key, default)
    registered = {"_optimizers": {"optimizer": ((torch.optim.Optimizer,), "AUTOMATIC")}, "_lr_schedulers": {
        "lr_scheduler": ((torch.optim.lr_scheduler.LRScheduler,), "AUTOMATIC")
    }}  # fmt: skip
    part._parser = lambda subcommand: SimpleNamespace(**registered)
    part._add_configure_optimizers_method_to_model(None)
    part.trainer.fit(part.model)
    return part.model, part.trainer


def test_the_optimizer_and_the_scheduler_of_a_yaml_file_have_the_groups(tmp_path):
    module, trainer = run(tmp_path)
    (optimizer,) = trainer.optimizers
    assert type(optimizer) is torch.optim.AdamW
    loraplus.verify(module, optimizer, lr=1e-3, lr_ratio=4, lr_head=5e-4)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1}
    assert len(trainer.lr_scheduler_configs[0].scheduler.base_lrs) == len(optimizer.param_groups) > 2
    assert trainer.callback_metrics["lr/lora_B"] == pytest.approx(4e-3)


def test_ratio_one_is_what_lightning_builds_bit_for_bit(tmp_path):
    callback = {**CALLBACK, "init_args": {"loraplus_lr_ratio": 1}}
    ours = run(tmp_path, trainer={"accelerator": "cpu", "max_steps": 3, "logger": False, "callbacks": [callback],
                                  "enable_checkpointing": False, "enable_progress_bar": False})[0]  # fmt: skip
    plain = Module()
    optimizer = cli.instantiate_class(plain.parameters(), ADAMW)
    plain.configure_optimizers = lambda: ([optimizer], [cli.instantiate_class(optimizer, DECAY)])
    pl.Trainer(accelerator="cpu", max_steps=3, logger=False, enable_checkpointing=False,
               enable_progress_bar=False).fit(plain)  # fmt: skip
    for (name, one), other in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_a_file_without_the_callback_is_refused(tmp_path):
    with pytest.raises(TrainerSetupError, match=r"trainer.callbacks has 0; list loraplus"):
        run(tmp_path, trainer="without")
