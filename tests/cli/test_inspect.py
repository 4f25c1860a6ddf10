"""`loraplus inspect` from the outside: what it prints, what it refuses, and that it changes nothing."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import loraplus.cli.inspect


def train(model_folder, reviews_csv, output, *more):
    command = [
        "train", "--model", model_folder, "--data", reviews_csv, "--output", output, "--max-steps", 8,
        "--eval-steps", 4, "--batch-size", 16, "--rank", 4, *more,
    ]  # fmt: skip
    done = subprocess.run([sys.executable, "-m", "loraplus", *map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return output


@pytest.fixture(scope="module")
def fixed(tmp_path_factory, model_folder, reviews_csv):
    return train(model_folder, reviews_csv, tmp_path_factory.mktemp("fixed") / "out", "--lr", "5e-3")


@pytest.fixture(scope="module")
def automatic(tmp_path_factory, model_folder, reviews_csv):
    return train(model_folder, reviews_csv, tmp_path_factory.mktemp("auto") / "out", "--lr", "auto")


@pytest.fixture
def adapter(fixed, tmp_path):
    """A copy of an adapter that a test may break."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(fixed / name, folder)
    return folder


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_output_of_train_is_shown_with_its_rates_and_layers(fixed, model_folder, loraplus_command):
    before = snapshot(fixed), snapshot(model_folder)
    outcome = loraplus_command("inspect", fixed)
    assert outcome.code == 0 and not outcome.err
    for text in (
        "training output, step 8", "rank 4 · alpha 16 · scaling 4 (α/r)", "targets: query, value", "(weights read)",
        "rates: η_A 0.005 · η_B 0.08 (λ = 16)", "layers of bert.encoder.layer:", "1.attention.self.value",
    ):  # fmt: skip
        assert text in outcome.out
    assert "\x1b" not in outcome.out
    assert (snapshot(fixed), snapshot(model_folder)) == before


def test_json_holds_everything_and_is_strict(fixed, loraplus_command):
    def refuse(constant):
        raise AssertionError(constant)

    outcome = loraplus_command("inspect", fixed, "--json")
    found = json.loads(outcome.out, parse_constant=refuse)
    metrics = json.loads((fixed / "metrics.json").read_text())
    assert found["groups"] == metrics["groups"] and found["training"]["eval_loss"] == metrics["eval_loss"]
    assert found["kind"] == "training output" and found["base"]["folder"]
    assert len(found["layers"]) == 4 and all(0 < layer["relative_update"] < 10 for layer in found["layers"])


def test_nan_is_null_in_json(adapter, loraplus_command):
    path = adapter / "adapter_model.safetensors"
    weights = load_file(path)
    save_file({name: torch.full_like(value, torch.nan) for name, value in weights.items()}, path)
    layer = json.loads(loraplus_command("inspect", adapter, "--json").out)["layers"][0]
    assert layer["rms_a"] is None and not layer["finite"]
    assert "NaN or infinity in 4 of 4 layers" in loraplus_command("inspect", adapter).out


def test_automatic_rates_show_the_pair_and_what_each_layer_asked_for(automatic, loraplus_command):
    saved = json.loads((automatic / "loraplus.json").read_text())["auto"]
    outcome = loraplus_command("inspect", automatic)
    assert "automatic, as last measured" in outcome.out and "lr_A" in outcome.out and "lr_B" in outcome.out
    found = json.loads(loraplus_command("inspect", automatic, "--json").out)
    assert found["training"]["lr"] == saved["lr_a"]
    assert {f"base_model.model.{layer['name']}": {"lora_A": layer["lr_a"], "lora_B": layer["lr_b"]}
            for layer in found["layers"]} == saved["layers"]  # fmt: skip


