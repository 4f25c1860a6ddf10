"""What every command has in common: terminals that are not UTF-8, warnings, configuration files."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from loraplus.cli.main import main
from loraplus.cli.options import load_yaml
from loraplus.tasks.train import train


@pytest.fixture
def seen(monkeypatch):
    """The configuration that `loraplus train` would run."""
    configs = []

    def run(config, **_):
        configs.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules[train.__module__], "train", run)
    return configs


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_no_flag_is_cut_off_where_the_terminal_is_narrow(command, monkeypatch, loraplus_command):
    monkeypatch.setenv("COLUMNS", "60")
    outcome = loraplus_command(command, "--help")
    assert outcome.code == 0 and all(len(line) <= 60 for line in outcome.out.splitlines())
    assert "--trust-remo" in outcome.out and not re.search(r"--[a-z-]*…", outcome.out)


def test_a_terminal_that_is_not_utf8_gets_question_marks(tmp_path, model_folder, reviews_csv):
    command = [
        "train", "--model", model_folder, "--data", reviews_csv, "--output", tmp_path / "out", "--max-steps", 2,
        "--lr", "3e-4",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "loraplus", *map(str, command)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0 and "Error" not in done.stderr, done.stderr
    assert "rates: ?_A 0.0003" in done.stdout


def test_a_warning_of_ours_is_one_line_and_comes_once(tmp_path, model_folder, reviews_csv, loraplus_command):
    outcome = loraplus_command(
        "train", "--model", model_folder, "--data", reviews_csv, "--output", tmp_path / "out", "--max-steps", 2,
        "--eval-steps", 1, "--lr-ratio", 0.5, "--plain", "--json",
    )  # fmt: skip
    assert outcome.code == 0
    lines = [line for line in outcome.err.splitlines() if "below 1" in line]
    assert len(lines) == 1 and lines[0].startswith("loraplus: warning: lr_ratio = 0.5 is below 1")
    assert "warnings.warn" not in outcome.err and ".py" not in outcome.err


@pytest.mark.parametrize("content", ["[query, value]", "query,value", "\n- query\n- value"])
def test_target_modules_may_be_a_list_in_the_file(tmp_path, seen, content):
    path = tmp_path / "run.yaml"
    path.write_text(f"model: m\ndata: d\noutput: o\ntarget_modules: {content}\n")
    with pytest.raises(SystemExit):
        main(["train", "--config", str(path)])
    assert seen[0].target_modules == "query,value"


def test_a_list_where_a_number_belongs_is_refused(tmp_path, refused):
    path = tmp_path / "run.yaml"
    path.write_text("model: m\ndata: d\noutput: o\nrank: [1, 2]\n")
    assert "--rank" in refused("train", "--config", path)


@pytest.mark.parametrize(
    ("in_file", "flags", "expected"),
    [
        ("true", [], True),
        ("true", ["--no-use-dora"], False),
        ("false", ["--use-dora"], True),
        ("false", [], False),
    ],
)
def test_a_flag_wins_over_the_file_for_booleans_too(tmp_path, seen, in_file, flags, expected):
    path = tmp_path / "run.yaml"
    path.write_text(f"model: m\ndata: d\noutput: o\nuse_dora: {in_file}\n")
    with pytest.raises(SystemExit):
        main(["train", "--config", str(path), *flags])
    assert seen[0].use_dora is expected


@pytest.mark.parametrize("key", ["overwrite", "resume", "json", "plain"])
def test_flags_of_the_command_are_no_configuration_keys(tmp_path, refused, key):
    path = tmp_path / "run.yaml"
    path.write_text(f"{key}: true\n")
    assert f"{key} is a flag only" in refused("train", "--config", path)


def test_keys_are_read_with_either_dash(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("max-steps: 3\nlr_ratio: 4\n")
    assert load_yaml(str(path), {"max_steps", "lr_ratio"}) == {"max_steps": "3", "lr_ratio": "4"}
