"""Which command a folder is of, and what of it may be deleted."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from loraplus.files.commands import COMMANDS, TRAIN, command_of, names_of_all
from loraplus.integrations import trainer_checkpoints
from loraplus.tasks.config import CompareConfig, TrainConfig, TuneConfig

REPRODUCE, STUDY, _ = COMMANDS


@pytest.mark.parametrize(
    "config, command",
    [
        (asdict(TrainConfig()), TRAIN),
        (asdict(CompareConfig()), STUDY),
        (asdict(TuneConfig()), STUDY),
        ({"experiment": "toy", "scale": "cpu", "seeds": 3}, REPRODUCE),
        ({"model": "m", "data": "d"}, None),
        ({}, None),
    ],
)
def test_a_configuration_tells_its_command(config, command):
    assert command_of(config) is command


def test_a_classifier_has_no_report_and_a_language_model_has(tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    of_classifier = {path.name for path in TRAIN.written(tmp_path, {})}
    of_decoder = {path.name for path in TRAIN.written(tmp_path, {"task": "sft"})}
    assert of_decoder - of_classifier == {"samples.json", "report.html"}
    assert "checkpoint-3" in of_classifier and "config.yaml" not in of_classifier
    assert {"config.yaml", "index.html", "best.yaml", "samples.json"} <= names_of_all()


def test_plots_of_an_experiment_are_its_own_and_other_files_there_are_not(tmp_path):
    plots = tmp_path / "plots"
    plots.mkdir()
    for name in ("curve.png", "notes.txt"):
        (plots / name).touch()
    assert plots / "curve.png" in REPRODUCE.written(tmp_path, {})
    assert plots / "notes.txt" not in REPRODUCE.written(tmp_path, {})


def test_the_best_checkpoint_is_not_hashed_again_if_it_is_the_newest(tmp_path, monkeypatch):
    newest, best = tmp_path / "checkpoint-8", tmp_path / "checkpoint-4"
    hashed = []
    monkeypatch.setattr(trainer_checkpoints, "model_fault", hashed.append)
    for folder in (newest, best):
        folder.mkdir()
        (newest / "trainer_state.json").write_text(json.dumps({"best_model_checkpoint": str(folder)}))
        assert trainer_checkpoints._best_and_fault(newest) == (str(folder), None)
    assert hashed == [best]
