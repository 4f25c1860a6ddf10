"""`loraplus reproduce` from the outside, with an experiment that trains nothing."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from loraplus.cli import main
from loraplus.errors import InputError
from loraplus.reproduce.files import columns_of, read_runs, write_runs
from loraplus.study.records import CurvePoint, Record
from reproduce import fake_experiment
from reproduce.fake_experiment import DIVERGES_FROM, noted

RUNS = DIVERGES_FROM + 1  # for each seed: up to the first that diverges


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    return folder


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]):
    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main(["reproduce", *map(str, arguments)])
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return call


def refused(outcome: tuple[int, str, str]) -> str:
    code, _, err = outcome
    assert code == 2 and len(err.strip().splitlines()) == 1 and "Traceback" not in err, outcome
    return err


def started(data: Path, output: Path, *more: object, new_session: bool = False) -> subprocess.Popen[str]:
    words = ["fake", "--data", data, "--output", output, "--workers", 1, "--seeds", 2, "--plain", *more]
    return subprocess.Popen(
        [sys.executable, fake_experiment.__file__, "reproduce", *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=new_session,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), *sys.path])},
    )  # fmt: skip


def test_from_scratch_to_files_and_drawn_again_from_them(command, data: Path, tmp_path: Path):
    output = tmp_path / "out"
    code, out, err = command("fake", "--data", data, "--output", output, "--workers", 1, "--seeds", 2, "--json")
    assert code == 0, err
    summary = json.loads(out)
    assert summary == json.loads((output / "summary.json").read_text())
    assert summary["figures"] == {"best_k": 4, "rows": 2 * 2 * DIVERGES_FROM}
    assert (summary["runs"], summary["diverged"]) == (2 * RUNS, 2)
    assert "The best k is 4." in err
    assert "diverged" in err and "loss 0.1235" in err
    assert summary["settings"] == {"scale": "cpu", "seeds": 2, "best": 4}
    assert (output / "plots" / "curve.png").read_bytes().startswith(b"\x89PNG")
    page = (output / "index.html").read_text()
    assert "A parabola &lt;b&gt;" in page and "&lt;i&gt;" in page and "<b>" not in page and page.count("<svg") == 2
    assert not re.search(r"(src|href)\s*=\s*(?!.data:)|@import|url\(", page)

    again = tmp_path / "again"
    code, out, err = command("fake", "--redraw", output, "--output", again, "--json")
    assert code == 0, err
    assert json.loads(out) == summary
    for name in ("runs.csv", "index.html", "plots/curve.png"):
        assert (again / name).read_bytes() == (output / name).read_bytes()
    assert len(noted(data)) == 2 * RUNS

    assert "is not empty" in refused(command("fake", "--data", data, "--output", output))
    assert "seeds was 2, now 3" in refused(command("fake", "--data", data, "--output", output, "--resume"))
    code, out, err = command("fake", "--data", data, "--output", output, "--seeds", 2, "--resume", "--json")
    assert json.loads(out) == summary
    assert len(noted(data)) == 2 * RUNS, "nothing was run again"
    code, _, err = command("fake", "--redraw", again, "--output", output, "--overwrite")
    assert code == 0, err
    assert not (output / "study.journal").exists() and (output / "summary.json").exists()


def test_results_that_cannot_be_drawn_again_are_one_line_and_nothing_is_lost(command, data: Path, tmp_path: Path):
    output, again = tmp_path / "out", tmp_path / "again"
    for folder in (output, again):
        command("fake", "--data", data, "--output", folder, "--workers", 1, "--seeds", 2)
    kept = {path.name: path.read_bytes() for path in again.iterdir() if path.is_file()}

    def said(**changes: str) -> str:
        for name, text in changes.items():
            (output / f"{name}.{'json' if name == 'summary' else 'csv'}").write_text(text)
        line = refused(command("fake", "--redraw", output, "--output", again, "--overwrite"))
        assert {path.name: path.read_bytes() for path in again.iterdir() if path.is_file()} == kept
        return line

    assert "cannot be its own --output" in refused(command("fake", "--redraw", again, "--output", again, "--overwrite"))
    summary, runs = (output / "summary.json").read_text(), (output / "runs.csv").read_text()
    lines = runs.splitlines(keepends=True)
    assert "lacks runs, such as kind point k" in said(runs=lines[0])
    assert f"line {len(lines)} is cut short" in said(runs=runs[: len(runs) - len(lines[-1]) + 6])
    assert "is no summary" in said(runs=runs, summary=summary.replace('"seeds": 2', '"seeds": "two"'))
    assert "is no summary" in said(summary=summary.replace('"versions"', '"verses"'))


def test_a_table_gives_back_the_results_it_was_written_from(command, tmp_path: Path):
    experiment = fake_experiment.Fake(seeds=1, data=str(tmp_path))
    results: dict[str, Record] = {}
    while runs := experiment.next_runs(results):
        results |= {run.key: experiment.timed_run(run, lambda *_, **__: None) for run in runs}
    write_runs(tmp_path / "runs.csv", list(results.values()))
    columns = columns_of(results.values())
    back = read_runs(tmp_path / "runs.csv", columns)
    assert experiment.next_runs(back) == [], "whatever was run is there"
    assert [result.status for result in back.values()] == ["done"] * DIVERGES_FROM + ["diverged"]
    first = next(iter(back.values()))
    assert first.trial.params == {"kind": "point", "k": 0, "lr": 1.0, "seed": 0}
    assert first.rows == ({"eta": 1.0, "row_loss": 16.12346}, {"eta": 0.1, "row_loss": 17.12346})
    assert first.curve == (CurvePoint(1, 1.0), CurvePoint(2, 16.12346))
    (tmp_path / "runs.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match=r"runs\.csv is no table of runs"):
        read_runs(tmp_path / "runs.csv", columns)


def test_an_interrupted_command_and_a_killed_one_go_on_where_they_stopped(command, data: Path, tmp_path: Path):
    (data / "slow").write_text("0.3")
    output = tmp_path / "out"
    process = started(data, output)
    wait_for(lambda: (data / "noted").exists() and len(noted(data)) >= 3, process)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 130
    assert said.strip().splitlines()[-1].endswith("go on with the same command and --resume")
    page = (output / "index.html").read_text()
    assert re.search(r"<h1>\d+ of \d+ runs? done</h1>", page) and 'http-equiv="refresh"' in page
    process = started(data, output, "--resume")
    wait_for(lambda: len(noted(data)) >= 6, process)
    process.kill()
    process.communicate(timeout=200)
    assert not (output / "summary.json").exists()
    (data / "slow").unlink()
    words = ["fake", "--data", data, "--output", output, "--workers", 1, "--seeds", 2, "--resume"]
    assert command(*words)[0] == 0
    counted = Counter(key for _, key in noted(data))
    assert len(counted) == 2 * RUNS
    assert len(noted(data)) <= 2 * RUNS + 2, "only what was cut short is run twice"
    assert json.loads((output / "summary.json").read_text())["runs"] == 2 * RUNS


def test_a_signal_to_the_whole_group_is_an_interruption(data: Path, tmp_path: Path):
    """As `timeout` and batch systems send it: the workers end, too, and that is no lack of memory."""
    (data / "slow").write_text("0.3")
    process = started(data, tmp_path / "out", new_session=True)
    wait_for(lambda: (data / "noted").exists() and len(noted(data)) >= 2, process)
    os.killpg(process.pid, signal.SIGTERM)
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 130
    assert said.strip().splitlines()[-1].endswith("go on with the same command and --resume")


def test_two_processes_with_one_storage_share_the_runs(data: Path, tmp_path: Path):
    (data / "slow").write_text("0.3")
    storage = tmp_path / "shared.journal"
    processes = [started(data, tmp_path / name, "--storage", storage) for name in ("a", "b")]
    outputs = [process.communicate(timeout=400)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    counted = Counter(key for _, key in noted(data))
    assert len(counted) == 2 * RUNS and set(counted.values()) == {1}, "every run once"
    assert {int(parent) for parent, _ in noted(data)} == {process.pid for process in processes}
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("a", "b")]
    assert summaries[0] == summaries[1]


def test_a_dry_run_says_what_would_be_run_and_writes_nothing(command, data: Path, tmp_path: Path):
    code, out, _ = command("fake", "--output", tmp_path / "out", "--seeds", 4, "--dry-run")
    assert code == 0
    assert "runs known so far: 4" in out and "best: 4" in out and "kind point k 0 lr 1.0 seed 3" in out
    assert not (tmp_path / "out").exists()
    plan = json.loads(command("fake", "--output", tmp_path / "out", "--dry-run", "--json")[1])
    assert (plan["runs_known"], plan["settings"]["seeds"]) == (3, 3)


def test_the_list_names_every_experiment(command):
    code, out, _ = command("--list", "--json")
    assert code == 0
    listed = {row["name"]: row for row in json.loads(out)}
    assert set(listed) == set(fake_experiment.EXPERIMENTS)
    assert all(row["title"] and row["claims"] and row["scales"] for row in listed.values())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fakr"], "there is no experiment 'fakr'; did you mean fake?"),
        (["zzzz"], "there is no experiment 'zzzz'; there are "),
        ([], "which experiment? loraplus reproduce NAME, one of "),
        (["fake", "--scale", "paper"], "fake runs at --scale cpu only, not paper"),
        (["fake", "--scale", "huge"], "--scale must be cpu or paper, got 'huge'"),
        (["fake", "--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["fake", "--seeds", str(2**63)], "--seeds must be at most 10,000, got 9223372036854775808"),
        (["fake", "--workers", "0"], "--workers must be at least 1, got 0"),
        (["fake", "--redraw", "nowhere"], "cannot read nowhere/summary.json"),
        (["fake", "--redraw", "nowhere", "--resume"], "--redraw trains nothing, so there is nothing to --resume"),
    ],
)
def test_a_mistake_is_one_line(command, tmp_path: Path, words: list[str], message: str):
    assert message in refused(command(*words, "--output", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_package_that_is_missing_is_named_before_anything_is_written(command, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(fake_experiment.Fake, "packages", ("no_such_package",))
    said = refused(command("fake", "--data", tmp_path, "--output", tmp_path / "out"))
    assert "fake needs no_such_package: pip install 'loraplus[reproduce]'" in said
    assert not (tmp_path / "out").exists()


def wait_for(condition, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 200
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.05)
