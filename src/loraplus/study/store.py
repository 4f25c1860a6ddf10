"""Keeps the runs of a study in an Optuna storage, so that a killed study goes on where it was.

Each run is one Optuna trial: η_A and λ are its parameters, the validation loss its value, the curve its intermediate
values, and the whole `Record` a user attribute. `optuna-dashboard study.journal` shows the study as any other.
A diverged run is a failed trial that has a record; a run that was cut short is a failed trial that has none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.trial import FrozenTrial, TrialState

from loraplus.errors import InputError
from loraplus.study.records import Record, Trial
from loraplus.tasks.output import data_changes

RECORD = "record"
DATA = "data"
DISTRIBUTIONS: dict[str, BaseDistribution] = {
    "lr": FloatDistribution(1e-12, 1e4, log=True),
    "lr_ratio": FloatDistribution(1.0, 1e9, log=True),
}
# A process that is killed while it writes leaves the journal's lock behind; after so many seconds it no longer counts.
LOCK_SECONDS = 5


class StudyStore:
    """The records of one study. One process writes to it at a time."""

    def __init__(self, study: optuna.Study) -> None:
        self._study = study
        self._running: dict[str, optuna.Trial] = {}
        self._reported: dict[str, set[int]] = {}
        self._close_unfinished()
        self._records = self._load_records()

    @classmethod
    def open(cls, location: str | os.PathLike[str], name: str) -> StudyStore:
        """Opens a study, or creates it; runs that an earlier process left unfinished will be done again.

        Args:
            location: A journal file, or a storage URL as Optuna takes it (`postgresql://…`, `sqlite:///…`).
            name: Name of the study within the storage.

        Raises:
            InputError: the storage cannot be opened, or what is in it cannot be read.
        """
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        try:
            storage = _storage(os.fspath(location))
            study = optuna.create_study(storage=storage, study_name=name, direction="minimize", load_if_exists=True)
            return cls(study)
        except InputError:
            raise
        except OSError as error:
            raise InputError(f"cannot open the study {location}: {error.strerror or error}") from None
        except Exception as error:  # every storage has its own errors: SQLAlchemy's, the driver's, a damaged journal's
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise InputError(f"cannot open the study {location}: {reason}") from error

    def records(self) -> dict[str, Record]:
        """Finished runs by the key of their trial, diverged ones included."""
        return dict(self._records)

    def check_data(self, facts: Mapping[str, Any]) -> None:
        """Makes sure that all runs of a study see the same data: the first call notes the facts, later ones compare.

        Raises:
            InputError: the data is not what the finished runs were trained on.
        """
        before = self._study.user_attrs.get(DATA)
        if before is None:
            self._study.set_user_attr(DATA, json.loads(json.dumps(dict(facts))))
        elif changes := data_changes(before, facts):
            raise InputError(f"--resume: the data has changed since this study was started: {changes}")

    def start(self, trial: Trial) -> None:
        """Notes that a run is under way."""
        attributes = {"phase": trial.phase, "arm": trial.arm, "seed": trial.seed, "key": trial.key}
        self._study.enqueue_trial({"lr": trial.lr, "lr_ratio": trial.lr_ratio}, user_attrs=attributes)
        self._running[trial.key] = self._study.ask(DISTRIBUTIONS)
        self._reported[trial.key] = set()

    def progress(self, trial: Trial, step: int, value: float) -> None:
        """Adds one evaluation of a run under way to its curve."""
        reported = self._reported.get(trial.key)
        if reported is not None and step not in reported:
            self._running[trial.key].report(value, step)
            reported.add(step)

    def finish(self, record: Record) -> None:
        """Stores the outcome of a run; from here on it will not be done again."""
        trial = record.trial
        if trial.key in self._records:
            return
        if trial.key not in self._running:
            self.start(trial)
        for point in record.curve:
            self.progress(trial, point.step, point.eval_loss)
        running = self._running.pop(trial.key)
        self._reported.pop(trial.key)
        running.set_user_attr("eval_accuracy", record.eval_accuracy)
        running.set_user_attr("seconds_per_step", record.seconds_per_step)
        running.set_user_attr(RECORD, record.to_dict())
        self._tell(running.number, record)
        self._records[trial.key] = record

    def abandon(self, trial: Trial) -> None:
        """Marks a run under way as cut short; it will be done again."""
        running = self._running.pop(trial.key, None)
        self._reported.pop(trial.key, None)
        if running is not None:
            self._study.tell(running.number, state=TrialState.FAIL)

    def _tell(self, number: int, record: Record) -> None:
        if record.status == "done":
            self._study.tell(number, record.eval_loss)
        else:
            self._study.tell(number, state=TrialState.FAIL)

    def _trials(self, *states: TrialState) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False, states=states)

    def _close_unfinished(self) -> None:
        """Ends what a killed process left open: with its record if that had been written, as failed otherwise."""
        for _ in self._trials(TrialState.WAITING):
            self._study.tell(self._study.ask(), state=TrialState.FAIL)
        for frozen in self._trials(TrialState.RUNNING):
            if RECORD in frozen.user_attrs:
                self._tell(frozen.number, Record.from_dict(frozen.user_attrs[RECORD]))
            else:
                self._study.tell(frozen.number, state=TrialState.FAIL)

    def _load_records(self) -> dict[str, Record]:
        records: dict[str, Record] = {}
        for frozen in self._trials(TrialState.COMPLETE, TrialState.FAIL):
            if RECORD in frozen.user_attrs:
                record = Record.from_dict(frozen.user_attrs[RECORD])
                records.setdefault(record.trial.key, record)
        return records


def _storage(location: str) -> BaseStorage:
    if "://" in location:
        return optuna.storages.get_storage(location)
    lock = JournalFileSymlinkLock(location, grace_period=LOCK_SECONDS)
    if os.path.exists(location):
        lock.acquire()
        try:
            _drop_torn_tail(Path(location))
        finally:
            lock.release()
    return JournalStorage(JournalFileBackend(location, lock_obj=lock))


def _drop_torn_tail(journal: Path) -> None:
    """Cuts off a last line that a kill left half written; otherwise the next line would be glued to it."""
    content = journal.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    while whole and not _is_json(whole[whole.rfind(b"\n", 0, -1) + 1 :]):
        whole = whole[: whole.rfind(b"\n", 0, -1) + 1]
    if len(whole) < len(content):
        with journal.open("r+b") as file:
            file.truncate(len(whole))


def _is_json(line: bytes) -> bool:
    try:
        parsed: Any = json.loads(line)
    except ValueError:
        return False
    return isinstance(parsed, dict)
