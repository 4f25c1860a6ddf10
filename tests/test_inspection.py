"""What is measured is what PEFT would add to the weights; rates and roles are what the optimizer had."""

from __future__ import annotations

import json
import math
from collections import OrderedDict

import pytest
import torch
from conftest import tiny_bert
from integrations.test_transformers import Tokens, adapted, common
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import loraplus
from loraplus.errors import InputError, LoraPlusWarning
from loraplus.inspection import inspect_folder
from loraplus.inspection.adapter import Adapter, saved_name
from loraplus.inspection.update import update_size


def tiny_gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=32, n_embd=8, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0)
    )


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.plain, self.grouped, self.line = nn.Conv2d(4, 6, 3), nn.Conv2d(4, 6, 3, groups=2), nn.Conv1d(4, 6, 3)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.att = nn.MultiheadAttention(8, 2)


def filled(model, **options):
    """An adapted model, all of whose trainable numbers are random."""
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(**{"r": 3, "lora_alpha": 12, **options}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    return model


def saved(tmp_path, model, **options):
    """(folder, adapted model); the base weights are in tmp_path/base, which transformers' models record."""
    base = tmp_path / "base"
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(base)
        model = type(model).from_pretrained(base)
    else:
        base.mkdir()
        save_file(model.state_dict(), base / "model.safetensors")
    model = filled(model, **options)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", model


CASES = {
    "linear": (tiny_bert, {"target_modules": ["query", "dense"]}),
    "rslora": (tiny_bert, {"target_modules": ["query"], "use_rslora": True}),
    "dora": (tiny_bert, {"target_modules": ["query"], "use_dora": True}),
    "patterns": (
        tiny_bert,
        {
            "target_modules": ["query", "value"],
            "rank_pattern": {"layer.1.attention.self.query": 5, "value": 2},
            "alpha_pattern": {r".*\.0\..*value": 7},
        },
    ),
    "embedding": (tiny_bert, {"target_modules": ["word_embeddings", "query"]}),
    "conv1d": (tiny_gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "lora_bias": (tiny_bert, {"target_modules": ["query"], "lora_bias": True}),
    "convolutions": (Convolutions, {"target_modules": ["plain", "grouped", "line"], "r": 4}),
    "attention": (Attention, {"target_modules": ["att"]}),
}


@pytest.mark.parametrize("case", CASES)
def test_every_number_of_a_layer_is_that_of_the_matrix_that_peft_adds(tmp_path, case):
    build, options = CASES[case]
    folder, model = saved(tmp_path, build(), **options)
    found = inspect_folder(str(folder), str(tmp_path / "base"))
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight") and hasattr(module, "scaling")
    }
    assert {layer["name"] for layer in found["layers"]} == set(layers)
    for layer in found["layers"]:
        module = layers[layer["name"]]
        if case == "convolutions" and module.get_base_layer().groups > 1:
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            halves = [
                part_b.flatten(1) @ part_a.flatten(1) for part_a, part_b in zip(a.chunk(2), b.chunk(2), strict=True)
            ]
            delta = torch.cat(halves) * module.scaling["default"]
        else:
            delta = module.get_delta_weight("default")
            delta = delta.flatten(1) if delta.dim() > 2 else delta
        delta = delta.detach().double()
        values = torch.linalg.svdvals(delta)
        parts = values[values > 1e-6 * values[0]] / values[values > 1e-6 * values[0]].sum()
        is_embedding = layer["is_embedding"]
        a = (module.lora_embedding_A["default"] if is_embedding else module.lora_A["default"].weight).detach()
        b = (module.lora_embedding_B["default"] if is_embedding else module.lora_B["default"].weight).detach()
        base = module.get_base_layer()
        base = base.in_proj_weight if isinstance(base, nn.MultiheadAttention) else base.weight
        expected = {
            "rank": module.r["default"],
            "alpha": module.lora_alpha["default"],
            "scaling": module.scaling["default"],
            "rms_a": math.sqrt(float(a.square().mean())),
            "rms_b": math.sqrt(float(b.square().mean())),
            "update_norm": float(torch.linalg.matrix_norm(delta)),
            "update_spectral": float(values[0]),
            "effective_rank": math.exp(-float((parts * parts.log()).sum())),
            "base_norm": float(base.detach().norm()),
            "relative_update": float(torch.linalg.matrix_norm(delta) / base.detach().double().norm()),
        }
        assert {key: layer[key] for key in expected} == pytest.approx(expected, rel=1e-5)
        assert not layer["untrained"] and layer["finite"] and layer["dora"] == (case == "dora")


@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": ["classifier"]},
        {"bias": "all"},
        {"bias": "lora_only", "lora_bias": True},
        {"use_dora": True, "modules_to_save": ["word_embeddings", "classifier"]},
        {"trainable_token_indices": [1, 2]},
        {"target_modules": ["query", "word_embeddings"], "use_dora": True},
    ],
)
def test_roles_and_counts_told_from_names_are_those_of_the_model(tmp_path, options):
    folder, model = saved(tmp_path, tiny_bert(), **{"target_modules": ["query"], **options})
    adapter = Adapter(folder)
    expected = {saved_name(entry.name): entry.role for entry in loraplus.roles.trainable_parameters(model)}
    assert adapter.trained() == expected
    header = inspect_folder(str(folder))["adapter"]
    assert header["trained_parameters"] == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_a_layer_saved_in_full_is_a_head_though_it_is_called_like_a_factor(tmp_path):
    base = nn.ModuleDict({"q": nn.Linear(8, 8)})
    base["block"] = nn.Sequential(OrderedDict(lora_B=nn.Linear(8, 8)))
    folder, model = saved(tmp_path, base, target_modules=["q"], modules_to_save=["block"])
    adapter = Adapter(folder)
    assert adapter.trained() == {saved_name(e.name): e.role for e in loraplus.roles.trainable_parameters(model)}
    assert adapter.roles["base_model.model.block.lora_B.weight"] is loraplus.Role.HEAD
    assert [pair.name for pair in adapter.pairs] == ["q"]


