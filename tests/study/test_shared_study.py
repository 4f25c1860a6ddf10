"""Several processes on one study, in a journal, SQLite and a real PostgreSQL: no run is lost, none counts twice."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from optuna.trial import TrialState

from loraplus.errors import InputError
from loraplus.study.records import Record, Trial
from loraplus.study.runner import run_all
from loraplus.study.storage import open_study, without_password
from loraplus.study.store import RECORD, StudyStore
from loraplus.study.tuning import TuningPlan
from study import fake_runs

TESTS = Path(__file__).parent.parent
PLAN = TuningPlan(full_steps=800, seed=0, tuning_runs=4.0)
TRIAL = Trial("tuning", "loraplus", 2.5e-4, 16.0, 0, 100)
DONE = Record(TRIAL, "done", 100, 0.4, 0.9, 0.1)


@pytest.fixture(params=["journal", "sqlite", "postgresql"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        pytest.importorskip("sqlalchemy")
        return f"sqlite:///{tmp_path / 'study.db'}"
    return str(tmp_path / "study.journal") if request.param == "journal" else request.getfixturevalue("postgresql_url")


@pytest.fixture
def name(tmp_path: Path) -> str:
    return tmp_path.name


def shared(location: str, name: str, lease_seconds: float = 60) -> StudyStore:
    return StudyStore.open(location, name, shared=True, lease_seconds=lease_seconds)


def alone(tmp_path: Path) -> dict[str, Record]:
    """What one process makes of the plan."""
    folder = tmp_path / "alone"
    folder.mkdir()
    records: dict[str, Record] = {}
    while (trial := PLAN.next(records, [])) is not None:
        records[trial.key] = fake_runs.quick(str(folder), trial, lambda *_, **__: None)
    return records


def test_a_run_is_claimed_by_one_process_only(location: str, name: str):
    first, second = shared(location, name), shared(location, name)
    assert first.start(TRIAL)
    assert not second.start(TRIAL)
    assert second.elsewhere() == [TRIAL]
    first.finish(DONE)
    assert not second.start(TRIAL)
    assert second.records() == {TRIAL.key: DONE}
    assert second.elsewhere() == []


def test_an_abandoned_run_is_free_at_once(location: str, name: str):
    first, second = shared(location, name), shared(location, name)
    assert first.start(TRIAL)
    first.abandon(TRIAL)
    assert second.start(TRIAL)


def test_a_run_without_heartbeat_is_taken_over_and_its_late_outcome_counts_once(location: str, name: str):
    first, second = shared(location, name), shared(location, name, lease_seconds=0.2)
    assert first.start(TRIAL)
    second.refresh()
    assert second.elsewhere() == [TRIAL]
    time.sleep(0.3)
    second.refresh()
    assert second.elsewhere() == []
    assert second.start(TRIAL)
    second.finish(DONE)
    first.finish(replace(DONE, eval_loss=0.7))  # the first was only asleep
    for store in (first, second, shared(location, name)):
        assert store.records() == {TRIAL.key: DONE}


def test_the_outcome_of_a_process_taken_for_dead_is_kept_if_nobody_else_has_one(location: str, name: str):
    first, second = shared(location, name), shared(location, name, lease_seconds=0.1)
    assert first.start(TRIAL)
    second.refresh()
    time.sleep(0.2)
    second.refresh()
    first.finish(DONE)
    assert shared(location, name).records() == {TRIAL.key: DONE}


def test_a_heartbeat_keeps_a_run(location: str, name: str):
    first, second = shared(location, name, lease_seconds=0.6), shared(location, name, lease_seconds=0.6)
    assert first.start(TRIAL)
    for _ in range(10):
        time.sleep(0.12)
        first.refresh()
        second.refresh()
        assert second.elsewhere() == [TRIAL]


def test_other_settings_and_other_data_than_the_study_has_are_refused(location: str, name: str):
    store = shared(location, name)
    store.check_settings({"rank": 8})
    store.check_data({"train_examples": 80})
    shared(location, name).check_settings({"rank": 8})
    with pytest.raises(InputError, match=r"rank was 8, now 4") as caught:
        shared(location, name).check_settings({"rank": 4})
    assert "--study" in str(caught.value) and "not-to-be-shown" not in str(caught.value)
    with pytest.raises(InputError, match="train_examples was 80, now 81"):
        shared(location, name).check_data({"train_examples": 81})


SCRIPT = """
    import json
    import os
    import sys
    from functools import partial
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from study import fake_runs, test_shared_study
    from loraplus.errors import InterruptedRun
    from loraplus.study.runner import run_all

    if __name__ == "__main__":
        store = test_shared_study.shared({location!r}, {name!r}, lease_seconds=3)
        run = partial(fake_runs.{function}, {folder!r})
        try:
            records = run_all(test_shared_study.PLAN, store, run, workers=1, log={folder!r} + "/log")
            text = json.dumps({{key: record.to_dict() for key, record in sorted(records.items())}})
            Path({folder!r}, f"records-{{os.getpid()}}").write_text(text)
        except InterruptedRun as stop:
            print(stop)
            sys.exit(130)
