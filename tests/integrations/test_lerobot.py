"""LeRobot's plugin, against the interface that its 0.4.4 publishes: configurations that build, and who calls them."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import loraplus
from loraplus.errors import ResumeMismatchError, TrainerSetupError
from loraplus.integrations import lerobot

pytestmark = pytest.mark.plugin("LeRobot")


class Policy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vision = nn.Linear(16, 16)
        self.action = nn.Linear(16, 8)
        self.config = SimpleNamespace(model_type="policy", use_peft=False)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.action(self.vision(batch).tanh())

    def get_optim_params(self) -> Any:
        return self.parameters()


class AdamWConfig:
    """LeRobot's configuration of AdamW; with `slow` it has groups of its own, as XVLA's."""

    def __init__(self, slow: bool = False) -> None:
        self.slow = slow

    def build(self, params: Any) -> torch.optim.Optimizer:
        params = list(params)
        if self.slow:
            half = len(params) // 2
            params = [{"params": params[:half], "lr": 1e-4, "name": "vlm"}, {"params": params[half:], "name": "other"}]
        return torch.optim.AdamW(params, lr=1e-3, weight_decay=0.1)


class Cosine:
    def build(self, optimizer: torch.optim.Optimizer, steps: int) -> Any:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps))


def config(**more: Any) -> SimpleNamespace:
    return SimpleNamespace(**{
        "optimizer": AdamWConfig(), "scheduler": Cosine(), "steps": 4, "use_policy_training_preset": True, **more
    })  # fmt: skip


def policy() -> Any:
    torch.manual_seed(0)
    return get_peft_model(Policy(), LoraConfig(r=4, target_modules=["vision", "action"], use_dora=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("preset", [True, False])
def test_published_interface_a_policy_trains_at_the_ratio_under_lerobots_schedule(preset):
    model = policy()
    optimizer, scheduler = lerobot.make_optimizer_and_scheduler(config(use_policy_training_preset=preset), model, 4)
    model(torch.randn(2, 16)).sum().backward()
    optimizer.step()
    scheduler.step()
    loraplus.verify(model, optimizer, lr=1e-3, lr_ratio=4)
    assert {group["lr"] for group in optimizer.param_groups} == {0.75e-3, 3e-3}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 6  # nothing that is frozen


def test_published_interface_the_groups_of_a_policy_keep_their_rates():
    model = policy()
    own = [p for p in model.parameters() if p.requires_grad]
    optimizer, _ = lerobot.make_optimizer_and_scheduler(config(optimizer=AdamWConfig(slow=True)), model, lr_ratio=4)
    rates = {entry.lr for entry in loraplus.explain(model, optimizer).entries if entry.role == "lora_B"}
    assert rates <= {4e-4, 4e-3} and len(own) == 6


def test_published_interface_lerobots_checkpoint_of_tensors_and_groups_is_refused_at_another_ratio():
    model = policy()
    optimizer, _ = lerobot.make_optimizer_and_scheduler(config(), model, lr_ratio=4)
    state = optimizer.state_dict()
    assert state.keys() == {"state", "param_groups"}
    lerobot.make_optimizer_and_scheduler(config(), policy(), lr_ratio=4)[0].load_state_dict(state)
    with pytest.raises(ResumeMismatchError, match=r"4 times.*asks for 2"):
        lerobot.make_optimizer_and_scheduler(config(), policy(), lr_ratio=2)[0].load_state_dict(state)


def test_published_interface_several_optimizers_are_refused():
    several = SimpleNamespace(build=lambda params: {"actor": torch.optim.Adam(params)})
    with pytest.raises(TrainerSetupError, match="builds several optimizers"):
        lerobot.make_optimizer_and_scheduler(config(optimizer=several), policy())


def test_published_interface_the_command_takes_its_flag_and_leaves_lerobot_the_rest(monkeypatch, capsys):
    script = ModuleType("lerobot.scripts.lerobot_train")
    seen: dict[str, Any] = {}

    def main() -> None:
        model = policy()
        seen["argv"], seen["model"] = sys.argv[1:], model
        seen["optimizer"], _ = script.make_optimizer_and_scheduler(config(), model)  # type: ignore[attr-defined]

    script.main, script.make_optimizer_and_scheduler = main, None  # type: ignore[attr-defined]
    for name in ("lerobot", "lerobot.scripts"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "lerobot.scripts.lerobot_train", script)
    monkeypatch.setattr(sys, "argv", ["x", "--policy.type=act", "--loraplus.lr_ratio=4", "--steps=4"])
    lerobot.main()
    assert seen["argv"] == ["--policy.type=act", "--steps=4"]
    loraplus.verify(seen["model"], seen["optimizer"], lr=1e-3, lr_ratio=4)
    monkeypatch.setattr(sys, "argv", ["x", "--loraplus.ratio=4"])
    with pytest.raises(SystemExit) as ended:
        lerobot.main()
    assert ended.value.code == 2 and "--loraplus.ratio=4 is no setting" in capsys.readouterr().err
    del script.make_optimizer_and_scheduler  # type: ignore[attr-defined]
    with pytest.raises(TrainerSetupError, match="has no make_optimizer_and_scheduler"):
        lerobot.install(loraplus.Rates())