def test_an_adapter_without_one_of_its_factors_is_not_whole(tmp_path):
    folder, _ = saved(tmp_path, tiny_bert(), target_modules=["query"])
    weights = load_file(folder / "adapter_model.safetensors")
    del weights[next(name for name in weights if "lora_A" in name)]
    save_file(weights, folder / "adapter_model.safetensors")
    with pytest.raises(InputError, match="has no lora_A for .*query; the adapter is not whole"):
        Adapter(folder)


def test_an_embedding_saved_without_being_trained_is_not_counted(tmp_path):
    folder = tmp_path / "adapter"
    model = filled(tiny_gpt2(), target_modules=["c_attn"], fan_in_fan_out=True)
    model.save_pretrained(folder, save_embedding_layers=True)
    header = inspect_folder(str(folder))["adapter"]
    assert header["trained_tensors"] == 4 and header["saved_untrained_tensors"] == 2


def test_a_fresh_adapter_is_untrained_whichever_factor_starts_at_zero(tmp_path):
    model = get_peft_model(tiny_bert(), LoraConfig(r=2, target_modules=["query", "word_embeddings"]))
    model.save_pretrained(tmp_path)
    layers = inspect_folder(str(tmp_path))["layers"]
    assert all(layer["untrained"] and layer["update_norm"] == layer["effective_rank"] == 0 for layer in layers)
    assert {layer["rms_a"] == 0 for layer in layers if layer["is_embedding"]} == {True}


def test_nan_in_a_factor_is_said(tmp_path):
    folder, model = saved(tmp_path, tiny_bert(), target_modules=["query"])
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_B" in name)[0, 0] = math.nan
    model.save_pretrained(folder)
    first, second = inspect_folder(str(folder))["layers"]
    assert not first["finite"] and first["update_norm"] is None and second["finite"]


def test_kasa_has_its_singular_values_between_the_factors():
    a, b, d = torch.randn(2, 5), torch.randn(7, 2), torch.tensor([2.0, -1.0])
    size = update_size(d[:, None] * a, b, 3.0)
    assert size.frobenius == pytest.approx(float((3 * b @ torch.diag(d) @ a).norm()), rel=1e-5)


def trained(folder, set_up=lambda trainer: None, steps=4, **options):
    args = TrainingArguments(**common(folder, max_steps=6, save_strategy="steps", save_steps=steps, **options))
    trainer = Trainer(adapted(target_modules=["query", "value"]), args=args, train_dataset=Tokens())
    set_up(trainer)
    trainer.train()
    return trainer, str(folder / f"checkpoint-{steps}")


