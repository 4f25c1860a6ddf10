"""param_groups, create_optimizer, explain and verify: who gets which rate, and the proof."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys

import pytest
import torch
from conftest import tiny_bert
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer as peft_optimizer

import loraplus
from loraplus.roles import trainable_parameters


def adapted(**options):
    torch.manual_seed(0)
    config = {"r": 4, "target_modules": ["query", "value"], "modules_to_save": ["classifier"], **options}
    return get_peft_model(tiny_bert(), LoraConfig(**config))


def rates_by_role(model, optimizer):
    return {entry.role: entry.lr for entry in loraplus.explain(model, optimizer).entries}


def test_the_core_imports_torch_only():
    code = (
        "import sys, loraplus; loraplus.param_groups, loraplus.verify, loraplus.create_optimizer; "
        "print([m for m in ('transformers', 'peft', 'numpy.typing', 'accelerate', 'optuna', 'scipy', 'rich', 'typer') "
        "if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_groups_are_named_never_empty_and_hold_every_parameter_once():
    model = adapted(use_dora=True, bias="all")
    groups = loraplus.param_groups(model, lr=1e-3, lr_ratio=16.0, weight_decay=0.1)
    names = [group["name"] for group in groups]
    assert len(set(names)) == len(names) and all(group["params"] for group in groups)
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_plain_lora_gives_exactly_two_groups():
    model = adapted(modules_to_save=None)
    groups = loraplus.param_groups(model, lr=1e-3, lr_ratio=16.0, weight_decay=0.1)
    assert [(group["name"], group["lr"]) for group in groups] == [("lora_A", 1e-3), ("lora_B", 16e-3)]


def test_only_b_gets_bs_rate():
    model = adapted(use_dora=True, bias="all", target_modules=["query", "word_embeddings"])
    optimizer = loraplus.create_optimizer(model, torch.optim.AdamW, lr=1e-3, lr_ratio=10.0)
    rates = rates_by_role(model, optimizer)
    assert rates.pop("lora_B") == pytest.approx(1e-2)
    assert set(rates.values()) == {1e-3}
    assert set(rates) == {"lora_A", "lora_embedding_A", "lora_embedding_B", "magnitude", "head", "norm_bias"}


def test_every_role_can_have_a_rate_of_its_own():
    model = adapted(use_dora=True, target_modules=["query", "word_embeddings"])
    own = {"lr_embedding": 2e-4, "lr_head": 3e-4, "lr_magnitude": 4e-4}
    optimizer = loraplus.create_optimizer(model, torch.optim.AdamW, lr=1e-3, lr_ratio=10.0, **own)
    assert rates_by_role(model, optimizer) == {
        "lora_A": 1e-3, "lora_B": 1e-2, "lora_embedding_A": 2e-4, "lora_embedding_B": 2e-4, "head": 3e-4,
        "magnitude": 4e-4,
    }  # fmt: skip
    loraplus.verify(model, optimizer, lr_ratio=10.0, **own)
    with pytest.raises(loraplus.RateMismatchError, match="classifier"):
        loraplus.verify(model, optimizer, lr_ratio=10.0, **{**own, "lr_head": 1e-3})


def test_overrides_multiply_the_rates_of_matching_names():
    model = adapted()
    overrides = {r"layer\.0\.": 0.5, r"value": 0.1}
    groups = loraplus.param_groups(model, 1e-3, 16.0, lr_overrides=overrides)
    by_name = {group["name"]: group["lr"] for group in groups}
    assert by_name["lora_B_x0.05"] == pytest.approx(16e-3 * 0.05)
    assert by_name["lora_A"] == 1e-3
    optimizer = torch.optim.SGD(groups)
    loraplus.verify(model, optimizer, lr_ratio=16.0, lr_overrides=overrides)
    with pytest.raises(loraplus.InvalidRateError, match="matches no trainable parameter"):
        loraplus.param_groups(model, 1e-3, lr_overrides={"nowhere": 2.0})


def test_ratios_can_differ_by_name_and_verify_checks_them():
    model = adapted()
    ratios = {r"query": 4.0, r"layer\.0\..*value": 2.0}
    groups = loraplus.param_groups(model, 1e-3, 16.0, lr_ratio_overrides=ratios, lr_overrides={"query": 0.5})
    rates = {group["name"]: group["lr"] for group in groups}
    assert rates == pytest.approx({
        "lora_A_x0.5": 5e-4, "lora_B_ratio4_x0.5": 2e-3, "lora_A": 1e-3, "lora_B_ratio2": 2e-3, "lora_B": 16e-3,
        "head": 1e-3,
    })  # fmt: skip
    optimizer = loraplus.create_optimizer(model, lr=1e-3, lr_ratio=16.0, lr_ratio_overrides=ratios)
    loraplus.verify(model, optimizer, lr_ratio=16.0, lr_ratio_overrides=ratios)
    assert {e.lr for e in loraplus.explain(model, optimizer).entries if ".query.lora_B" in e.name} == {4e-3}
    with pytest.raises(loraplus.RateMismatchError, match="query.lora_B"):
        loraplus.verify(model, optimizer, lr_ratio=16.0)
    with pytest.raises(loraplus.RateMismatchError, match="query.lora_B"):
        loraplus.verify(model, optimizer, lr_ratio=16.0, lr_ratio_overrides={**ratios, "query": 8.0})


@pytest.mark.parametrize(
    ("ratios", "message"),
    [
        ({"lora_A": 4.0}, "matches no B factor"),
        ({"query": 4.0, "layer": 2.0}, "'query' and 'layer' both match"),
        ({"query": 0}, "query"),
        ({"(": 2.0}, "not a regular expression"),
        ([4.0], "must map"),
    ],
)
def test_ratios_by_name_that_would_be_ignored_or_contradict_are_refused(ratios, message):
    with pytest.raises(loraplus.InvalidRateError, match=message):
        loraplus.param_groups(adapted(), lr=1e-3, lr_ratio_overrides=ratios)


@pytest.mark.parametrize(
    ("setting", "what"),
    [("lr_head", "a head"), ("lr_embedding", "an embedding"), ("lr_magnitude", "a magnitude of DoRA")],
)
def test_a_rate_that_reaches_no_parameter_is_refused_by_name_everywhere(setting, what):
    model, own = adapted(modules_to_save=None), {setting: 1e-2}
    plain = loraplus.create_optimizer(model, lr=1e-3, lr_ratio=16.0)
    for refused in (
        lambda: loraplus.param_groups(model, lr=1e-3, **own),
        lambda: loraplus.create_optimizer(model, lr=1e-3, **own),
        lambda: loraplus.verify(model, plain, 16.0, **own),
        lambda: loraplus.verify(model, plain, 16.0, lr=1e-3, **own),
    ):
        with pytest.raises(loraplus.InvalidRateError, match=f"{setting} = 0.01 .nothing that trains is {what}"):
            refused()


def test_all_settings_that_reach_nothing_are_named_at_once_and_what_trains_is_said():
    with pytest.raises(loraplus.InvalidRateError, match="lr_embedding.*lr_head.*lr_magnitude.*lora_A, lora_B"):
        loraplus.param_groups(adapted(modules_to_save=None), 1e-3, lr_embedding=1.0, lr_head=1.0, lr_magnitude=1.0)


def test_an_output_layer_unfrozen_by_hand_learns_at_the_heads_rate():
    model = adapted(modules_to_save=None)
    model.base_model.model.classifier.requires_grad_(True)
    optimizer = loraplus.create_optimizer(model, lr=1e-4, lr_ratio=16.0, lr_head=1e-2)
    loraplus.verify(model, optimizer, 16.0, lr=1e-4, lr_head=1e-2)
    assert rates_by_role(model, optimizer) == {"lora_A": 1e-4, "lora_B": 16e-4, "head": 1e-2}


def test_a_ratio_that_reaches_nothing_is_a_warning_since_it_has_a_default():
    model = adapted(target_modules=["word_embeddings"], modules_to_save=None)
    with pytest.warns(loraplus.LoraPlusWarning, match="lr_ratio = 16 reaches no parameter"):
        loraplus.param_groups(model, lr=1e-3)


def test_pefts_signature_takes_a_rate_of_embeddings_for_a_model_that_has_none():
    for model in (adapted(), adapted(target_modules=["query", "word_embeddings"])):
        optimizer = loraplus.create_loraplus_optimizer(
            model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0, loraplus_lr_embedding=1e-6
        )
        rates = rates_by_role(model, optimizer)
        assert rates.get("lora_embedding_A", 1e-6) == 1e-6 and rates["lora_B"] == 16e-3
    with pytest.raises(loraplus.InvalidRateError, match="lr_embedding"):
        loraplus.create_loraplus_optimizer(
            adapted(), torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0, loraplus_lr_embedding=-1.0
        )


def without(model, factor):
    for name, parameter in model.named_parameters():
        if factor in name:
            parameter.requires_grad_(False)
    return model


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B"])
@pytest.mark.filterwarnings("ignore:lr_ratio = 16 reaches")
def test_where_a_or_b_alone_trains_the_ratio_needs_lr_to_be_proved(frozen):
    model = without(adapted(modules_to_save=None), frozen)
    optimizer = torch.optim.AdamW(loraplus.param_groups(model, lr=1e-3, lr_ratio=16.0))
    with pytest.raises(loraplus.RateMismatchError, match=r"lr_ratio cannot be proved .* pass lr"):
        loraplus.verify(model, optimizer, lr_ratio=16.0)
    loraplus.verify(model, optimizer, lr_ratio=16.0, lr=1e-3)
    with pytest.raises(loraplus.RateMismatchError, match="expected"):
        loraplus.verify(model, optimizer, lr_ratio=16.0, lr=2e-3)


def test_with_a_frozen_what_else_learns_at_lr_proves_the_ratio_unless_it_has_a_rate_of_its_own():
    model = without(adapted(), "lora_A")
    optimizer = loraplus.create_optimizer(model, lr=1e-3, lr_ratio=16.0)
    loraplus.verify(model, optimizer, lr_ratio=16.0)
    with pytest.raises(loraplus.RateMismatchError, match="lora_B"):
        loraplus.verify(model, optimizer, lr_ratio=8.0)
    optimizer = loraplus.create_optimizer(model, lr=1e-3, lr_ratio=16.0, lr_head=1e-2)
    with pytest.raises(loraplus.RateMismatchError, match="pass lr"):
        loraplus.verify(model, optimizer, lr_ratio=16.0, lr_head=1e-2)
    loraplus.verify(model, optimizer, lr_ratio=16.0, lr=1e-3, lr_head=1e-2)


@pytest.mark.parametrize("own", [{}, {"lr_head": 1e-2}, {"lr_ratio": 1.0}])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_rate_in_a_tensor_gives_every_group_a_tensor_of_its_own(own, shape):
    model = adapted()
    lr = torch.full(shape, 1e-3, dtype=torch.float64)
    optimizer = loraplus.create_optimizer(model, torch.optim.AdamW, lr=lr, **own)
    rates = [group["lr"] for group in optimizer.param_groups]
    assert all(isinstance(rate, torch.Tensor) and rate.shape == shape and rate.dtype == lr.dtype for rate in rates)
    assert len({rate.data_ptr() for rate in (*rates, lr)}) == len(rates) + 1
    table = loraplus.verify(model, optimizer, own.get("lr_ratio", 16.0), lr=1e-3, lr_head=own.get("lr_head"))
    assert all(isinstance(entry.lr, float) for entry in table.entries)
    rates[0].mul_(2)  # as a scheduler or a user would in place
    assert optimizer.param_groups[1]["lr"] == pytest.approx(1e-3 * own.get("lr_ratio", 16.0))
    with pytest.raises(loraplus.RateMismatchError):
        loraplus.verify(model, optimizer, own.get("lr_ratio", 16.0), lr=1e-3, lr_head=own.get("lr_head"))


def test_a_rate_in_a_tensor_trains_as_the_number_does():
    models = [adapted(), adapted()]
    for model, lr in zip(models, (1e-3, torch.tensor(1e-3, dtype=torch.float64)), strict=True):
        optimizer = loraplus.create_optimizer(model, torch.optim.AdamW, lr=lr, lr_ratio=16.0)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        for step in range(3):
            ids = torch.arange(32).add(step).remainder(64).reshape(4, 8)
            model(input_ids=ids, labels=torch.tensor([0, 1, 0, 1])).loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        loraplus.verify(model, optimizer, 16.0, lr=1e-3)
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other)


def test_a_prefix_names_the_model_and_several_are_proved_apart_in_one_optimizer():
    models = {"unet": (adapted(), 16.0), "text_encoder": (adapted(), 4.0)}
    for prefixes in (tuple(models), ("", "")):
        groups = [
            group
            for prefix, (model, ratio) in zip(prefixes, models.values(), strict=True)
            for group in loraplus.param_groups(model, lr=1e-3, lr_ratio=ratio, weight_decay=0.1, prefix=prefix)
        ]
        if all(prefixes):
            names = [group["name"] for group in groups]
            assert names[:2] == ["unet.lora_A", "unet.lora_B"] and "text_encoder.head_no_decay" in names
            assert len(set(names)) == len(names)
        optimizer = torch.optim.AdamW(groups)
        for model, ratio in models.values():
            table = loraplus.verify(model, optimizer, lr_ratio=ratio, lr=1e-3)
            assert sum(row["tensors"] for row in table.groups()) == len(trainable_parameters(model))
            with pytest.raises(loraplus.RateMismatchError, match="lora_B"):
                loraplus.verify(model, optimizer, lr_ratio=ratio / 2)
    named = loraplus.create_optimizer(adapted(), lr=1e-3, prefix="unet")
    assert {group["name"] for group in named.param_groups} == {"unet.lora_A", "unet.lora_B", "unet.head"}


def test_weight_decay_goes_where_trainer_puts_it(tmp_path):
    from transformers import Trainer, TrainingArguments

    model = adapted(bias="all", use_dora=True, modules_to_save=["classifier", "LayerNorm"])
    args = TrainingArguments(output_dir=str(tmp_path), weight_decay=0.1, use_cpu=True, report_to=[])
    decays = set(Trainer(model=model, args=args).get_decay_parameter_names(model))
    for name, entry in zip(
        (n for n, p in model.named_parameters() if p.requires_grad), trainable_parameters(model), strict=True
    ):
        assert entry.decays == (name in decays), name
    groups = loraplus.param_groups(model, 1e-3, weight_decay=0.1)
    assert all(group["weight_decay"] == (0.0 if group["name"].endswith("_no_decay") else 0.1) for group in groups)


@pytest.mark.parametrize("optimizer_cls", [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD, torch.optim.NAdam])
def test_ratio_one_with_the_defaults_is_the_plain_optimizer_bit_for_bit(optimizer_cls):
    model = adapted(target_modules=["query", "word_embeddings"], bias="all")
    twin = copy.deepcopy(model)
    plain = optimizer_cls([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ours = loraplus.create_optimizer(twin, optimizer_cls, lr=1e-2, lr_ratio=1.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        ids = torch.randint(0, 64, (4, 8), generator=generator)
        for net, optimizer in ((model, plain), (twin, ours)):
            optimizer.zero_grad()
            net(input_ids=ids, labels=torch.tensor([0, 1, 0, 1])).loss.backward()
            optimizer.step()
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), "fast", None, True])
@pytest.mark.parametrize("argument", ["lr", "lr_ratio"])
def test_a_rate_that_cannot_be_used_is_refused_by_name(argument, value):
    with pytest.raises(loraplus.InvalidRateError, match=argument):
        loraplus.param_groups(adapted(), **{"lr": 1e-3, "lr_ratio": 2.0, argument: value})


@pytest.mark.parametrize(
    ("argument", "value"),
    [("weight_decay", value) for value in ("x", True, -1, float("nan"))]
    + [("lr_overrides", value) for value in ([1], 2)],
)
def test_a_decay_or_override_that_cannot_be_used_is_refused_by_name(argument, value):
    with pytest.raises(loraplus.InvalidRateError, match=argument):
        loraplus.param_groups(adapted(), lr=1e-3, **{argument: value})


def test_a_ratio_below_one_warns():
    with pytest.warns(loraplus.LoraPlusWarning, match="below 1"):
        loraplus.param_groups(adapted(), lr=1e-3, lr_ratio=0.5)


def test_explain_reads_any_optimizer_back_and_prints_a_table():
    model = adapted()
    optimizer = torch.optim.AdamW([p for n, p in model.named_parameters() if "lora_A" in n], lr=1e-4, weight_decay=0.2)
    table = loraplus.explain(model, optimizer)
    data = json.loads(json.dumps(table.to_dict()))
    a = [row for name, row in data["parameters"].items() if "lora_A" in name]
    assert all(row["lr"] == 1e-4 and row["weight_decay"] == 0.2 for row in a)
    assert {row["lr"] for name, row in data["parameters"].items() if "lora_B" in name} == {None}
    assert "lora_A" in str(table) and "(not optimized)" in str(table) and "0.0001" in str(table)
    assert sum(row["parameters"] for row in data["groups"]) == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )


def test_the_table_shows_base_rates_beside_those_of_the_moment():
    model = adapted()
    optimizer = loraplus.create_optimizer(model, lr=1e-3, lr_ratio=16.0)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)  # as at the end of a training
    for table in (loraplus.explain(model, optimizer), loraplus.verify(model, optimizer, lr_ratio=16.0)):
        header, _, *rows = str(table).splitlines()
        columns = dict(zip(*(re.split(r"  +", line.strip()) for line in (header, rows[1])), strict=True))
        assert columns["group"] == "lora_B" and columns["lr"] == "0" and columns["base lr"] == "0.016"


def test_verify_names_what_was_tampered_with():
    model = adapted()
    optimizer = loraplus.create_optimizer(model, lr=1e-3, lr_ratio=16.0)
    loraplus.verify(model, optimizer, lr_ratio=16.0, lr=1e-3)
    with pytest.raises(loraplus.RateMismatchError, match="lora_B"):
        loraplus.verify(model, optimizer, lr_ratio=8.0)
    with pytest.raises(loraplus.RateMismatchError, match="expected 0.002"):
        loraplus.verify(model, optimizer, lr_ratio=16.0, lr=2e-3)
    optimizer.param_groups[1]["lr"] *= 1.01
    with pytest.raises(loraplus.RateMismatchError, match="lora_B.default.weight"):
        loraplus.verify(model, optimizer, lr_ratio=16.0)


def test_verify_notices_a_parameter_that_is_not_optimized():
    model = adapted()
    optimizer = loraplus.create_optimizer(model, lr=1e-3, lr_ratio=16.0)
    left_out = optimizer.param_groups[0]["params"].pop()
    name = next(n for n, p in model.named_parameters() if p is left_out)
    with pytest.raises(loraplus.RateMismatchError, match=f"{name} is in no group"):
        loraplus.verify(model, optimizer, lr_ratio=16.0)


def test_verify_holds_in_warm_up_and_through_a_schedule_and_sees_through_it():
    model = adapted()
    optimizer = loraplus.create_optimizer(model, lr=1e-3, lr_ratio=16.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
    for _ in range(5):
        loraplus.verify(model, optimizer, lr_ratio=16.0, lr=1e-3)
        optimizer.step()
        scheduler.step()
    optimizer.param_groups[0]["lr"] *= 2
    with pytest.raises(loraplus.RateMismatchError, match="is at"):
        loraplus.verify(model, optimizer, lr_ratio=16.0)


def test_verify_refuses_pefts_optimizer_where_it_is_wrong():
    model = adapted(use_dora=True)
    theirs = peft_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0)
    with pytest.raises(loraplus.RateMismatchError, match="magnitude"):
        loraplus.verify(model, theirs, lr_ratio=16.0)


def test_pefts_signature_works_and_honours_weight_decay():
    model = adapted()
    optimizer = loraplus.create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0, betas=(0.9, 0.99), weight_decay=0.3
    )
    assert {g["weight_decay"] for g in optimizer.param_groups} == {0.3, 0.0}
    assert optimizer.defaults["betas"] == (0.9, 0.99)
    default = loraplus.create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0)
    assert {g["weight_decay"] for g in default.param_groups} == {0.0}
    with pytest.raises(loraplus.InvalidRateError, match="contradict"):
        loraplus.create_loraplus_optimizer(
            model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=2.0, weight_decay=0.1, loraplus_weight_decay=0.2
        )


@settings(max_examples=25, deadline=None)
@given(lr=st.floats(1e-7, 1.0), ratio=st.floats(1.0, 1e4), decay=st.one_of(st.none(), st.floats(0, 1)))
def test_any_usable_rates_survive_verify(lr, ratio, decay):
    model = adapted(bias="lora_only")
    optimizer = loraplus.create_optimizer(model, torch.optim.AdamW, lr=lr, lr_ratio=ratio, weight_decay=decay)
    loraplus.verify(model, optimizer, lr_ratio=ratio, lr=lr)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_rates_in_tensors_are_proved_at_the_precision_that_they_have(dtype):
    model = adapted()
    optimizer = loraplus.create_optimizer(model, lr=torch.tensor(3e-3, dtype=dtype), lr_ratio=6.7)
    loraplus.verify(model, optimizer, lr_ratio=6.7, lr=3e-3)
    loraplus.verify(model, optimizer, lr_ratio=6.7)
    with pytest.raises(loraplus.RateMismatchError):
        loraplus.verify(model, optimizer, lr_ratio=6.9, lr=3e-3)
    with pytest.raises(loraplus.RateMismatchError):
        loraplus.verify(model, optimizer, lr_ratio=6.7, lr=3.1e-3)
