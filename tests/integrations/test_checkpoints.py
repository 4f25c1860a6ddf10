"""What a checkpoint says about ratios by name, and checkpoints from before there were any."""

from __future__ import annotations

import json

import pytest
from test_groups import adapted

import loraplus
from loraplus.inspection.rates import _GROUP_NAME, read_rates_file
from loraplus.integrations.checkpoints import (
    RATES_FILE,
    check_resume,
    rates_record,
    roles_of,
    shapes_of,
    write_rates,
)


def test_resuming_under_other_ratios_by_name_is_refused(tmp_path):
    rates = loraplus.Rates(1e-3, 16.0, lr_ratio_overrides={"query": 4.0})
    write_rates(tmp_path, rates_record(rates, adapted()))
    check_resume(tmp_path, rates)
    assert read_rates_file(tmp_path)["lr_ratio_overrides"] == {"query": 4.0}
    for other in ({}, {"query": 8.0}, {"value": 4.0}):
        with pytest.raises(loraplus.ResumeMismatchError, match="lr_ratio_overrides"):
            check_resume(tmp_path, loraplus.Rates(1e-3, 16.0, lr_ratio_overrides=other))


def test_a_checkpoint_from_before_ratios_by_name_goes_on_without_them_only(tmp_path):
    write_rates(tmp_path, rates_record(loraplus.Rates(1e-3, 16.0), adapted()))
    content = json.loads((tmp_path / RATES_FILE).read_text())
    del content["lr_ratio_overrides"]
    (tmp_path / RATES_FILE).write_text(json.dumps(content))
    check_resume(tmp_path, loraplus.Rates(1e-3, 16.0))
    assert read_rates_file(tmp_path)["lr_ratio"] == 16.0
    with pytest.raises(loraplus.ResumeMismatchError, match="lr_ratio_overrides"):
        check_resume(tmp_path, loraplus.Rates(1e-3, 16.0, lr_ratio_overrides={"query": 4.0}))


def test_another_rank_is_refused_in_one_line_that_names_the_first_factor(tmp_path):
    rates = loraplus.Rates(1e-3, 16.0)
    write_rates(tmp_path, rates_record(rates, adapted(r=8)))
    check_resume(tmp_path, rates, roles=roles_of(adapted(r=8)), shapes=shapes_of(adapted(r=8)))
    with pytest.raises(loraplus.ResumeMismatchError, match=r"rank was 8 there, 4 here \(first of 8: ") as refusal:
        check_resume(tmp_path, rates, roles=roles_of(adapted(r=4)), shapes=shapes_of(adapted(r=4)))
    assert "8 × 16 there and 4 × 16 here" in str(refusal.value) and "\n" not in str(refusal.value)


def test_one_layer_of_another_rank_or_of_another_width_is_refused(tmp_path):
    model, rates = adapted(r=4), loraplus.Rates(1e-3, 16.0)
    write_rates(tmp_path, rates_record(rates, model))
    last_b = [name for name in shapes_of(model) if "lora_B" in name][-1]
    for shape, what in (
        ([16, 6], r"rank was 4 there, 6 here \(first of 1: "),
        ([32, 4], "the shape is another"),
    ):
        with pytest.raises(loraplus.ResumeMismatchError, match=what):
            check_resume(tmp_path, rates, roles=roles_of(model), shapes={**shapes_of(model), last_b: shape})


def test_a_record_from_before_there_were_shapes_goes_on(tmp_path):
    rates = loraplus.Rates(1e-3, 16.0)
    write_rates(tmp_path, rates_record(rates, adapted(r=8)))
    content = json.loads((tmp_path / RATES_FILE).read_text())
    del content["shapes"]
    (tmp_path / RATES_FILE).write_text(json.dumps(content))
    check_resume(tmp_path, rates, roles=roles_of(adapted(r=4)), shapes=shapes_of(adapted(r=4)))


def test_inspect_reads_roles_off_every_name_that_a_group_can_have():
    model = adapted(bias="all")
    ratios = {"query": 4.0}
    groups = loraplus.param_groups(model, 1e-3, 16.0, 0.1, lr_ratio_overrides=ratios, lr_overrides={"layer.0": 0.5})
    names = [group["name"] for group in groups]
    assert "lora_B_ratio4_x0.5" in names
    roles = [_GROUP_NAME.fullmatch(name).group(1) for name in names]
    assert all(name.startswith(role) for name, role in zip(names, roles, strict=True))


def test_a_folder_of_several_models_says_nothing_of_which_the_adapter_is(tmp_path):
    record = rates_record(loraplus.Rates(1e-3, 16.0), adapted())
    write_rates(tmp_path, {"models": {"unet": record, "text_encoder": record}})
    assert read_rates_file(tmp_path) is None


def test_a_role_that_another_version_had_for_a_head_is_no_other_parameter(tmp_path):
    rates, model = loraplus.Rates(1e-3, 16.0), adapted()
    record = rates_record(rates, model)
    heads = [name for name, role in record["roles"].items() if role == "head"]
    assert heads
    write_rates(tmp_path, {**record, "roles": {**record["roles"], **dict.fromkeys(heads, "other")}})
    check_resume(tmp_path, rates, roles=record["roles"])
    factor = next(name for name, role in record["roles"].items() if role == "lora_A")
    write_rates(tmp_path, {**record, "roles": {**record["roles"], factor: "lora_B"}})
    with pytest.raises(loraplus.ResumeMismatchError, match=r"1 have another place .first: base_model.*lora_A"):
        check_resume(tmp_path, rates, roles=record["roles"])


def test_a_rate_that_reached_no_parameter_then_is_not_missed_now(tmp_path):
    model = adapted(modules_to_save=None)
    write_rates(tmp_path, rates_record(loraplus.Rates(1e-3, 16.0, lr_head=2e-3), model))
    check_resume(tmp_path, loraplus.Rates(1e-3, 16.0))
    write_rates(tmp_path, rates_record(loraplus.Rates(1e-3, 16.0, lr_head=2e-3), adapted()))
    with pytest.raises(loraplus.ResumeMismatchError, match="lr_head = 0.002"):
        check_resume(tmp_path, loraplus.Rates(1e-3, 16.0))