def rows_of(path):
    return {(row["name"], row["role"]): row for row in inspect_folder(path)["groups"]}


def test_a_checkpoint_shows_each_groups_rate_now_and_its_base_rate(tmp_path):
    trainer, last = trained(tmp_path, lambda t: loraplus.attach(t, lr_ratio=16), steps=6, weight_decay=0.01)
    assert inspect_folder(last)["groups"] == loraplus.explain(trainer.model, trainer.optimizer).groups()
    rows = rows_of(last)
    assert rows["lora_B", "lora_B"]["base_lr"] == pytest.approx(16 * rows["lora_A", "lora_A"]["base_lr"])
    assert rows["head_no_decay", "head"]["weight_decay"] == 0
    facts = inspect_folder(last)["training"]
    assert (facts["step"], facts["max_steps"], facts["lr_ratio"], facts["auto"]) == (6, 6, 16, False)


def test_a_file_that_was_changed_since_it_was_written_is_named(tmp_path):
    trained(tmp_path, lambda t: loraplus.attach(t, lr_ratio=16))
    path = tmp_path / "checkpoint-4" / "optimizer.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    with pytest.warns(LoraPlusWarning, match="optimizer.pt was changed since it was written"):
        rows_of(path.parent)


def test_a_checkpoint_of_automatic_rates_shows_the_rates_in_use_and_what_each_layer_asked_for(tmp_path):
    trainer, last = trained(tmp_path, lambda t: loraplus.attach(t, lr="auto"), steps=6)
    assert inspect_folder(last)["groups"] == loraplus.explain(trainer.model, trainer.optimizer).groups()
    auto = trainer.loraplus_auto
    found = {layer["name"]: (layer["lr_a"], layer["lr_b"]) for layer in inspect_folder(last)["layers"]}
    asked = {name.removeprefix("base_model.model."): (r.lr_a, r.lr_b) for name, r in auto.layer_rates.items()}
    assert found == asked and len(found) == 4
    facts = inspect_folder(last)["training"]
    assert (facts["auto"], facts["lr"], facts["lr_ratio"]) == (True, auto.lr_a, auto.lr_b / auto.lr_a)


def test_a_plain_trainers_checkpoint_has_its_roles_told_from_names_and_shapes(tmp_path):
    _, path = trained(tmp_path, weight_decay=0.01)
    rows = rows_of(path)
    assert set(rows) == {("group 0", "lora_A"), ("group 0", "lora_B"), ("group 0", "head"), ("group 1", "head")}
    assert {row["base_lr"] for row in rows.values()} == {5e-3}
    assert all(row["lr"] == pytest.approx(4e-3) for row in rows.values())
    assert rows["group 0", "lora_A"]["tensors"] == 4 and rows["group 0", "lora_A"]["parameters"] == 4 * 4 * 16
    assert rows["group 1", "head"]["weight_decay"] == 0
    assert inspect_folder(path)["training"]["lr"] is None


def test_a_checkpoint_of_pefts_own_optimizer_shows_its_rates_by_role(tmp_path):
    def set_up(trainer):
        trainer.optimizer = create_loraplus_optimizer(trainer.model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8)

    _, path = trained(tmp_path, set_up)
    rows = rows_of(path)
    assert rows["group 0", "lora_A"]["base_lr"] == 1e-3 and rows["group 2", "lora_B"]["base_lr"] == 8e-3
    assert rows["group 3", "head"]["base_lr"] == 8e-3  # the bias, to which PEFT gives B's rate


def test_an_optimizer_without_states_still_shows_its_rates(tmp_path):
    _, plain = trained(tmp_path / "plain", optim="sgd")
    assert {(row["name"], row["role"], row["lr"]) for row in inspect_folder(plain)["groups"]} == {
        ("group 0", None, 4e-3),
        ("group 1", None, 4e-3),
    }  # fmt: skip
    trainer, named = trained(tmp_path / "named", lambda t: loraplus.attach(t, lr_ratio=2), steps=6, optim="sgd")
    expected = loraplus.explain(trainer.model, trainer.optimizer).groups()
    for row, other in zip(inspect_folder(named)["groups"], expected, strict=True):
        assert {**row, "parameters": None} == {**other, "parameters": None}


