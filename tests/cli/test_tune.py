"""`loraplus tune` from the outside, on a tiny model: files, resuming, sharing, refusals."""

from __future__ import annotations

import csv
import json
import os
import shlex
import signal
import subprocess
import sys
from collections import Counter

import pytest
import yaml


def flags(model_folder, data, output, *more):
    return [
        "tune", "--model", model_folder, "--data", data, "--output", output, "--max-steps", 40, "--batch-size", 8,
        "--rank", 2, "--eval-steps", 20, "--tuning-runs", 2.5, "--workers", 1, *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def tuned(run, tmp_path_factory, model_folder, reviews_csv):
    output = tmp_path_factory.mktemp("study") / "out"
    done = run(*flags(model_folder, reviews_csv, output, "--json"))
    assert done.returncode == 0, done.stderr
    return output, json.loads(done.stdout), done.stderr


def files_of(output):
    return {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()}


def test_it_finds_the_best_full_run_within_the_budget(tuned):
    _, result, _ = tuned
    full = [row for row in result["trials"] if row["steps"] == 40]
    best = min(full, key=lambda row: row["eval_loss"])
    assert {key: result["best"][key] for key in ("lr", "lr_ratio", "eval_loss")} == {
        key: best[key] for key in ("lr", "lr_ratio", "eval_loss")
    }
    assert result["cost"]["full_runs"] == pytest.approx(sum(row["steps"] for row in result["trials"]) / 40, abs=1e-3)
    assert result["cost"]["full_runs"] <= result["cost"]["budget"] == 2.5
    assert {row["seed"] for row in result["trials"]} == {0}
    assert min(row["steps"] for row in result["trials"]) == 20, "short runs came first"


def test_files_and_terminal_tell_the_same(tuned):
    output, result, err = tuned
    assert json.loads((output / "tune.json").read_text()) == result
    rows = list(csv.DictReader((output / "trials.csv").open()))
    assert [float(row["lr"]) for row in rows] == [row["lr"] for row in result["trials"]]
    assert [row["part"] for row in rows].count("1.0") == sum(row["part"] == 1 for row in result["trials"])
    config = yaml.safe_load((output / "config.yaml").read_text())
    assert (config["tuning_runs"], config["minutes"], config["study"]) == (2.5, None, "loraplus-tune")
    assert result["train_command"] in err and f"report: {output / 'report.html'}" in err.replace("\n", "")
    page = (output / "report.html").read_text()
    assert "Best rates" in page and "refresh" not in page and page.count("<svg") == 2
    assert f"{len(rows)}" and "eval loss" in err and "min left" in err


def test_the_command_line_and_the_file_train_with_the_pair_found(tuned, loraplus_command):
    output, result, _ = tuned
    words = shlex.split(result["train_command"])
    assert words[:2] == ["loraplus", "train"]
    best = yaml.safe_load((output / "best.yaml").read_text())
    assert (best["lr"], best["lr_ratio"]) == (result["best"]["lr"], result["best"]["lr_ratio"])
    for arguments in (words[1:], ["train", "--config", output / "best.yaml", "--overwrite"]):
        metrics = json.loads(loraplus_command(*arguments, "--json").out)
        assert (metrics["lr"], metrics["lr_ratio"], metrics["steps"]) == (best["lr"], best["lr_ratio"], 40)


def test_resuming_a_finished_search_trains_nothing_and_says_the_same(run, tuned, model_folder, reviews_csv):
    output, result, _ = tuned
    done = run(*flags(model_folder, reviews_csv, output, "--resume", "--json"))
    assert json.loads(done.stdout) == result
    assert "tuning LoRA" not in done.stderr


def test_an_interrupted_search_goes_on_to_the_same_pair(run, tuned, tmp_path, model_folder, reviews_csv):
    output = tmp_path / "out"
    command = [sys.executable, "-m", "loraplus", *map(str, flags(model_folder, reviews_csv, output, "--json"))]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    seen = []
    for line in process.stderr:
        seen.append(line)
        if "tuning LoRA+" in line:
            break
    process.send_signal(signal.SIGINT)
    seen.append(process.communicate(timeout=60)[1])
    assert process.returncode == 130, seen
    assert "--resume" in seen[-1]
    page = (output / "report.html").read_text()
    assert "of 2.5 runs done</h1>" in page and 'http-equiv="refresh"' in page
    done_before = sum("tuning LoRA+" in line for line in "".join(seen).splitlines())
    done = run(*flags(model_folder, reviews_csv, output, "--resume", "--json"))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    again = [line for line in done.stderr.splitlines() if "tuning LoRA+" in line]
    assert len(again) == len(result["trials"]) - done_before, (seen, again)
    assert result["best"] == tuned[1]["best"]


def test_a_second_process_with_the_same_storage_joins_the_search(tuned, tmp_path, model_folder, reviews_csv):
    storage = tmp_path / "shared.journal"
    commands = [
        [sys.executable, "-m", "loraplus",
         *map(str, flags(model_folder, reviews_csv, tmp_path / name, "--storage", storage, "--json"))]
        for name in ("first", "second")
    ]  # fmt: skip
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for command in commands
    ]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    first, second = (json.loads(out) for out, _ in outputs)
    assert first["trials"] == second["trials"] and first["best"] == second["best"] == tuned[1]["best"]
    lines = [line for _, err in outputs for line in err.splitlines() if "tuning LoRA+" in line]
    own = Counter(line.split(" · ")[1].split(":")[0] for line in lines if "another process" not in line)
    assert set(own.values()) == {1} and len(own) == len(first["trials"]), "every run was done by one of them"