def test_a_checkpoint_is_shown_with_the_rates_of_its_step(fixed, automatic, loraplus_command):
    for run in (fixed, automatic):
        found = json.loads(loraplus_command("inspect", run / "checkpoint-4", "--json").out)
        assert found["kind"] == "checkpoint" and found["training"]["step"] == 4
        assert found["training"]["rates_from"] == "optimizer.pt"
        groups = {row["name"]: row for row in found["groups"]}
        parts = {groups[name]["lr"] / groups[name]["base_lr"] for name in ("lora_A", "lora_B", "head")}
        assert max(parts) == pytest.approx(min(parts)) and 0 < min(parts) < 1


def test_a_bare_adapter_without_rates_or_base_weights(adapter, loraplus_command):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "/nowhere/model"}))
    outcome = loraplus_command("inspect", adapter)
    assert outcome.code == 0
    assert "/nowhere/model (not on this machine)" in outcome.out and "rates: not known" in outcome.out


def test_base_weights_may_be_named(adapter, model_folder, loraplus_command):
    found = json.loads(loraplus_command("inspect", adapter, "--model", model_folder, "--json").out)
    assert found["base"]["folder"] == str(model_folder) and found["layers"][0]["base_norm"] > 0


def test_zero_b_is_called_untrained(adapter, loraplus_command):
    path = adapter / "adapter_model.safetensors"
    save_file({n: value * 0 if "lora_B" in n else value for n, value in load_file(path).items()}, path)
    assert "B is zero in 4 of 4 layers: untrained" in loraplus_command("inspect", adapter).out


def test_a_model_folder_lists_its_layers_and_says_that_there_is_no_adapter(model_folder, loraplus_command):
    outcome = loraplus_command("inspect", model_folder)
    assert outcome.code == 0 and "There is no adapter in it." in outcome.out and "query" in outcome.out
    found = json.loads(loraplus_command("inspect", model_folder, "--json").out)
    assert found["kind"] == "model" and len(found["layers"]) == 6


@pytest.mark.parametrize("plain", [False, True])
def test_a_terminal_of_80_columns_is_not_overrun_and_plain_has_no_colour(
    automatic, adapter, monkeypatch, loraplus_command, plain
):
    class Terminal(loraplus.cli.inspect.Console):
        def __init__(self, **options):
            super().__init__(force_terminal=True, width=80, **options)

    monkeypatch.setattr(loraplus.cli.inspect, "Console", Terminal)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    path = adapter / "adapter_model.safetensors"
    save_file({n: value * 0 if "lora_B" in n else value for n, value in load_file(path).items()}, path)
    outcome = loraplus_command("inspect", adapter, *(["--plain"] if plain else []))
    assert ("\x1b[33m" in outcome.out) is not plain
    out = re.sub(r"\x1b\[[0-9;]*m", "", loraplus_command("inspect", automatic).out)
    tables = out.split("\n\n", 1)[1]  # above them are paths, which are never broken
    assert max(map(len, tables.splitlines())) <= 80 and "1.attention.self.value" in tables


# One test per bad input: one line, exit code 2.


def test_a_path_that_does_not_exist(refused, tmp_path):
    assert "there is no folder" in refused("inspect", tmp_path / "nowhere")
    assert "no-such-org/no-such-adapter" in refused("inspect", "no-such-org/no-such-adapter")


def test_a_file_instead_of_a_folder(refused, adapter):
    assert "is a file" in refused("inspect", adapter / "adapter_config.json")


def test_a_folder_that_is_none_of_these(refused, tmp_path, adapter):
    (tmp_path / "empty").mkdir()
    assert "neither an adapter" in refused("inspect", tmp_path / "empty")
    assert "the folders adapter in it do" in refused("inspect", tmp_path)


@pytest.mark.parametrize(
    ("content", "expected"), [("{", "not valid JSON"), ("[]", "no configuration of a PEFT adapter")]
)
def test_a_broken_adapter_configuration(refused, adapter, content, expected):
    (adapter / "adapter_config.json").write_text(content)
    line = refused("inspect", adapter)
    assert expected in line and "adapter_config.json" in line


@pytest.mark.parametrize("keep", [0, 4, 100, -10])
def test_broken_or_truncated_safetensors(refused, adapter, keep):
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert "damaged or cut off" in refused("inspect", adapter)


