"""--report-to: losses and rates reach TensorBoard through Trainer, from a run and from every run of a study."""

from __future__ import annotations

import importlib.util

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from loraplus.study.records import Trial
from loraplus.study.trial import run_trial
from loraplus.tasks.config import CompareConfig
from loraplus.tasks.reporting import reporting


def scalars(folder):
    (events,) = folder.glob("events.out.tfevents.*")
    read = EventAccumulator(str(events))
    read.Reload()
    return {tag: [event.value for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def test_a_run_tells_tensorboard_its_losses_and_rates(tmp_path, model_folder, reviews_csv, loraplus_command):
    output = tmp_path / "out"
    words = [
        "train",
        "--model",
        model_folder,
        "--data",
        reviews_csv,
        "--output",
        output,
        "--max-steps",
        4,
        "--lr",
        1e-3,
    ]
    words += ["--eval-steps", 2, "--lr-ratio", 4, "--report-to", "tensorboard"]
    assert loraplus_command(*words).code == 0
    told = scalars(output / "logs" / "train")
    assert len(told["train/loss"]) == 4 and len(told["eval/loss"]) == 2 and "eval/accuracy" in told
    a, b = (next(told[tag] for tag in told if tag.endswith(f"lr/{role}")) for role in ("lora_A", "lora_B"))
    assert b == pytest.approx([4 * rate for rate in a])
    (output / "logs" / "mine.txt").write_text("x")
    assert loraplus_command(*words[:-2], "--overwrite").code == 0
    assert [path.name for path in (output / "logs").rglob("*") if path.is_file()] == ["mine.txt"]


def test_each_run_of_a_study_has_a_folder_of_its_own(tmp_path, model_folder, reviews_csv):
    output = str(tmp_path / "study")
    config = CompareConfig(
        model=str(model_folder), data=str(reviews_csv), output=output, max_steps=2, report_to="tensorboard"
    )
    run_trial(config, Trial("tuning", "loraplus", 1e-3, 16.0, 0), lambda *_: None)
    assert "train/loss" in scalars(tmp_path / "study" / "logs" / "tuning-loraplus-0.001-16-0")


def test_the_others_are_trainers_own_and_know_what_the_run_is_called(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    arguments, callbacks = reporting("trackio,wandb", "o", "final-lora")
    assert arguments["report_to"] == ["trackio", "wandb"] and arguments["run_name"] == "final-lora" and not callbacks


def test_a_reporter_that_is_not_there_is_one_line(tmp_path, model_folder, reviews_csv, refused, monkeypatch):
    words = ["train", "--model", model_folder, "--data", reviews_csv, "--output", tmp_path / "out", "--report-to"]
    assert "there is no 'tensorbord'" in refused(*words, "tensorbord")
    assert "there is no 'none'" in refused(*words, "none,tensorboard")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "wandb" else find(name, *more))
    assert "needs the package wandb, which is not installed: pip install wandb" in refused(*words, "wandb")
    assert not (tmp_path / "out").exists()
