"""DeepSpeed configurations that would take the rates over are refused, in the file and in Trainer."""

from __future__ import annotations

import json

import pytest
import ranks

from integrations import deepspeed_trainer
from integrations.deepspeed_trainer import OPTIMIZER
from loraplus.errors import InputError, TrainerSetupError
from loraplus.integrations.deepspeed import check_deepspeed_config


def test_an_optimizer_in_the_configuration_is_refused_with_what_to_do():
    with pytest.raises(TrainerSetupError, match=r'"optimizer" \(AdamW\).*remove that block.*create_optimizer'):
        check_deepspeed_config({"optimizer": OPTIMIZER})


@pytest.mark.parametrize("kind", ["WarmupLR", "WarmupDecayLR", "OneCycle", "LRRangeTest"])
def test_a_scheduler_that_sets_one_rate_for_all_groups_is_refused(kind):
    with pytest.raises(TrainerSetupError, match=rf"{kind}, which gives A and B the same rate; remove that block"):
        check_deepspeed_config({"scheduler": {"type": kind}})


@pytest.mark.parametrize("config", [{}, {"zero_optimization": {"stage": 3}}, {"scheduler": {"type": "WarmupCosineLR"}}])
def test_other_configurations_pass(config, tmp_path):
    check_deepspeed_config(config)
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(config))
    check_deepspeed_config(path)


@pytest.mark.parametrize(
    ("content", "expected"), [("{", "not valid JSON"), ("[]", "JSON object"), (None, "cannot read")]
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path, content, expected):
    path = tmp_path / "ds.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=expected):
        check_deepspeed_config(str(path))


@pytest.mark.parametrize(("kind", "options"), [
    ("WarmupLR", {"warmup_max_lr": 1e-3}), ("WarmupDecayLR", {"total_num_steps": 9, "warmup_max_lr": 1e-3}),
    ("OneCycle", {"cycle_min_lr": 1e-4, "cycle_max_lr": 1e-3}), ("WarmupCosineLR", {"total_num_steps": 9}),
])  # fmt: skip
def test_what_is_refused_is_what_flattens(kind, options):
    """DeepSpeed's own schedulers on an optimizer with two rates: the rule stated as KEEPS_THE_RATIO holds."""
    schedules = pytest.importorskip("deepspeed.runtime.lr_schedules", reason="deepspeed is not installed")
    import torch

    from loraplus.integrations.deepspeed import KEEPS_THE_RATIO

    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr, "betas": (0.9, 0.99)} for lr in (1e-4, 16e-4)]
    optimizer = torch.optim.AdamW(groups)
    scheduler = getattr(schedules, kind)(optimizer, **options)
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    a, b = (group["lr"] for group in optimizer.param_groups)
    assert (b == pytest.approx(16 * a)) == (kind in KEEPS_THE_RATIO)
    assert a > 0


def test_trainer_refuses_them_and_trains_with_zero_2_at_the_right_rates(tmp_path):
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    for result in ranks.run(deepspeed_trainer.refused_then_trained, tmp_path, str(tmp_path / "out")):
        assert "create_optimizer" in result["messages"]["optimizer"]
        assert "WarmupLR" in result["messages"]["scheduler"]
        assert result["optimizer"] == "DeepSpeedZeroOptimizer" and result["entries"] > 8