def test_an_adapter_without_weights(refused, adapter):
    (adapter / "adapter_model.safetensors").unlink()
    assert "no weights" in refused("inspect", adapter)


def test_unknown_keys_are_named(refused, adapter):
    path = adapter / "adapter_model.safetensors"
    save_file({**load_file(path), "base_model.model.q.lora_E": torch.zeros(2), "stray": torch.zeros(1)}, path)
    line = refused("inspect", adapter)
    assert "base_model.model.q.lora_E" in line and "stray" in line and "query" not in line


def test_factors_that_are_sharded_away(refused, adapter):
    path = adapter / "adapter_model.safetensors"
    save_file({n: v.flatten() if "lora_A" in n else v for n, v in load_file(path).items()}, path)
    assert "flattened or sharded away" in refused("inspect", adapter)


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"model_type": "nobody-knows"}', '{"model_type": "bert", "hidden_size": "x"}']
)
def test_a_model_whose_configuration_is_damaged(refused, tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    assert str(tmp_path) in refused("inspect", tmp_path)


def test_half_a_pair_of_factors(refused, adapter):
    path = adapter / "adapter_model.safetensors"
    weights = load_file(path)
    weights.pop(next(name for name in weights if "1.attention.self.query.lora_B" in name))
    save_file(weights, path)
    assert "has no lora_B for bert.encoder.layer.1.attention.self.query" in refused("inspect", adapter)


@pytest.mark.parametrize(("change", "expected"), [("narrower", "is 8×8, the factors of"), ("fewer", "no weight of")])
def test_a_base_model_that_does_not_fit(refused, adapter, model_folder, tmp_path, change, expected):
    other = tmp_path / "other"
    shutil.copytree(model_folder, other)
    weights = load_file(other / "model.safetensors")
    if change == "narrower":
        weights = {n: v[:8, :8].clone() if v.dim() == 2 else v[:8].clone() for n, v in weights.items()}
    else:
        weights = {n: v for n, v in weights.items() if "layer.1." not in n}
    save_file(weights, other / "model.safetensors")
    line = refused("inspect", adapter, "--model", other)
    assert "--model" in line and "does not fit this adapter" in line and expected in line


def test_a_base_model_that_is_not_there_or_not_needed(refused, adapter, model_folder, tmp_path):
    assert "--model: there is no folder" in refused("inspect", adapter, "--model", tmp_path / "nowhere")
    assert "no model.safetensors" in refused("inspect", adapter, "--model", tmp_path)
    assert "model without an adapter" in refused("inspect", model_folder, "--model", model_folder)


@pytest.mark.parametrize("name", ["optimizer.pt", "loraplus.json", "trainer_state.json"])
@pytest.mark.parametrize("content", ["cut off", "of another kind"])
def test_a_damaged_checkpoint(refused, fixed, tmp_path, name, content):
    folder = tmp_path / "checkpoint"
    shutil.copytree(fixed / "checkpoint-4", folder)
    path = folder / name
    if content == "cut off":
        path.write_bytes(path.read_bytes()[:50])
    elif path.suffix == ".pt":
        torch.save([1], path)
    else:
        path.write_text("[1]")
    assert name in refused("inspect", folder)


@pytest.mark.parametrize("value", ["x", None, [1], float("inf")])
def test_metrics_whose_groups_are_damaged(refused, fixed, adapter, value):
    metrics = json.loads((fixed / "metrics.json").read_text())
    metrics["groups"][0]["tensors"] = value
    (adapter / "metrics.json").write_text(json.dumps(metrics))
    assert "metrics.json does not hold the groups" in refused("inspect", adapter)


def test_nothing_in_a_checkpoint_is_executed(refused, fixed, tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    folder = tmp_path / "checkpoint"
    shutil.copytree(fixed / "checkpoint-4", folder)
    torch.save({"param_groups": Trap(), "state": {}}, folder / "optimizer.pt")
    assert "optimizer.pt" in refused("inspect", folder)
    assert not (tmp_path / "sprung").exists()
