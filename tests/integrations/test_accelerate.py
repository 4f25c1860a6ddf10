"""Accelerate: one model or several, each with its record; a record that needs no model any more."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from test_groups import adapted

pytest.importorskip("accelerate", reason="accelerate is not installed")

from accelerate import Accelerator

import loraplus
from loraplus.errors import ResumeMismatchError, TrainerSetupError
from loraplus.integrations.accelerate import guard_resume
from loraplus.integrations.checkpoints import RATES_FILE


def groups(models, ratios):
    return [
        {**group, "name": f"{name}.{group['name']}"}
        for (name, model), ratio in zip(models.items(), ratios, strict=True)
        for group in loraplus.param_groups(model, lr=1e-3, lr_ratio=ratio)
    ]


def prepared(ratios=(16, 4), register="calls", options=({}, {}), autos=0):
    """An Accelerator with two models in one optimizer, as diffusers' scripts have it."""
    accelerator = Accelerator(cpu=True)
    models = {"unet": adapted(**options[0]), "text_encoder": adapted(**options[1])}
    optimizer = torch.optim.AdamW(groups(models, ratios))
    unet, encoder, optimizer = accelerator.prepare(*models.values(), optimizer)
    installed = [loraplus.AutoRates(model, optimizer) for model in (unet, encoder)[:autos]]
    if register == "calls":
        guard_resume(accelerator, unet, optimizer)
        guard_resume(accelerator, encoder, optimizer)
    elif register == "names":
        guard_resume(accelerator, unet, optimizer, name="unet")
        guard_resume(accelerator, encoder, optimizer, name="text_encoder")
    elif register == "dict":
        found = guard_resume(accelerator, {"unet": unet, "text_encoder": encoder}, optimizer)
        assert [found[name].lr_ratio for name in found] == [*ratios]
    else:
        guard_resume(accelerator, unet, optimizer)
    return accelerator, (unet, encoder), optimizer, installed


@pytest.mark.parametrize("register", ["calls", "names", "dict"])
def test_two_models_resume_and_each_is_refused_at_another_ratio(register, tmp_path):
    prepared(register=register)[0].save_state(str(tmp_path))
    prepared(register=register)[0].load_state(str(tmp_path))
    names = ("model", "model_1") if register == "calls" else ("unet", "text_encoder")
    saved = json.loads((tmp_path / RATES_FILE).read_text())["models"]
    assert {name: record["lr_ratio"] for name, record in saved.items()} == dict(zip(names, (16, 4), strict=True))
    for ratios, name in (((2, 4), names[0]), ((16, 2), names[1])):
        with pytest.raises(ResumeMismatchError, match=f"^{name} in .*lr_ratio"):
            prepared(ratios, register)[0].load_state(str(tmp_path))


def test_a_run_with_other_models_is_refused(tmp_path):
    prepared()[0].save_state(str(tmp_path / "two"))
    prepared(register="one")[0].save_state(str(tmp_path / "one"))
    with pytest.raises(ResumeMismatchError, match="models model, model_1, this run has registered model;"):
        prepared(register="one")[0].load_state(str(tmp_path / "two"))
    with pytest.raises(ResumeMismatchError, match="registered unet, text_encoder"):
        prepared(register="names")[0].load_state(str(tmp_path / "two"))
    with pytest.raises(ResumeMismatchError, match="models model, this run has registered model, model_1"):
        prepared()[0].load_state(str(tmp_path / "one"))
    with pytest.raises(TrainerSetupError, match="called unet already"):
        accelerator, models, optimizer, _ = prepared(register="names")
        guard_resume(accelerator, models[0], optimizer, name="unet")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["query", "key"]}, r"4 of its 10 are not trained by this run \(first: .*value\.lora_A"),
        ({"layers_to_transform": [0]}, "4 of its 10 are not trained by this run"),
        ({"bias": "lora_only"}, "4 of this run's 14 are not among them"),
    ],
)
def test_a_checkpoint_of_other_parameters_is_refused_before_anything_is_loaded(options, message, tmp_path):
    prepared()[0].save_state(str(tmp_path))
    accelerator, (_, encoder), _, _ = prepared(options=({}, options))
    before = [parameter.clone() for parameter in encoder.parameters()]
    with pytest.raises(ResumeMismatchError, match=f"^model_1 in .* other parameters: .*{message}"):
        accelerator.load_state(str(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(before, encoder.parameters(), strict=True))


def test_a_record_of_one_model_is_the_one_of_earlier_versions(tmp_path):
    prepared(register="one")[0].save_state(str(tmp_path))
    saved = json.loads((tmp_path / RATES_FILE).read_text())
    assert saved["lr_ratio"] == 16 and "models" not in saved
    prepared(register="one")[0].load_state(str(tmp_path))
    for key in ("lr_ratio_overrides", "roles"):
        del saved[key]
    (tmp_path / RATES_FILE).write_text(json.dumps(saved))
    prepared(register="one")[0].load_state(str(tmp_path))


def freeze(model):
    model.requires_grad_(False)


def freeze_one_factor(model):
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)