def test_without_an_optimizer_the_base_rates_are_those_written_down(tmp_path):
    trainer, _ = trained(
        tmp_path / "run", lambda t: loraplus.attach(t, lr_ratio=4, lr_head=1e-3, lr_overrides={"layer.0": 0.5})
    )
    trainer.save_model(str(tmp_path / "model"))
    found = inspect_folder(str(tmp_path / "model"))
    assert found["training"]["rates_from"] == "loraplus.json" and found["kind"] == "adapter"
    rates = {(row["role"], row["base_lr"]) for row in found["groups"]}
    assert rates == {
        ("lora_A", 5e-3), ("lora_A", 2.5e-3), ("lora_B", 2e-2), ("lora_B", 1e-2), ("head", 1e-3),
    }  # fmt: skip


def test_base_weights_are_found_without_the_heads_prefix(tmp_path):
    tiny_bert().bert.save_pretrained(tmp_path / "base")  # encoder.layer…, not bert.encoder.layer…
    filled(tiny_bert(), target_modules=["query"]).save_pretrained(tmp_path / "adapter")
    layers = inspect_folder(str(tmp_path / "adapter"), str(tmp_path / "base"))["layers"]
    weights = load_file(tmp_path / "base" / "model.safetensors")
    for layer in layers:
        weight = weights[layer["name"].removeprefix("bert.") + ".weight"]
        assert layer["base_norm"] == pytest.approx(float(weight.norm()), rel=1e-5)


def test_weights_in_several_files_are_found(tmp_path):
    folder, _ = saved(tmp_path, tiny_bert(), target_modules=["query"])
    whole = inspect_folder(str(folder))
    model = tiny_bert()
    for path in (tmp_path / "base").iterdir():
        path.unlink()
    model.save_pretrained(tmp_path / "base", max_shard_size="5KB")
    assert not (tmp_path / "base" / "model.safetensors").exists()
    assert inspect_folder(str(folder))["layers"] == whole["layers"] and whole["layers"][0]["base_norm"]


def test_a_recorded_base_model_that_is_gone_or_another_is_a_note_not_an_error(tmp_path):
    folder, _ = saved(tmp_path, tiny_bert(), target_modules=["query"])
    tiny_gpt2().save_pretrained(tmp_path / "base")
    found = inspect_folder(str(folder))
    assert "does not fit" in found["base"]["note"] and found["layers"][0]["relative_update"] is None
    (tmp_path / "base").rename(tmp_path / "moved")
    assert inspect_folder(str(folder))["base"]["note"] == "not on this machine"


def test_older_adapters_in_pickles_are_read(tmp_path):
    folder, _ = saved(tmp_path, tiny_bert(), target_modules=["query"])
    expected = inspect_folder(str(folder))
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    assert inspect_folder(str(folder)) == expected


def test_a_model_without_an_adapter_shows_what_could_be_adapted(tmp_path):
    tiny_bert().save_pretrained(tmp_path / "bert")
    tiny_gpt2().save_pretrained(tmp_path / "gpt2")
    found = inspect_folder(str(tmp_path / "bert"))
    rows = {(row["name"], row["inputs"], row["outputs"]): row for row in found["layers"]}
    assert found["kind"] == "model" and found["model_type"] == "bert"
    assert rows["query", 16, 16]["count"] == 2 and rows["query", 16, 16]["default"]
    assert rows["dense", 16, 32]["count"] == 2 and not rows["dense", 16, 32]["default"]
    gpt2 = {(row["name"], row["inputs"], row["outputs"]) for row in inspect_folder(str(tmp_path / "gpt2"))["layers"]}
    assert ("c_attn", 8, 24) in gpt2


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"peft_type": "IA3"}, "peft_type is IA3"),
        ({"r": 4}, "has rank 3, but adapter_config.json says 4"),
        ({"r": "three"}, "r must be a number"),
        ({"rank_pattern": {"(": 2}}, "no regular expression"),
        ({"rank_pattern": [2]}, "rank_pattern must map"),
        ({"lora_alpha": None}, "lora_alpha must be a number"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(tmp_path, change, expected):
    folder, _ = saved(tmp_path, tiny_bert(), target_modules=["query"])
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(InputError, match=expected):
        inspect_folder(str(folder))
