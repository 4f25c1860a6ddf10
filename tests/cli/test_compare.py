"""`loraplus compare` from the outside, on a tiny model: budget, files, resuming, refusals."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys

import pytest


def flags(model_folder, data, output, *more):
    return [
        "compare", "--model", model_folder, "--data", data, "--output", output, "--max-steps", 12, "--batch-size", 16,
        "--rank", 2, "--eval-steps", 6, "--tuning-runs", 2, "--seeds", 2, "--workers", 2, *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def compared(run, tmp_path_factory, model_folder, reviews_csv):
    output = tmp_path_factory.mktemp("study") / "out"
    done = run(*flags(model_folder, reviews_csv, output, "--json"))
    assert done.returncode == 0, done.stderr
    return output, json.loads(done.stdout), done.stderr


def rows_of(output):
    return list(csv.DictReader((output / "runs.csv").open()))


def test_both_arms_get_the_same_budget_seeds_and_data(compared):
    output, summary, _ = compared
    rows = rows_of(output)
    for arm in ("lora", "loraplus"):
        assert [r["seed"] for r in rows if r["arm"] == arm and r["phase"] == "tuning"] == ["0", "0"]
        for phase in ("final", "untuned"):
            assert sorted(r["seed"] for r in rows if r["arm"] == arm and r["phase"] == phase) == ["1", "2"]
        assert summary["arms"][arm]["tuning_runs"] == 2
    assert all(r["lr_ratio"] == "1.0" for r in rows if r["arm"] == "lora")
    assert all(float(r["lr_ratio"]) > 1 for r in rows if r["arm"] == "loraplus")


def test_the_test_split_is_seen_by_final_and_untuned_runs_only(compared):
    for row in rows_of(compared[0]):
        assert bool(row["test_accuracy"]) == (row["phase"] != "tuning")


def test_files_and_terminal_tell_the_same(compared):
    output, summary, err = compared
    assert json.loads((output / "summary.json").read_text()) == summary
    assert {path.name for path in output.iterdir()} >= {"config.yaml", "runs.csv", "report.html", "study.journal"}
    assert summary["schema_version"] == 1
    assert (
        summary["data"]["train_examples"]
        + summary["data"]["validation_examples"]
        + summary["data"]["test_examples"]
        + summary["data"]["duplicates_removed"]
        == 400
    )
    assert str(output / "report.html") in err.replace("\n", "")
    assert "LoRA+ untuned" in err


def test_resuming_a_finished_comparison_trains_nothing_and_says_the_same(run, compared, model_folder, reviews_csv):
    output, summary, _ = compared
    done = run(*flags(model_folder, reviews_csv, output, "--resume", "--json"))
    assert json.loads(done.stdout) == summary
    assert "tuning LoRA" not in done.stderr  # no run was done again; the times of the steps are equal, too


def test_an_interrupted_comparison_goes_on_where_it_stopped(run, compared, tmp_path, model_folder, reviews_csv):
    output = tmp_path / "out"
    command = [sys.executable, "-m", "loraplus", *map(str, flags(model_folder, reviews_csv, output, "--json"))]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    seen = []
    for line in process.stderr:
        seen.append(line)
        if line.startswith("3/"):
            break
    process.send_signal(signal.SIGINT)
    seen.append(process.communicate(timeout=60)[1])
    assert process.returncode == 130, seen
    assert "--resume" in seen[-1]
    done_before = int(seen[-1].split("interrupted after ")[1].split()[0])
    assert 3 <= done_before < 12
    done = run(*flags(model_folder, reviews_csv, output, "--resume", "--json"))
    assert done.returncode == 0, done.stderr
    again = [line for line in done.stderr.splitlines() if "/12 runs" in line]
    assert len(again) == 12 - done_before
    summary = json.loads(done.stdout)
    for part in ("paired", "verdict"):
        assert summary[part] == compared[1][part]


def test_it_is_refused_before_anything_is_touched(compared, refused, tmp_path, model_folder, reviews_csv):
    output, _, _ = compared
    before = {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()}
    assert "--overwrite" in refused(*flags(model_folder, reviews_csv, output))
    bad = [
        (["--target-modules", "q_proj"], "q_proj"),
        (["--lr-head", "nan"], "lr_head"),
        (["--untuned-lr", "0"], "untuned-lr"),
        (["--lr-ratio", "1"], "lr-ratio"),
        (["--seeds", "0"], "seeds"),
        (["--test-fraction", "2"], "between 0 and 1"),
        (["--max-steps", "0"], "max-steps"),
        (["--weight-decay", "nan"], "weight-decay"),
        (["--lr-scheduler-type", "cosine_with_min_lr"], "lr-scheduler-type"),
        (["--seed", str(2**32 - 2)], "--seed must lie between 0 and 4294967293"),
    ]
    for more, expected in bad:
        assert expected in refused(*flags(model_folder, reviews_csv, output, *more, "--overwrite"))
    assert "seeds" in refused(*flags(model_folder, reviews_csv, output, "--resume", "--seeds", 3))
    assert {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()} == before