def disable(model):
    model.base_model.disable_adapter_layers()


def merge(model):
    model.merge_and_unload()


@pytest.mark.parametrize("what", [freeze, freeze_one_factor, disable, merge])
@pytest.mark.parametrize("register", ["one", "calls"])
def test_saving_after_the_adapter_was_changed_writes_what_was_true(what, register, tmp_path):
    accelerator, (model, _), _, _ = prepared(register=register)
    what(model)
    accelerator.save_state(str(tmp_path))
    saved = json.loads((tmp_path / RATES_FILE).read_text())
    saved = saved if register == "one" else saved["models"]["model"]
    assert (saved["lr_ratio"], len(saved["roles"])) == (16, 10)


def train(models, optimizer, steps):
    for _ in range(steps):
        ids, labels = torch.randint(0, 64, (4, 8)), torch.tensor([0, 1, 0, 1])
        sum(model(input_ids=ids, labels=labels).loss for model in models).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_automatic_rates_are_saved_for_the_model_that_has_them(tmp_path):
    accelerator, models, optimizer, (rates,) = prepared(autos=1)
    train(models, optimizer, 3)
    accelerator.save_state(str(tmp_path))
    saved = json.loads((tmp_path / RATES_FILE).read_text())["models"]
    assert saved["model"]["auto"]["lr_b"] == rates.lr_b > 0
    assert "auto" not in saved["model_1"] and saved["model_1"]["lr_ratio"] == 4
    accelerator, _, _, (resumed,) = prepared(autos=1)
    accelerator.load_state(str(tmp_path))
    assert (resumed.lr_a, resumed.lr_b, resumed.steps) == (rates.lr_a, rates.lr_b, 3)
    with pytest.raises(ResumeMismatchError, match="model in .*automatic rates"):
        prepared()[0].load_state(str(tmp_path))


def test_what_flattens_the_ratio_of_a_prepared_optimizer_is_told():
    accelerator, models, optimizer, _ = prepared()
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer.optimizer, 1e-3, total_steps=8)
    scheduler = accelerator.prepare(scheduler)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", loraplus.LoraPlusWarning)
        for _ in range(3):
            train(models, optimizer, 1)
            scheduler.step()
    (told,) = [str(entry.message) for entry in caught if entry.category is loraplus.LoraPlusWarning]
    assert "unet.lora_B is at 1 times" in told and "text_encoder.lora_B is at 1 times" in told
    assert "OneCycleLR did it" in told and "max_lr=[0.001, 0.016, 0.001, 0.001, 0.004, 0.001]" in told


def test_automatic_rates_are_registered_before_their_first_step_where_only_factors_train(tmp_path):
    accelerator = Accelerator(cpu=True)
    model = adapted(modules_to_save=None)
    model, optimizer = accelerator.prepare(model, loraplus.create_optimizer(model, lr=0.5))
    loraplus.AutoRates(model, optimizer)
    assert guard_resume(accelerator, model, optimizer) == loraplus.Rates(0.5, 1.0)
    accelerator.save_state(str(tmp_path))
    accelerator.load_state(str(tmp_path))