"""


def started(folder: Path, location: str, name: str, function: str) -> subprocess.Popen[str]:
    """One process on the study, with its worker in a process group of its own."""
    script = folder / f"{function}-{time.monotonic_ns()}.py"
    text = SCRIPT.format(tests=str(TESTS), location=location, name=name, function=function, folder=str(folder))
    script.write_text(textwrap.dedent(text))
    return subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, start_new_session=True)


def ended_well(process: subprocess.Popen[str]) -> bool:
    process.communicate(timeout=120)
    return process.returncode == 0


def wait_for(folder: Path, what: str, process: subprocess.Popen[str], line: str | None = None) -> None:
    deadline = time.monotonic() + 60
    while not (noted := fake_runs.noted(folder, what)) or (line and line not in noted):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


def test_two_processes_share_the_runs_of_one_search(location: str, name: str, tmp_path: Path):
    processes = [started(tmp_path, location, name, "briefly") for _ in range(2)]
    assert [ended_well(process) for process in processes] == [True, True]
    expected = alone(tmp_path)
    assert shared(location, name).records() == expected
    executed = fake_runs.noted(tmp_path)
    assert Counter(executed) == Counter(list(expected)), "every run once"
    shares = Counter(line.split()[0] for line in fake_runs.noted(tmp_path, "shares"))
    assert set(shares) == {str(process.pid) for process in processes}, shares


def test_the_run_of_a_killed_process_is_taken_up_by_the_other(location: str, name: str, tmp_path: Path):
    victim = started(tmp_path, location, name, "hangs")
    wait_for(tmp_path, "hangs", victim)
    other = started(tmp_path, location, name, "briefly")
    wait_for(tmp_path, "runs", other)
    (held,) = (t for t in open_study(location, name).trials if t.user_attrs["key"] not in fake_runs.noted(tmp_path)
               and t.state == TrialState.RUNNING and t.number == 0)  # fmt: skip
    os.killpg(victim.pid, signal.SIGKILL)
    victim.communicate(timeout=20)
    assert ended_well(other)

    expected = alone(tmp_path)
    assert shared(location, name).records() == expected
    assert Counter(fake_runs.noted(tmp_path)) == Counter(list(expected)), "every run once, the victim's among them"
    trials = open_study(location, name).trials
    assert all(trial.state.is_finished() for trial in trials)
    assert trials[0].user_attrs["key"] == held.user_attrs["key"] and trials[0].state == TrialState.PRUNED
    assert RECORD not in trials[0].user_attrs
    counted = Counter(trial.user_attrs["key"] for trial in trials if RECORD in trial.user_attrs)
    assert counted == Counter(list(expected)), "every run counts once"


def test_a_process_that_was_only_asleep_and_its_successor_decide_on_the_same_losses(tmp_path: Path):
    journal = str(tmp_path / "study.journal")
    sleeper = started(tmp_path, journal, "s", "waits")
    wait_for(tmp_path, "waiting", sleeper)
    os.killpg(sleeper.pid, signal.SIGSTOP)
    successor = started(tmp_path, journal, "s", "waits")
    key = fake_runs.noted(tmp_path, "waiting")[0].split()[1]
    wait_for(tmp_path, "waiting", successor, f"{successor.pid} {key}")  # the sleeper's lease is over by then
    (tmp_path / f"go-{sleeper.pid}").touch()
    os.killpg(sleeper.pid, signal.SIGCONT)
    wait_for(tmp_path, "runs", sleeper, key)
    time.sleep(1)
    (tmp_path / f"go-{successor.pid}").touch()
    assert ended_well(sleeper) and ended_well(successor)
    stored = {key: record.to_dict() for key, record in sorted(shared(journal, "s").records().items())}
    for process in (sleeper, successor):
        assert (tmp_path / f"records-{process.pid}").read_text() == json.dumps(stored)


def test_an_interrupted_process_gives_its_run_back(location: str, name: str, tmp_path: Path):
    process = started(tmp_path, location, name, "hangs")
    wait_for(tmp_path, "hangs", process)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 130
    assert output.strip() == "interrupted after 0 of 4 runs; go on with the same command and --resume"
    assert all(trial.state == TrialState.PRUNED for trial in open_study(location, name).trials)


def test_a_search_goes_on_from_any_point_to_the_same_end(tmp_path: Path):
    expected = alone(tmp_path)
    for count in (0, 3, 9, len(expected)):
        journal = tmp_path / f"{count}.journal"
        store = shared(str(journal), "s")
        for record in list(expected.values())[:count]:
            store.finish(record)
        folder = tmp_path / str(count)
        folder.mkdir()
        records = run_all(PLAN, shared(str(journal), "s"), partial(fake_runs.quick, str(folder)))
        assert records == expected
        assert len(fake_runs.noted(folder)) == len(expected) - count


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://me:secret@host/db", "postgresql://me:***@host/db"),
        ("postgresql://me:p@ss:w/rd@host:5432/db", "postgresql://me:***@host:5432/db"),
        ("postgresql+psycopg://host/db?user=me&password=secret", "postgresql+psycopg://host/db?user=me&password=***"),
        ("postgresql://me@host/db", "postgresql://me@host/db"),
        ("runs/study.journal", "runs/study.journal"),
    ],
)
def test_a_password_is_never_shown(url: str, shown: str):
    assert without_password(url) == shown


def test_a_server_that_does_not_answer_is_one_line_without_the_password():
    pytest.importorskip("psycopg")
    with pytest.raises(InputError, match="cannot open the study") as caught:
        StudyStore.open("postgresql://me:not-to-be-shown@127.0.0.1:1/db", "s", shared=True)
    assert "not-to-be-shown" not in str(caught.value) and "\n" not in str(caught.value)


def test_minutes_become_runs_by_the_pace_of_the_first_rung():
    plan = TuningPlan(full_steps=800, seed=0, tuning_runs=None, minutes=8.0)
    records: dict[str, Record] = {}
    assert plan.budget(records) is None
    while (trial := plan.next(records, [])) is not None:
        assert trial.steps is not None
        seconds = trial.steps * 0.15  # two minutes a run of full length
        loss = 0.3 + math.log10(trial.geometric_mean_lr / 3e-3) ** 2
        records[trial.key] = Record(trial, "done", trial.steps, loss, 0.5, 0.1, seconds=seconds)
    assert plan.budget(records) == pytest.approx(4)
    assert 3 < plan.done(records)[0] <= 4
    with pytest.raises(InputError, match="--minutes 2 is too little: a run of full length takes about 2 minutes"):
        replace(plan, minutes=2.0).next(records, [])
