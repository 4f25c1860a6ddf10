"""`compare` and `tune` on chats: the same search and statistics as for classification, judged by the loss a token."""

from __future__ import annotations

import csv
import json
import math

import pytest
import torch
import yaml
from language import chat_rows, write_lines


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    return write_lines(tmp_path_factory.mktemp("chats") / "chats.jsonl", chat_rows(80))


def flags(command, model, data, output, *more):
    return [
        command, "--task", "sft", "--loss-on", "assistant", "--model", model, "--data", data, "--output", output,
        "--max-steps", 8, "--batch-size", 8, "--rank", 4, "--eval-steps", 4, "--workers", 1, "--plain", *more,
    ]  # fmt: skip


def test_compare_is_judged_by_loss_and_perplexity(loraplus_command, tmp_path, decoder_folder, chats):
    output = tmp_path / "out"
    command = flags(
        "compare", decoder_folder, chats, output, "--tuning-runs", 1, "--seeds", 1, "--untuned-lr", "1e-3",
    )  # fmt: skip
    outcome = loraplus_command(*command)
    assert outcome.code == 0, outcome.err
    summary = json.loads((output / "summary.json").read_text())
    for arm in ("lora", "loraplus"):
        found = summary["arms"][arm]
        assert set(found["test"]) == set(found["eval"]) == {"loss", "perplexity"}
        for value in ("mean", "low", "high"):
            assert found["test"]["perplexity"][value] == pytest.approx(math.exp(found["test"]["loss"][value]))
    difference = summary["paired"]["loss_difference"]["mean"]
    means = [summary["arms"][arm]["test"]["loss"]["mean"] for arm in ("loraplus", "lora")]
    assert difference == pytest.approx(means[0] - means[1])
    assert "accuracy_difference" not in {**summary["paired"], **summary["untuned"]}
    assert (
        summary["data"]["packing"] is torch.accelerator.is_available()
        and "perplexity ×" in summary["verdict"]
        and "accuracy" not in summary["verdict"]
    )
    rows = list(csv.DictReader((output / "runs.csv").open()))
    assert {"eval_perplexity", "test_perplexity"} <= set(rows[0]) and "eval_accuracy" not in rows[0]
    page = (output / "report.html").read_text()
    assert "<th>test perplexity</th>" in page and "test accuracy" not in page
    assert "test perplexity" in outcome.out and "test accuracy" not in outcome.out
    assert loraplus_command(*command, "--resume").code == 0
    assert json.loads((output / "summary.json").read_text()) == summary


def test_tune_finds_rates_that_train_takes(loraplus_command, tmp_path, decoder_folder, chats):
    output = tmp_path / "out"
    outcome = loraplus_command(*flags("tune", decoder_folder, chats, output, "--tuning-runs", 1, "--no-packing"))
    assert outcome.code == 0, outcome.err
    result = json.loads((output / "tune.json").read_text())
    assert result["best"]["eval_perplexity"] == pytest.approx(math.exp(result["best"]["eval_loss"]))
    assert "--task sft" in result["train_command"] and "--no-packing" in result["train_command"]
    best = yaml.safe_load((output / "best.yaml").read_text())
    assert best["task"] == "sft" and best["packing"] is False and best["lr"] == result["best"]["lr"]
    trained = loraplus_command("train", "--config", output / "best.yaml", "--plain")
    assert trained.code == 0, trained.err
    metrics = json.loads((output / "adapter" / "metrics.json").read_text())
    assert metrics["eval_loss"] == pytest.approx(result["best"]["eval_loss"], abs=1e-4)
