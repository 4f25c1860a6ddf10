"""axolotl's plugin: against axolotl where it is installed, else against the interface that its 0.19 publishes."""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass
from typing import Any

import pytest
from peft.optimizers import create_loraplus_optimizer
from pydantic import BaseModel, ValidationError
from stacks.models import Tokens, classifier
from transformers import Trainer, TrainingArguments

import loraplus
from loraplus.errors import TrainerSetupError
from loraplus.integrations.axolotl import LoraPlusArgs, Plugin

pytestmark = pytest.mark.plugin("axolotl")


@dataclass
class AxolotlArguments(TrainingArguments):
    """axolotl's, as far as LoRA+ goes."""

    loraplus_lr_ratio: float | None = None
    loraplus_lr_embedding: float | None = None


class AxolotlTrainer(Trainer):
    """Builds as axolotl does: with PEFT's function where its own argument is set."""

    def create_optimizer(self, model: Any = None) -> Any:
        if self.args.loraplus_lr_ratio is None:  # type: ignore[attr-defined]
            return super().create_optimizer(model)
        cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        ratio, embedding = self.args.loraplus_lr_ratio, self.args.loraplus_lr_embedding  # type: ignore[attr-defined]
        self.optimizer = create_loraplus_optimizer(
            self.model, cls, loraplus_lr_ratio=ratio, loraplus_lr_embedding=embedding, **kwargs
        )
        return self.optimizer


def config(**written: Any) -> dict[str, Any]:
    """What axolotl makes of its YAML: its own schema stands in front of the plugin's."""
    if importlib.util.find_spec("axolotl") is not None:
        from axolotl.integrations.base import PluginManager  # type: ignore[import-not-found]
        from axolotl.integrations.config import merge_input_args  # type: ignore[import-not-found]

        PluginManager.get_instance().register("loraplus.integrations.axolotl.Plugin")
        written = {"base_model": "m", "datasets": [{"path": "d", "type": "alpaca"}], "micro_batch_size": 1, **written}
        return (
            merge_input_args()[1](gradient_accumulation_steps=1, learning_rate=1e-3, **written)
        ).model_dump(exclude_none=True)  # fmt: skip

    class Own(BaseModel):
        loraplus_lr_ratio: float | None = None
        loraplus_lr_embedding: float | None = 1e-6

    class Merged(Own, LoraPlusArgs):
        pass

    return Merged(**written).model_dump(exclude_none=True)


def trainer(tmp_path, cfg: dict[str, Any], **options: Any) -> Any:
    own = {name: cfg.get(name) for name in ("loraplus_lr_ratio", "loraplus_lr_embedding")}
    args = AxolotlArguments(
        str(tmp_path), learning_rate=1e-3, weight_decay=0.1, max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True,
        label_names=["labels"], **own, **options,
    )  # fmt: skip
    return AxolotlTrainer(classifier(), args, train_dataset=Tokens())


def test_published_interface_the_plugin_has_axolotls_hooks():
    module, _, name = Plugin().get_input_args().rpartition(".")
    assert module == "loraplus.integrations.axolotl" and globals()[name] is LoraPlusArgs
    assert not hasattr(Plugin, "create_optimizer") or "create_optimizer" not in vars(Plugin)


def test_published_interface_the_ratio_of_the_yaml_is_that_of_the_step_with_axolotls_decay(tmp_path, caplog):
    cfg = config(loraplus_lr_ratio=4, loraplus_lr_head=5e-4)
    ours = trainer(tmp_path, cfg)
    Plugin().post_trainer_create(cfg, ours)
    with caplog.at_level(logging.INFO, "axolotl"):
        ours.train()
    loraplus.verify(ours.model, ours.optimizer, lr=1e-3, lr_ratio=4, lr_head=5e-4)
    decays = {entry.role: entry.weight_decay for entry in loraplus.explain(ours.model, ours.optimizer).entries}
    assert decays["lora_A"] == decays["lora_B"] == 0.1
    assert [r.getMessage() for r in caplog.records if r.name == "axolotl.loraplus"] == [
        "LoRA+ verified: lora_A at 0.001 (4 tensors), lora_B at 0.004 (4 tensors), head at 0.0005 (2 tensors)"
    ]


def test_published_interface_without_a_ratio_it_is_sixteen_and_optim_args_may_say_another(tmp_path):
    for options, ratio in (({}, 16), ({"optim_args": "ratio=2"}, 2)):
        ours = trainer(tmp_path, config(), **options)
        Plugin().post_trainer_create(config(), ours)
        ours.create_optimizer()
        loraplus.verify(ours.model, ours.optimizer, lr=1e-3, lr_ratio=ratio)


def test_published_interface_axolotls_default_for_embeddings_is_not_taken_for_a_wish():
    assert config(loraplus_lr_ratio=4).get("loraplus_lr_embedding") is None
    assert config(loraplus_lr_embedding=1e-4)["loraplus_lr_embedding"] == 1e-4


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"loraplus_lr_ratio": -1}, "lr_ratio must be a positive"),
        ({"loraplus_lr_heads": 1e-3}, "loraplus_lr_heads is no setting of LoRA"),
    ],
)
def test_published_interface_a_setting_that_cannot_be_used_is_refused_with_the_file(written, message):
    with pytest.raises(ValidationError, match=message):
        config(**written)


@pytest.mark.parametrize(("ratio", "text"), [(4, "ratio=2"), (16, "ratio=2"), (4, "ratio=16")])
def test_published_interface_a_ratio_of_the_yaml_beside_another_in_optim_args_is_refused(tmp_path, ratio, text):
    cfg = config(loraplus_lr_ratio=ratio)
    with pytest.raises(TrainerSetupError, match=rf"lr_ratio = {text.partition('=')[2]}.0, loraplus.attach for {ratio}"):
        Plugin().post_trainer_create(cfg, trainer(tmp_path, cfg, optim_args=text))
