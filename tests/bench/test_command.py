"""`loraplus bench` from the outside."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from loraplus.cli import main


@pytest.fixture
def command(capsys):
    def call(*arguments):
        with pytest.raises(SystemExit) as stop:
            main(["bench", *map(str, arguments)])
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return call


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--minutes", 0), "--minutes must be positive"),
        (("--minutes", "nan"), "--minutes must be positive"),
        (("--model", "m"), "--model needs --data"),
        (("--data", "d.csv"), "--data needs --model"),
        (("--rows", "encoder,deocder"), "there is no row deocder"),
        (("--rows", ","), "there is no row in it"),
        (("--model", "m", "--data", "d.csv", "--rows", "encoder"), "--rows is for the built-in models"),
        (("--task", "lm"), "--task is for a model of yours"),
        (("--batch-size", 8), "--batch-size is for a model of yours"),
        (("--output", "results.txt"), "must end in .json"),
        (("--output", "/nowhere/results.json"), "there is no folder"),
        (("--table", "/nowhere/results.json"), "cannot read"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(command, arguments, says):
    code, out, err = command(*arguments)
    assert code == 2 and out == "" and len(err.strip().splitlines()) == 1 and says in err


def test_a_file_of_something_else_is_no_table(command, tmp_path):
    path = tmp_path / "other.json"
    path.write_text('{"rows": 3}')
    assert command("--table", path)[::2] == (2, f"loraplus: {path} is no result of `loraplus bench`\n")


@pytest.fixture
def result(command, asked, model_folder, reviews_csv, tmp_path):
    path = tmp_path / "speed.json"
    flags = ("--batch-size", 16, "--rank", 2, "--minutes", 0.05, "--no-memory", "--profile", "--output", path, "--json")
    code, out, err = command("--model", model_folder, "--data", reviews_csv, *flags)
    assert code == 0, err
    return json.loads(out), err, path


def test_json_and_terminal_tell_of_the_users_own_model(result, command):
    found, err, path = result
    assert json.loads(path.read_text()) == found
    (row,) = found["rows"]
    ratios = row["ratios"]
    assert row["unit"] == "examples" and {"defaults", "best", "lambda"} == set(ratios)
    for name in ("defaults", "best"):
        ours, other = (row["arms"][arm]["seconds_a_step"]["median"] for arm in ("loraplus", ratios[name]["against"]))
        assert ratios[name]["ratio"] == pytest.approx(other / ours)
        assert ratios[name]["low"] <= ratios[name]["ratio"] <= ratios[name]["high"]
    assert ratios["best"]["against"].startswith("PEFT")
    assert {len(arm["rounds"]) for arm in row["arms"].values()} <= set(range(3, 51))
    assert {name for name, arm in row["arms"].items() if "profile" in arm} == {"loraplus", ratios["best"]["against"]}
    assert row["arms"]["loraplus"]["profile"][0]["ms"] > 0
    assert row["gradient_error"]["ratio"] == pytest.approx(1, abs=0.3)
    assert found["machine"]["processor"] and found["machine"]["versions"]["torch"]
    assert "times as fast as PEFT + Trainer, defaults" in err and "█" in err and "Traceback" not in err

    code, out, _ = command("--table", path)
    assert code == 0 and "| loraplus |" in out and out.count("| arm |") == 1
    assert f"{ratios['best']['ratio']:.2f} [" in out


def test_an_output_that_exists_is_kept(result, command):
    *_, path = result
    code, _, err = command("--output", path)
    assert code == 2 and "--overwrite" in err


def test_a_stack_that_cannot_run_the_model_is_told_and_left_out(command, asked, model_folder, reviews_csv):
    def broken(model):
        raise RuntimeError("no such layer")

    asked.does = broken
    flags = ("--batch-size", 16, "--rank", 2, "--minutes", 0.05, "--no-memory", "--json")
    code, out, err = command("--model", model_folder, "--data", reviews_csv, *flags)
    (row,) = json.loads(out)["rows"]
    assert code == 0 and row["arms"]["loraplus"]["failed"] == "RuntimeError: no such layer"
    assert row["ratios"] == {} and "does not run" in err


@pytest.mark.skipif(os.name == "nt", reason="there is no such signal")
def test_ctrl_c_is_one_line(model_folder, reviews_csv):
    flags = ["--model", model_folder, "--data", reviews_csv, "--minutes", 5, "--rank", 2, "--no-memory"]
    process = subprocess.Popen(
        [sys.executable, "-m", "loraplus", "bench", *map(str, flags)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # where the tests run in the background
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if "round 1" in line:  # a small model's rounds are over in a moment
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in out + err
    assert err.strip().splitlines()[-1] == "interrupted"
