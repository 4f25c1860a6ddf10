"""Keeps the runs of a study in an Optuna storage, so that a killed study goes on where it was.

Each run is one Optuna trial: of a training run, η_A and λ are its parameters, the validation loss its value, the curve
its intermediate values, and the whole `Record` a user attribute; `format.py` says so, and what else can be kept.
`optuna-dashboard study.journal` shows the study as any other. A diverged run is a failed trial that has a record; a run
that was cut short is a failed trial that has none.

Several processes may work on one study. To claim a run, a process adds a trial that is under way from the start, with
the run's key. Storages number trials in order, so of two with one key all see the same one first: that one counts, the
owner of the other closes it again. While a process has a run under way, it renews the run's heartbeat; when that
stands still, another process closes the trial as failed, and the run can be claimed anew.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any, Generic

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from loraplus.errors import InputError, LoraPlusError
from loraplus.study.format import TRAINING, Format, RecordT, TrialT
from loraplus.study.lease import LEASE_SECONDS, Leases
from loraplus.study.storage import open_study, reason, without_password
from loraplus.tasks.output import data_changes

RECORD = "record"
DATA = "data"
SETTINGS = "settings"
KEY = "key"
BEAT = "beat"


class StudyStore(Generic[TrialT, RecordT]):
    """The records of one study, and who has which run under way.

    Args:
        study: As `open_study` gives it.
        format: How runs and their outcomes are written.
        location: Where it is, for error messages.
        shared: Other processes may work on the study too. Otherwise this is the only one, and what an earlier process
            left under way is closed at once.
        lease_seconds: How long the heartbeat of another process's run may stand still.
    """

    def __init__(
        self,
        study: optuna.Study,
        format: Format[TrialT, RecordT],
        location: str = "",
        *,
        shared: bool = False,
        lease_seconds: float = LEASE_SECONDS,
    ) -> None:
        self._study = study
        self._format = format
        self._location = location
        self.shared = shared
        self._storage: BaseStorage = study._storage
        self._study_id = self._storage.get_study_id_from_name(study.study_name)
        self._leases = Leases(lease_seconds)
        self._running: dict[str, int] = {}  # trial ids
        self._beats = 0
        self._reported: dict[str, set[int]] = {}
        self._elsewhere: list[TrialT] = []
        self._records: dict[str, RecordT] = {}
        if not shared:
            self._close_unfinished()
        self.refresh()

    @classmethod
    def open(
        cls,
        location: str | os.PathLike[str],
        name: str,
        format: Format[Any, Any] = TRAINING,
        *,
        shared: bool = False,
        lease_seconds: float = LEASE_SECONDS,
    ) -> StudyStore[Any, Any]:
        """Opens a study, or creates it; runs that a dead process left unfinished will be done again.

        Args:
            location: A journal file, or a storage URL as Optuna takes it (`postgresql://…`, `sqlite:///…`).
            name: Name of the study within the storage.
            format: How runs and their outcomes are written.
            shared, lease_seconds: See the class.

        Raises:
            InputError: the storage cannot be opened, or what is in it cannot be read.
        """
        location = os.fspath(location)
        study = open_study(location, name)
        try:
            return cls(study, format, location, shared=shared, lease_seconds=lease_seconds)
        except LoraPlusError as error:
            raise InputError(str(error)) from None
        except Exception as error:
            raise InputError(f"cannot open the study {without_password(location)}: {reason(error, location)}") from None

    def records(self) -> dict[str, RecordT]:
        """Finished runs by the key of their trial, diverged ones included, as of the last `refresh`."""
        return dict(self._records)

    def elsewhere(self) -> list[TrialT]:
        """Runs that other processes had under way at the last `refresh`."""
        return list(self._elsewhere)

    def refresh(self) -> None:
        """Looks what other processes have done, closes what dead ones left, and renews the own heartbeats."""
        with self._reachable():
            if self.shared and self._leases.beat_is_due():
                self._beat()
            elsewhere: dict[int, TrialT] = {}
            own = set(self._running.values())
            for frozen in self._trials():
                if frozen.state.is_finished():
                    self._take(frozen)
                elif frozen._trial_id not in own and not self._closed_as_dead(frozen):
                    elsewhere[frozen.number] = self._format.trial(frozen)
            self._leases.forget_all_but(elsewhere)
            self._elsewhere = [trial for trial in elsewhere.values() if trial.key not in self._records]

    def check_data(self, facts: Mapping[str, Any]) -> None:
        """Makes sure that all runs of a study see the same data: the first call notes the facts, later ones compare.

        Raises:
            InputError: the data is not what the finished runs were trained on.
        """
        self._check(DATA, facts, "--resume: the data has changed since this study was started")

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Makes sure that all processes of a study work with the same settings, as `check_data` does for data.

        Raises:
            InputError: the study was started with other settings.
        """
        where = f"the study {self._study.study_name!r} in {without_password(self._location)}"
        self._check(SETTINGS, settings, f"{where} was started with other settings; choose another --study")

    def start(self, trial: TrialT) -> bool:
        """Claims a run for this process and notes that it is under way.

        Returns:
            False if another process has the run under way or has finished it.
        """
        template = create_trial(
            state=TrialState.RUNNING,
            params=dict(self._format.params(trial)),
            distributions=dict(self._format.distributions(trial)),
            user_attrs={**self._format.attributes(trial), KEY: trial.key, BEAT: 0},
        )
        with self._reachable():
            self._running[trial.key] = self._storage.create_new_trial(self._study_id, template_trial=template)
        self._reported[trial.key] = set()
        if not self.shared:
            return True
        self.refresh()
        if trial.key in self._records or self._is_claimed_before(trial.key):
            self.abandon(trial)
            return False
        return True

    def progress(self, trial: TrialT, step: int, value: float) -> None:
        """Adds one evaluation of a run under way to its curve."""
        reported = self._reported.get(trial.key)
        if reported is not None and step not in reported:
            with self._reachable(), contextlib.suppress(UpdateFinishedTrialError):
                self._storage.set_trial_intermediate_value(self._running[trial.key], step, value)
            reported.add(step)

    def finish(self, record: RecordT) -> None:
        """Stores the outcome of a run; from here on it will not be done again."""
        trial = record.trial
        if self.shared:
            self.refresh()
        if trial.key in self._records:
            self.abandon(trial)
            return
        if trial.key not in self._running:
            self.start(trial)
        try:
            self._close(record)
        except UpdateFinishedTrialError:  # this process was taken for dead: the outcome counts all the same
            self._running.pop(trial.key, None)
            self.start(trial)
            if trial.key in self._running:
                self._close(record)
        self._running.pop(trial.key, None)
        self._reported.pop(trial.key, None)
        self._records.setdefault(trial.key, record)

    def abandon(self, trial: TrialT) -> None:
        """Marks a run under way as cut short; it will be done again."""
        trial_id = self._running.pop(trial.key, None)
        self._reported.pop(trial.key, None)
        if trial_id is not None:
            self._fail(trial_id)

    def _close(self, record: RecordT) -> None:
        for step, value in self._format.points(record):
            self.progress(record.trial, step, value)
        trial_id = self._running[record.trial.key]
        with self._reachable():
            for name, value in self._format.measured(record).items():
                self._storage.set_trial_user_attr(trial_id, name, value)
            self._storage.set_trial_user_attr(trial_id, RECORD, self._format.to_dict(record))
            self._tell(trial_id, record)

    def _tell(self, trial_id: int, record: RecordT) -> None:
        value = self._format.value(record)
        if value is not None:
            self._storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [value])
        else:
            self._storage.set_trial_state_values(trial_id, TrialState.FAIL)

    def _fail(self, trial_id: int) -> None:
        with self._reachable(), contextlib.suppress(UpdateFinishedTrialError):
            self._storage.set_trial_state_values(trial_id, TrialState.FAIL)

    def _trials(self) -> list[FrozenTrial]:
        return self._storage.get_all_trials(self._study_id, deepcopy=False)

    def _take(self, frozen: FrozenTrial) -> None:
        """Keeps the record of a finished trial, if there is one and no other trial of its key had one before."""
        if RECORD in frozen.user_attrs and frozen.user_attrs.get(KEY) not in self._records:
            record = self._format.from_dict(frozen.user_attrs[RECORD])
            self._records.setdefault(record.trial.key, record)

    def _is_claimed_before(self, key: str) -> bool:
        """Whether the first trial under way for a key is not this process's."""
        under_way = [t for t in self._trials() if not t.state.is_finished() and t.user_attrs.get(KEY) == key]
        return min(under_way, key=lambda trial: trial.number)._trial_id != self._running[key] if under_way else True

    def _closed_as_dead(self, frozen: FrozenTrial) -> bool:
        if self._leases.is_alive(frozen.number, frozen.user_attrs.get(BEAT, 0)):
            return False
        self._close_one(frozen)
        return True

    def _beat(self) -> None:
        self._beats += 1
        for trial_id in self._running.values():
            with contextlib.suppress(UpdateFinishedTrialError):
                self._storage.set_trial_user_attr(trial_id, BEAT, self._beats)

    def _close_unfinished(self) -> None:
        for frozen in self._trials():
            if not frozen.state.is_finished():
                self._close_one(frozen)

    def _close_one(self, frozen: FrozenTrial) -> None:
        """Ends what a killed process left open: with its record if that had been written, as failed otherwise."""
        with contextlib.suppress(UpdateFinishedTrialError):
            if RECORD in frozen.user_attrs:
                self._tell(frozen._trial_id, self._format.from_dict(frozen.user_attrs[RECORD]))
            else:
                self._storage.set_trial_state_values(frozen._trial_id, TrialState.FAIL)

    def _check(self, name: str, values: Mapping[str, Any], problem: str) -> None:
        with self._reachable():
            before = self._study.user_attrs.get(name)
            if before is None:
                self._study.set_user_attr(name, json.loads(json.dumps(dict(values))))
            elif changes := data_changes(before, values):
                raise InputError(f"{problem}: {changes}")

    @contextlib.contextmanager
    def _reachable(self) -> Iterator[None]:
        """Turns the errors of a storage that went away into one line."""
        try:
            yield
        except (LoraPlusError, UpdateFinishedTrialError):
            raise
        except Exception as error:
            raise LoraPlusError(
                f"lost the study in {without_password(self._location)}: {reason(error, self._location)}; "
                "finished runs are stored: go on with the same command and --resume"
            ) from error