# One test per bad input: one line, exit code 2, nothing of the user's touched.


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--tuning-runs", "0"], "--tuning-runs must be at least 1"),
        (["--tuning-runs", "nan"], "--tuning-runs must be at least 1"),
        (["--tuning-runs", "many"], "--tuning-runs"),
        (["--minutes", "5"], "two budgets"),
        (["--workers", "0"], "--workers must be at least 1"),
        (["--lr-head", "nan"], "lr_head"),
        (["--max-steps", "0"], "--max-steps"),
        (["--target-modules", "q_proj"], "q_proj"),
        (["--storage", "nosuchdb://host/db"], "cannot open the study nosuchdb://host/db"),
        (["--storage", "/nowhere/study.journal"], "cannot open the study /nowhere/study.journal"),
        (["--storage", "postgresql://me:not-to-be-shown@127.0.0.1:1/db"], "postgresql://me:***@127.0.0.1:1/db"),
    ],
)
def test_it_is_refused_before_anything_is_touched(refused, tmp_path, model_folder, reviews_csv, more, expected):
    line = refused(*flags(model_folder, reviews_csv, tmp_path / "out", *more))
    assert expected in line and "not-to-be-shown" not in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("minutes", ["0", "-3", "nan", "inf"])
def test_unusable_minutes(refused, tmp_path, model_folder, reviews_csv, minutes):
    arguments = flags(model_folder, reviews_csv, tmp_path / "out")
    arguments.remove("--tuning-runs")
    arguments.remove(2.5)
    assert "--minutes must be a positive number" in refused(*arguments, "--minutes", minutes)
    assert not (tmp_path / "out").exists()


def test_a_storage_that_is_another_kind_of_file(refused, tmp_path, model_folder, reviews_csv):
    before = reviews_csv.read_bytes()
    line = refused(*flags(model_folder, reviews_csv, tmp_path / "out", "--storage", reviews_csv))
    assert "another kind of file" in line and reviews_csv.read_bytes() == before


def test_output_that_is_not_empty_is_left_untouched(refused, tuned, model_folder, reviews_csv):
    output, _, _ = tuned
    before = files_of(output)
    assert "--overwrite" in refused(*flags(model_folder, reviews_csv, output))
    assert "rank" in refused(*flags(model_folder, reviews_csv, output, "--resume", "--rank", 4))
    assert files_of(output) == before


def test_other_settings_than_the_study_has(refused, tuned, tmp_path, model_folder, reviews_csv):
    journal = tuned[0] / "study.journal"
    line = refused(*flags(model_folder, reviews_csv, tmp_path / "o", "--storage", journal, "--rank", 4))
    assert "rank was 2, now 4" in line and "--study" in line
    assert not (tmp_path / "o").exists()


def test_other_data_than_the_study_has(refused, tuned, tmp_path, model_folder, reviews_csv):
    other = tmp_path / reviews_csv.name
    other.write_text(reviews_csv.read_text() + "a good film,positive\n")
    line = refused(*flags(model_folder, other, tmp_path / "o", "--storage", tuned[0] / "study.journal"))
    assert "the data has changed" in line and "train_examples" in line
