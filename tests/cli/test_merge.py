"""`loraplus merge` from the outside: what it says, what it leaves, what it refuses."""

from __future__ import annotations

import csv
import json

import pytest
import torch
from tasks.causal import adapter_on, save_llama
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from loraplus.tasks import merge as merging
from loraplus.tasks.predict import load_adapter


def test_a_merged_classifier_labels_as_the_adapter_does(model_folder, reviews_csv, tmp_path, loraplus_command):
    trained = tmp_path / "trained"
    done = loraplus_command(
        "train", "--model", model_folder, "--data", reviews_csv, "--output", trained, "--max-steps", 10,
        "--batch-size", 16, "--plain",
    )  # fmt: skip
    assert done.code == 0, done.err
    done = loraplus_command("merge", "--adapter", trained, "--output", tmp_path / "merged", "--json")
    record = json.loads(done.out)
    assert (done.code, record["task"], record["dtype"]) == (0, "SEQ_CLS", "float32")
    assert record["relative_difference"] <= record["tolerance"]
    adapted, _ = load_adapter(str(trained))
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    texts = [row["text"] for row in csv.DictReader(reviews_csv.open())][:20]
    batch = AutoTokenizer.from_pretrained(tmp_path / "merged")(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        assert torch.allclose(merged.eval()(**batch).logits, adapted(**batch).logits, atol=1e-5)
    assert merged.config.id2label == {0: "negative", 1: "positive"}


def test_it_says_how_far_the_logits_are_off(adapter, tmp_path, loraplus_command):
    done = loraplus_command("merge", "--adapter", adapter, "--output", tmp_path / "m", "--dtype", "bfloat16", "--plain")
    assert done.code == 0
    assert "parameters in bfloat16; read back, its logits differ from base and adapter by" in done.out
    assert f"(allowed: 0.05)\nmodel: {tmp_path / 'm'}\nnext, " in done.out
    assert done.out.endswith(f"\nloraplus generate --model {tmp_path / 'm'} --prompt Hello\n")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adapter": "none"}, "there is no adapter folder"),
        ({"adapter": "empty"}, "it has no adapter_config.json"),
        ({"model": "./none"}, "there is no model folder ./none; name the base model"),
        ({"model": "other"}, "size mismatch"),
        ({"model": "empty"}, "has no config.json"),
        ({"dtype": "int8"}, "--dtype must be one of float32, float16, bfloat16"),
        ({"output": "empty/file"}, "is a file; name a folder"),
        ({"output": "full"}, "is not empty: --overwrite replaces an earlier merge"),
        ({"output": "empty/file/deeper"}, "cannot write to"),
    ],
)
def test_what_cannot_be_merged_is_one_line(adapter, tmp_path, refused, change, message, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "file").write_text("kept")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("kept")
    if change.get("model") == "other":
        save_llama(tmp_path / "other", hidden=24)
    monkeypatch.chdir(tmp_path)
    options = {"adapter": adapter, "output": "merged", **change}
    line = refused("merge", *(part for name, value in options.items() for part in (f"--{name}", value)))
    assert message in line
    assert not (tmp_path / "merged").exists()
    assert {path.name for path in tmp_path.iterdir()} <= {"empty", "full", "other"}
    assert (tmp_path / "full" / "file").read_text() == "kept"


def test_a_damaged_adapter_is_one_line(adapter, tmp_path, refused):
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    assert "it has no adapter_model.safetensors" in refused("merge", "--adapter", damaged, "--output", tmp_path / "m")
    (damaged / "adapter_model.safetensors").write_bytes((adapter / "adapter_model.safetensors").read_bytes()[:100])
    assert "cannot put" in refused("merge", "--adapter", damaged, "--output", tmp_path / "m")
    (damaged / "adapter_config.json").write_bytes(b"\xff{")
    assert "is not valid JSON" in refused("merge", "--adapter", damaged, "--output", tmp_path / "m")


def test_a_base_that_is_gone_is_named_with_what_to_do(tmp_path, refused):
    base = save_llama(tmp_path / "base")
    adapter = adapter_on(base, tmp_path / "adapter", target_modules=["q_proj"])
    base.rename(tmp_path / "moved")
    assert "with --model" in refused("merge", "--adapter", adapter, "--output", tmp_path / "m")


def test_a_merge_that_is_off_is_refused_with_the_figure(adapter, tmp_path, refused, monkeypatch):
    monkeypatch.setitem(merging.TOLERANCES, "float16", 0.0)
    line = refused("merge", "--adapter", adapter, "--output", tmp_path / "m", "--dtype", "float16")
    assert "logits are off by 0.0" in line
    assert not list(tmp_path.iterdir())
