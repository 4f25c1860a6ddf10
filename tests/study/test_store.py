"""The store: finished runs survive whatever happens to the process that writes them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from loraplus.errors import InputError
from loraplus.study.records import CurvePoint, Record, Run, Trial, restored, stored
from loraplus.study.store import StudyStore

TRIAL = Trial("tuning", "loraplus", 2.5e-4, 16.0, 0)
DONE = Record(TRIAL, "done", 20, 0.4, 0.9, 0.1, (CurvePoint(10, 0.6, 0.7), CurvePoint(20, 0.4, 0.9)))
FINAL = replace(DONE, trial=replace(TRIAL, phase="final", seed=1), test_losses=(0.1, 2.5), test_correct=(True, False))
DIVERGED = Record(replace(TRIAL, arm="lora", lr=0.1, lr_ratio=1.0), "diverged", 3, math.inf, 0.0, 0.1)
RECORDS = {record.trial.key: record for record in (DONE, FINAL, DIVERGED)}


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "study.journal"


def filled(location: Path | str) -> StudyStore:
    store = StudyStore.open(location, "s")
    for record in RECORDS.values():
        store.start(record.trial)
        store.finish(record)
    return store


def as_optuna_sees_it(journal: Path) -> optuna.Study:
    return optuna.load_study(study_name="s", storage=JournalStorage(JournalFileBackend(str(journal))))


def test_records_come_back_whole(journal: Path):
    assert filled(journal).records() == RECORDS
    assert StudyStore.open(journal, "s").records() == RECORDS


def test_any_optuna_storage_serves(tmp_path: Path):
    pytest.importorskip("sqlalchemy")
    url = f"sqlite:///{tmp_path / 'study.db'}"
    filled(url)
    assert StudyStore.open(url, "s").records() == RECORDS


def test_optuna_sees_a_normal_study(journal: Path):
    filled(journal)
    study = as_optuna_sees_it(journal)
    assert study.best_value == 0.4
    assert study.best_params == {"lr": 2.5e-4, "lr_ratio": 16.0}
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "COMPLETE", "FAIL"]
    assert study.trials[0].intermediate_values == {10: 0.6, 20: 0.4}
    assert study.trials[1].user_attrs["phase"] == "final"


def test_studies_in_one_storage_are_apart(journal: Path):
    filled(journal)
    assert StudyStore.open(journal, "another").records() == {}


def test_a_run_that_was_cut_short_is_marked_and_not_counted(journal: Path):
    store = filled(journal)
    cut = replace(TRIAL, seed=7)
    store.start(cut)
    store.progress(cut, 10, 0.5)
    again = StudyStore.open(journal, "s")
    assert again.records() == RECORDS
    study = as_optuna_sees_it(journal)
    assert study.trials[-1].state == TrialState.PRUNED
    assert not study.get_trials(states=(TrialState.RUNNING, TrialState.WAITING))
    again.finish(replace(DONE, trial=cut))
    assert len(StudyStore.open(journal, "s").records()) == len(RECORDS) + 1


def test_abandoning_ends_a_run_without_a_record(journal: Path):
    store = StudyStore.open(journal, "s")
    store.start(TRIAL)
    store.abandon(TRIAL)
    store.abandon(TRIAL)
    assert store.records() == {}
    assert as_optuna_sees_it(journal).trials[0].state == TrialState.PRUNED


def test_finishing_twice_counts_once(journal: Path):
    store = filled(journal)
    store.finish(DONE)
    assert len(as_optuna_sees_it(journal).trials) == len(RECORDS)


def test_a_curve_point_told_during_the_run_is_not_told_again(journal: Path):
    store = StudyStore.open(journal, "s")
    store.start(TRIAL)
    store.progress(TRIAL, 10, 0.6)
    store.progress(TRIAL, 10, 0.6)
    store.finish(DONE)
    assert as_optuna_sees_it(journal).trials[0].intermediate_values == {10: 0.6, 20: 0.4}


@pytest.mark.parametrize("torn", [b'{"op_code":8,"worker_id":"a', b"\0\0\0\0", b'{"op_co\n', b"\xff\xfe\n"])
def test_a_torn_last_line_loses_no_finished_run(journal: Path, torn: bytes):
    filled(journal)
    with journal.open("ab") as file:
        file.write(torn)
    store = StudyStore.open(journal, "s")
    assert store.records() == RECORDS
    more = replace(DONE, trial=replace(TRIAL, seed=9))
    store.finish(more)
    assert StudyStore.open(journal, "s").records() == {**RECORDS, more.trial.key: more}


def test_a_kill_at_any_byte_leaves_a_journal_that_opens(journal: Path):
    filled(journal)
    content = journal.read_bytes()
    counts = []
    for length in range(0, len(content) + 1, max(1, len(content) // 60)):
        journal.write_bytes(content[:length])
        counts.append(len(StudyStore.open(journal, "s").records()))
    assert counts == sorted(counts)
    assert counts[0] == 0 and counts[-1] >= len(RECORDS) - 1


def test_a_record_written_before_the_kill_counts_although_the_trial_was_not_closed(journal: Path):
    filled(journal)
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:-1]))  # the last line closes the last trial
    assert StudyStore.open(journal, "s").records() == RECORDS
    assert as_optuna_sees_it(journal).trials[-1].state == TrialState.FAIL


@pytest.mark.filterwarnings("ignore:The value of `grace_period`")
def test_a_lock_left_by_a_killed_process_does_not_block_for_long(journal: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("loraplus.study.journal.LOCK_SECONDS", 1)
    filled(journal)
    lock = Path(f"{journal}.lock")
    lock.unlink(missing_ok=True)
    lock.symlink_to(journal)
    assert StudyStore.open(journal, "s").records() == RECORDS


def test_a_run_of_an_experiment_comes_back_whole(journal: Path):
    run = Run({"kind": "point", "width": 64, "lr": 1e-3})
    rows = ({"lr_a": 1e-3, "loss": math.inf},)
    record = Record(
        run, "done", curve=(CurvePoint(1, 2.0),), values={"loss": 0.5, "gap": -math.inf}, rows=rows, shown=0.5
    )
    store = StudyStore.open(journal, "s")
    assert store.start(run)
    store.finish(record)
    assert StudyStore.open(journal, "s").records() == {run.key: record}
    study = as_optuna_sees_it(journal)
    assert study.best_value == 0.5 and study.best_params == {"width": 64.0, "lr": 1e-3}


def test_an_experiment_s_outcome_of_before_is_read():
    """Earlier versions kept parameters in the place of a trial, and pairs in that of a curve."""
    kept = {"params": {"width": 64}, "status": "done", "values": {"loss": "inf"}, "curve": [[1, "nan"]],
            "rows": [{"a": 1}], "seconds": 2.0}  # fmt: skip
    record = restored(kept)
    assert record.trial == Run({"width": 64}) and record.values == {"loss": math.inf} and record.rows == ({"a": 1},)
    assert record.seconds == 2.0 and record.curve[0].step == 1 and math.isnan(record.curve[0].eval_loss)
    assert restored(stored(record)).values == record.values


def test_changed_data_is_refused(journal: Path):
    filled(journal).check_data({"train_examples": 80, "labels": ("a", "b")})
    StudyStore.open(journal, "s").check_data({"train_examples": 80, "labels": ["a", "b"]})
    with pytest.raises(InputError, match="train_examples was 80, now 81"):
        StudyStore.open(journal, "s").check_data({"train_examples": 81, "labels": ["a", "b"]})


def test_a_line_torn_by_a_killed_process_does_not_spoil_the_journal_of_a_living_one(journal: Path):
    store = filled(journal)
    with journal.open("ab") as file:
        file.write(b'{"op_code":8,"worker_id":"a')
    more = replace(DONE, trial=replace(TRIAL, seed=9))
    store.finish(more)
    assert StudyStore.open(journal, "s").records() == {**RECORDS, more.trial.key: more}


def test_another_kind_of_file_is_refused_and_left_as_it_is(tmp_path: Path):
    path = tmp_path / "reviews.csv"
    path.write_text("text,label\ngood film,a\nbad")
    with pytest.raises(InputError, match="another kind of file"):
        StudyStore.open(path, "s")
    assert path.read_text() == "text,label\ngood film,a\nbad"


@pytest.mark.parametrize("location", ["/nowhere/study.journal", "nosuchdb://host/db"])
def test_a_storage_that_cannot_be_opened_is_one_clear_line(location: str):
    with pytest.raises(InputError, match="cannot open the study") as caught:
        StudyStore.open(location, "s")
    assert "\n" not in str(caught.value)
