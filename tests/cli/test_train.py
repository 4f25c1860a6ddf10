"""`loraplus train` and `loraplus predict` from the outside: what is written, what resumes, what is refused."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer


def flags(model_folder, data, output, *more):
    return [
        "train", "--model", model_folder, "--data", data, "--output", output, "--max-steps", 20, "--batch-size", 16,
        "--lr", "5e-3", "--rank", 4, "--eval-steps", 5, *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory, model_folder, reviews_csv):
    output = tmp_path_factory.mktemp("run") / "adapter"
    command = [sys.executable, "-m", "loraplus", *map(str, flags(model_folder, reviews_csv, output, "--json"))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return output, json.loads(done.stdout)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_train_writes_adapter_metrics_curves_and_the_resolved_config(trained):
    output, metrics = trained
    assert json.loads((output / "metrics.json").read_text()) == metrics
    assert metrics["steps"] == 20 and metrics["lr"] == 5e-3 and metrics["lr_ratio"] == 16
    assert metrics["eval_loss"] > 0 and 0 <= metrics["eval_accuracy"] <= 1 and metrics["train_seconds"] > 0
    rows = list(csv.DictReader((output / "curves.csv").open()))
    assert [row["step"] for row in rows if row["eval_loss"]] == ["5", "10", "15", "20"]
    assert min(float(row["eval_loss"]) for row in rows if row["eval_loss"]) == pytest.approx(metrics["eval_loss"])
    rated = [row for row in rows if row["lr/lora_A"] and float(row["lr/lora_A"])]
    assert all(float(row["lr/lora_B"]) == pytest.approx(16 * float(row["lr/lora_A"])) for row in rated)
    config = yaml.safe_load((output / "config.yaml").read_text())
    assert config["lr"] == 5e-3 and config["lora_dropout"] == 0.0 and config["rank"] == 4
    assert load_file(output / "adapter_model.safetensors")
    assert not list(output.rglob("*.tmp"))


def test_the_adapter_reloads_with_peft_alone_to_the_same_predictions(trained, model_folder, reviews_csv):
    output, metrics = trained
    labels = AutoConfig.from_pretrained(output).id2label
    assert labels == {0: "negative", 1: "positive"}
    torch.manual_seed(123)  # the head must come from the adapter's files, not from a lucky initialisation
    base = AutoModelForSequenceClassification.from_pretrained(model_folder, num_labels=2)
    model = PeftModel.from_pretrained(base, output).eval()
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer.model_max_length == metrics["data"]["max_length"]
    rows = list(csv.DictReader(reviews_csv.open()))[:50]
    with torch.no_grad():
        batch = tokenizer([row["text"] for row in rows], truncation=True, padding=True, return_tensors="pt")
        logits = model(**batch).logits

    predicted = output.parent / "predicted.csv"
    command = ["predict", "--adapter", output, "--data", reviews_csv, "--output", predicted, "--overwrite"]
    done = subprocess.run([sys.executable, "-m", "loraplus", *map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours = list(csv.DictReader(predicted.open()))
    assert len(ours) == 400 and ours[0].keys() == {"text", "label", "prediction", "probability"}
    assert [row["prediction"] for row in ours[:50]] == [labels[int(i)] for i in logits.argmax(-1)]
    np.testing.assert_allclose(
        [float(row["probability"]) for row in ours[:50]], logits.softmax(-1).max(-1).values, atol=2e-5
    )


def test_it_learns(trained, tmp_path, model_folder, reviews_csv, loraplus_command):
    output = tmp_path / "longer"
    arguments = flags(model_folder, reviews_csv, output, "--max-steps", 150, "--eval-steps", 50)
    outcome = loraplus_command(*arguments, "--lr-ratio", 4, "--json", "--target-modules", "all-linear")
    metrics = json.loads(outcome.out)
    assert metrics["eval_accuracy"] > 0.85
    assert {group["name"] for group in metrics["groups"]} >= {"lora_A", "lora_B", "head"}


def test_a_killed_run_resumes_to_the_same_adapter(trained, tmp_path, model_folder, reviews_csv, loraplus_command):
    whole, metrics = trained
    output = tmp_path / "resumed"
    shutil.copytree(whole, output)
    for name in ("metrics.json", "adapter_model.safetensors", "curves.csv"):
        (output / name).unlink()
    checkpoints = sorted(output.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    shutil.rmtree(checkpoints[-1])
    config = yaml.safe_load((output / "config.yaml").read_text())
    assert int(checkpoints[-2].name.split("-")[1]) < 20 and config["max_steps"] == 20
    outcome = loraplus_command(*flags(model_folder, reviews_csv, output, "--resume", "--json"))
    assert outcome.code == 0, outcome.err
    resumed = json.loads(outcome.out)
    assert resumed["steps"] == 20 and resumed["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-6)
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (whole, output))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_resuming_a_finished_run_changes_nothing(trained, model_folder, reviews_csv, loraplus_command):
    output, metrics = trained
    before = snapshot(output)
    outcome = loraplus_command(*flags(model_folder, reviews_csv, output, "--resume", "--json"))
    assert outcome.code == 0 and json.loads(outcome.out) == metrics
    assert snapshot(output) == before


def test_interrupting_saves_a_checkpoint_and_exits_cleanly(tmp_path, model_folder, reviews_csv, loraplus_command):
    output = tmp_path / "interrupted"
    arguments = flags(model_folder, reviews_csv, output, "--max-steps", 100000, "--eval-steps", 20, "--plain")
    process = subprocess.Popen(
        [sys.executable, "-m", "loraplus", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(output.glob("checkpoint-*")) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "--resume" in err and "Traceback" not in err
    step = int(err.split("interrupted after step ")[1].split()[0])
    assert (output / f"checkpoint-{step}" / "optimizer.pt").is_file()
    assert not (output / "metrics.json").exists()
    page = (output / "report.html").read_text()  # what `watch` shows of a run under way
    assert " of 100,000</h1>" in page and 'http-equiv="refresh"' in page
    arguments = flags(model_folder, reviews_csv, output, "--max-steps", 2, "--eval-steps", 2, "--overwrite")
    assert loraplus_command(*arguments).code == 0 and "refresh" not in (output / "report.html").read_text()


def test_a_config_file_sets_flags_and_a_flag_wins(tmp_path, model_folder, reviews_csv, loraplus_command):
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {model_folder}\ndata: {reviews_csv}\nmax-steps: 3\nlr: 1.0e-3\nlr_ratio: 4\nbatch_size: 8\n"
    )
    outcome = loraplus_command("train", "--config", config, "--output", tmp_path / "out", "--lr", "2e-3", "--json")
    metrics = json.loads(outcome.out)
    assert (metrics["lr"], metrics["lr_ratio"], metrics["steps"]) == (2e-3, 4.0, 3)


# One test per bad input: one line, exit code 2, nothing of the user's touched.


def test_missing_file(refused, tmp_path, model_folder):
    assert "nowhere.csv" in refused(*flags(model_folder, tmp_path / "nowhere.csv", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "empty"),
        (b"text,label\n", "no rows"),
        (b"text,label\ngood film,a\nbad film,a\n", "one class"),
        (b"text,label\ngood film,a\nbad, film,b\n", "line 3"),
        (b"text,label\ngood film \xc3\xa9,a\nb\xe9d film,b\n", "UTF-8"),
        (b"text,label\ngood film,a\nbad film,\nfine film,b\n", "label"),
        (b"words,kind\ngood film,a\nbad film,b\n", "no column 'text'"),
    ],
)
def test_bad_file(refused, tmp_path, model_folder, content, expected):
    path = tmp_path / "data.csv"
    path.write_bytes(content)
    line = refused(*flags(model_folder, path, tmp_path / "out", "--text-column", "text"))
    assert expected in line and "data.csv" in line
    assert not (tmp_path / "out").exists()


def test_unknown_model_path(refused, tmp_path, reviews_csv):
    assert "./nowhere" in refused(*flags("./nowhere", reviews_csv, tmp_path / "out"))


def test_unknown_hub_model(refused, tmp_path, reviews_csv):
    assert "no-such-org/no-such-model" in refused(*flags("no-such-org/no-such-model", reviews_csv, tmp_path / "out"))


def test_model_folder_without_weights(refused, tmp_path, reviews_csv, model_folder):
    empty = tmp_path / "model"
    shutil.copytree(model_folder, empty)
    (empty / "model.safetensors").unlink()
    assert "no weights" in refused(*flags(empty, reviews_csv, tmp_path / "out"))


@pytest.mark.parametrize("rate", ["nan", "0", "-1e-3", "inf"])
@pytest.mark.parametrize("flag", ["--lr", "--lr-ratio", "--lr-head"])
def test_unusable_rates(refused, tmp_path, model_folder, reviews_csv, flag, rate):
    line = refused(*flags(model_folder, reviews_csv, tmp_path / "out", flag, rate))
    assert flag[2:].replace("-", "_") in line
    assert not (tmp_path / "out").exists()


def test_unknown_target_modules_lists_those_that_exist(refused, tmp_path, model_folder, reviews_csv):
    line = refused(*flags(model_folder, reviews_csv, tmp_path / "out", "--target-modules", "query,q_proj"))
    assert "'q_proj'" in line and "query" in line and "dense" in line


@pytest.mark.parametrize("length", [-1, 0, 1, 1000])
def test_a_length_that_the_model_does_not_take(refused, tmp_path, model_folder, reviews_csv, length):
    assert "32 tokens" in refused(*flags(model_folder, reviews_csv, tmp_path / "out", "--max-length", length))


def test_unknown_config_key_names_the_nearest(refused, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("lr_ration: 16\n")
    line = refused("train", "--config", config)
    assert "'lr_ration'" in line and "'lr_ratio'" in line


def test_config_value_of_the_wrong_type(refused, tmp_path, model_folder, reviews_csv):
    config = tmp_path / "run.yaml"
    config.write_text("max_steps: many\n")
    assert "--max-steps" in refused(*flags(model_folder, reviews_csv, tmp_path / "out")[:7], "--config", config)


def test_missing_flags(refused):
    assert "--model" in refused("train")


def test_unknown_flag(refused):
    assert "--learning" in refused("train", "--learning", "1")


def test_output_that_is_not_empty_is_left_untouched(refused, trained, model_folder, reviews_csv):
    output, _ = trained
    before = snapshot(output)
    assert "--overwrite" in refused(*flags(model_folder, reviews_csv, output))
    assert snapshot(output) == before


def test_overwriting_with_bad_data_leaves_the_earlier_run(refused, trained, tmp_path, model_folder):
    output, _ = trained
    before = snapshot(output)
    refused(*flags(model_folder, tmp_path / "nowhere.csv", output, "--overwrite"))
    assert snapshot(output) == before


UNUSABLE = [
    (["--weight-decay", "-1"], "--weight-decay"),
    (["--weight-decay", "nan"], "--weight-decay"),
    (["--alpha", "inf"], "--alpha"),
    (["--lr-scheduler-type", "cosine_with_min_lr"], "--lr-scheduler-type cosine_with_min_lr"),
    (["--lr-scheduler-type", "warmup_stable_decay"], "--lr-scheduler-type warmup_stable_decay"),
    (["--lr-scheduler-type", "nope"], "nope"),
    (["--seed", 2**32], "--seed"),
]


@pytest.mark.parametrize(("more", "expected"), UNUSABLE)
def test_overwriting_with_unusable_settings_keeps_what_is_there(
    refused, trained, tmp_path, model_folder, reviews_csv, more, expected
):
    output, _ = trained
    before = snapshot(output)
    assert expected in refused(*flags(model_folder, reviews_csv, output, "--overwrite", *more))
    assert snapshot(output) == before
    refused(*flags(model_folder, reviews_csv, tmp_path / "new", *more))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("edit", ["a row less", "another word"])
def test_resuming_on_other_data_is_refused(refused, trained, tmp_path, model_folder, reviews_csv, edit):
    whole, _ = trained
    output, data = tmp_path / "resumed", tmp_path / "reviews.csv"
    shutil.copytree(whole, output)
    (output / "metrics.json").unlink()
    for name in ("config.yaml", "data_facts.json"):
        (output / name).write_text((output / name).read_text().replace(str(reviews_csv), str(data)))
    text = reviews_csv.read_text()
    data.write_text(text[: text.rindex("\n", 0, -1) + 1] if edit == "a row less" else text.replace("film", "plot", 1))
    line = refused(*flags(model_folder, data, output, "--resume"))
    assert "the data has changed since this run was started" in line and "sha256 was" in line


def test_resuming_from_a_damaged_checkpoint_is_refused(refused, trained, tmp_path, model_folder, reviews_csv):
    output = tmp_path / "resumed"
    shutil.copytree(trained[0], output)
    (output / "metrics.json").unlink()
    for path in output.glob("checkpoint-*/loraplus.json"):
        path.write_text("{")
    assert "loraplus.json was changed" in refused(*flags(model_folder, reviews_csv, output, "--resume"))


def test_resuming_with_other_settings_is_refused(refused, trained, model_folder, reviews_csv):
    output, _ = trained
    line = refused(*flags(model_folder, reviews_csv, output, "--resume", "--lr-ratio", 2))
    assert "lr_ratio" in line and "16" in line and "2" in line


def test_output_folder_that_cannot_be_made(refused, tmp_path, model_folder, reviews_csv):
    blocked = tmp_path / "file"
    blocked.write_text("mine")
    refused(*flags(model_folder, reviews_csv, blocked / "out"))
    assert blocked.read_text() == "mine"


def test_a_diverging_run_stops_keeps_the_last_good_checkpoint_and_says_at_which_rates(
    refused, tmp_path, model_folder, reviews_csv
):
    output = tmp_path / "out"
    arguments = flags(model_folder, reviews_csv, output, "--lr", "1e25", "--lr-ratio", "1e12", "--warmup-ratio", 0.9)
    line = refused(*arguments, "--lr-head", "1e-3", "--plain", "--json")
    assert "1e+25" in line and "1e+37" in line and "--lr" in line
    assert "the gradient of base_model" in line and "other rates are another run, begun with --overwrite" in line
    assert not (output / "metrics.json").exists() and not (output / "adapter_model.safetensors").exists()
    for checkpoint in output.glob("checkpoint-*"):
        weights = load_file(checkpoint / "adapter_model.safetensors")
        assert all(value.isfinite().all() for value in weights.values())


def test_predict_refuses_what_is_no_adapter(refused, tmp_path, reviews_csv):
    line = refused("predict", "--adapter", tmp_path, "--data", reviews_csv, "--output", tmp_path / "p.csv")
    assert "adapter_config.json" in line


def test_predict_refuses_the_adapter_of_a_language_model(refused, adapter, tmp_path, reviews_csv):
    line = refused("predict", "--adapter", adapter, "--data", reviews_csv, "--output", tmp_path / "p.csv")
    assert "is an adapter of a language model" in line and "loraplus generate" in line


def test_the_usual_ratio_typed_beside_automatic_rates_is_refused_and_in_a_saved_file_is_not(
    tmp_path, model_folder, reviews_csv, refused, loraplus_command
):
    saved = tmp_path / "config.yaml"
    saved.write_text("lr: auto\nlr_ratio: 16.0\n")
    given = ["train", "--model", model_folder, "--data", reviews_csv, "--output", tmp_path / "out"]
    said = "--lr-ratio 16 is not used with --lr auto"
    assert said in refused(*given, "--lr", "auto", "--lr-ratio", 16)
    assert said in refused(*given, "--config", saved, "--lr-ratio", 16)
    outcome = loraplus_command(*given, "--config", saved, "--check")
    assert outcome.code == 0, outcome.err
    assert not (tmp_path / "out").exists()


def test_automatic_rates_train_and_are_written_down(tmp_path, model_folder, reviews_csv, loraplus_command):
    output = tmp_path / "out"
    arguments = flags(
        model_folder, reviews_csv, output, "--lr", "auto", "--max-steps", 100, "--eval-steps", 25, "--json"
    )
    outcome = loraplus_command(*arguments)
    assert outcome.code == 0, outcome.err
    metrics = json.loads(outcome.out)
    assert metrics["auto"] and metrics["lr"] > 0 and metrics["lr_ratio"] > 0 and metrics["eval_accuracy"] > 0.8
    rows = list(csv.DictReader((output / "curves.csv").open()))
    logged = [row for row in rows if row["lr/lora_B"]]
    assert all(float(row["lr/lora_B"]) > 0 and float(row["updates/delta2"]) > 0 for row in logged[1:])
    assert sum(name.startswith("lr/base") and name.endswith(".lora_A") for name in rows[0]) == 4  # every layer's own
    saved = json.loads((output / "loraplus.json").read_text())["auto"]
    assert saved["steps"] == 100 and len(saved["layers"]) == 4
    groups = {group["name"]: group for group in metrics["groups"]}
    assert groups["lora_A"]["base_lr"] == metrics["lr"]


def test_automatic_rates_resume_to_the_same_adapter(tmp_path, model_folder, reviews_csv, loraplus_command):
    whole, part = tmp_path / "whole", tmp_path / "part"
    arguments = ["--lr", "auto", "--json"]
    assert loraplus_command(*flags(model_folder, reviews_csv, whole, *arguments)).code == 0
    shutil.copytree(whole, part)
    shutil.rmtree(part / "checkpoint-20")
    (part / "metrics.json").unlink()
    outcome = loraplus_command(*flags(model_folder, reviews_csv, part, *arguments, "--resume"))
    assert outcome.code == 0, outcome.err
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (whole, part))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_rate_that_is_no_number_and_not_auto_is_refused(refused, tmp_path, model_folder, reviews_csv):
    assert 'a number or "auto"' in refused(*flags(model_folder, reviews_csv, tmp_path / "out", "--lr", "fast"))
