"""Keeps the runs of a study in an Optuna storage, so that a killed study goes on where it was.

Each run is one Optuna trial: of a training run, η_A and λ are its parameters, the validation loss its value, the curve
its intermediate values, and the whole `Record` a user attribute.
`optuna-dashboard study.journal` shows the study as any other. A finished run is a complete trial, a diverged one a
failed trial; a run that was cut short or came second is a pruned trial.

Several processes may work on one study. To claim a run, a process adds a trial that is under way from the start, with
the run's key. Storages number trials in order, so all processes see the same one of two trials with one key first. That
one counts, and the owner of the other closes it again. While a process has a run under way, it renews the run's
heartbeat (`lease.py`). When that stands still, another process closes the trial as pruned, and the run is free again.

A run has one outcome, even if several processes have trained it. A process writes its outcome into its trial, or into a
new one if that was closed. Then it closes the trials of the run in the order of their numbers: the first that has an
outcome keeps it, all others are pruned. A closed trial never changes, and a trial is closed after those before it. So
no second outcome can be stored, and all processes read the same.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from loraplus.errors import InputError, LoraPlusError
from loraplus.files.output import data_changes
from loraplus.study.lease import LEASE_SECONDS, Leases
from loraplus.study.optuna_trials import curve_of, frozen_trial, outcome_of, trial_of_frozen
from loraplus.study.records import BEAT, KEY, RECORD, Keyed, Record, restored
from loraplus.study.storage import Patient, open_study, reason, without_password

DATA = "data"
SETTINGS = "settings"


class StudyStore:
    """The records of one study, and who has which run under way.

    Args:
        study: As `open_study` gives it.
        location: Where it is, for error messages.
        shared: Other processes may work on the study too. Otherwise this is the only one, and what an earlier process
            left under way is closed at once.
        lease_seconds: How long the heartbeat of another process's run may stand still.
    """

    def __init__(
        self,
        study: optuna.Study,
        location: str = "",
        *,
        shared: bool = False,
        lease_seconds: float = LEASE_SECONDS,
    ) -> None:
        self._study = study
        self._location = location
        self.shared = shared
        self._leases = leases = Leases(lease_seconds)
        # While a server was away, no heartbeat could go on.
        self._storage: Any = Patient(study._storage, location, lambda: leases.forget_all_but(()))
        self._study_id = self._storage.get_study_id_from_name(study.study_name)
        self._running: dict[str, int] = {}  # trial ids
        self._beats = 0
        self._reported: dict[str, set[int]] = {}
        self._others: list[FrozenTrial] = []  # under way
        self._records: dict[str, Record] = {}
        if not shared:
            self._close_unfinished()
        self.refresh()

    @classmethod
    def open(
        cls,
        location: str | os.PathLike[str],
        name: str,
        *,
        shared: bool = False,
        lease_seconds: float = LEASE_SECONDS,
        begun: bool = False,
    ) -> StudyStore:
        """Opens a study, or creates it; runs that a dead process left unfinished will be done again.

        Args:
            location: A journal file, or a storage URL as Optuna takes it (`postgresql://…`, `sqlite:///…`).
            name: Name of the study within the storage.
                shared, lease_seconds: See the class.
            begun: The study has had runs, so that it must be there.

        Raises:
            InputError: the storage cannot be opened, or what is in it cannot be read, or nothing is there of a study
                that has begun.
        """
        location = os.fspath(location)
        study = open_study(location, name, begun=begun)
        try:
            return cls(study, location, shared=shared, lease_seconds=lease_seconds)
        except LoraPlusError as error:
            raise InputError(str(error)) from None
        except Exception as error:
            raise InputError(f"cannot open the study {without_password(location)}: {reason(error, location)}") from None

    def stop_waiting_if(self, interrupted: Callable[[], bool]) -> None:
        """A server that is away is not waited for any more once this holds."""
        self._storage.interrupted = interrupted

    def records(self) -> dict[str, Record]:
        """Finished runs by the key of their trial, diverged ones included, as of the last `refresh`."""
        return dict(self._records)

    def elsewhere(self) -> list[Any]:
        """Runs that other processes had under way at the last `refresh`."""
        trials = map(trial_of_frozen, self._others)
        return [trial for trial in trials if trial.key not in self._records]

    def refresh(self) -> None:
        """Looks what other processes have done, closes what dead ones left, and renews the heartbeats of this one."""
        with self._reachable():
            if self.shared and self._leases.beat_is_due():
                self._beat()
            self._others = []
            own = set(self._running.values())
            for frozen in self._trials():
                if frozen.state.is_finished():
                    self._take(frozen)
                elif frozen._trial_id not in own and not self._closed_as_dead(frozen):
                    self._others.append(frozen)
            self._leases.forget_all_but(frozen.number for frozen in self._others)

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

    def start(self, trial: Keyed) -> bool:
        """Claims a run for this process and notes that it is under way.

        Returns:
            False if another process has the run under way or has finished it.
        """
        if self.shared:
            self.refresh()
            if trial.key in self._records:  # what a killed process had written its outcome of, say
                return False
        self._add(trial)
        if not self.shared:
            return True
        self.refresh()
        if trial.key in self._records or self._is_claimed_before(trial.key):
            self.abandon(trial)
            return False
        return True

    def progress(self, trial: Keyed, step: int, value: float) -> None:
        """Adds one evaluation of a run under way to its curve."""
        reported = self._reported.get(trial.key)
        if reported is not None and step not in reported:
            with self._reachable(), contextlib.suppress(UpdateFinishedTrialError):
                self._storage.set_trial_intermediate_value(self._running[trial.key], step, value)
            reported.add(step)

    def finish(self, record: Record) -> None:
        """Stores the outcome of a run, unless one is stored by now; from here on `records` has the one that is."""
        trial = record.trial
        self.refresh()
        while trial.key not in self._records:
            with self._reachable():
                self._write(record)
                self._settle(trial.key)
            self.refresh()
        self.abandon(trial)

    def abandon(self, trial: Keyed) -> None:
        """Marks a run under way as cut short; it will be done again."""
        trial_id = self._running.pop(trial.key, None)
        self._reported.pop(trial.key, None)
        if trial_id is not None:
            with self._reachable():
                if not self._storage.get_trial(trial_id).state.is_finished():
                    self._prune(trial_id)

    def _add(
        self, trial: Keyed, outcome: Mapping[str, Any] | None = None, curve: Mapping[int, float] | None = None
    ) -> None:
        """Adds a trial that is under way, with its outcome if it has one."""
        template = frozen_trial(trial, TrialState.RUNNING, {KEY: trial.key, BEAT: 0, **(outcome or {})}, curve)
        with self._reachable():
            self._running[trial.key] = self._storage.create_new_trial(self._study_id, template_trial=template)
        self._reported[trial.key] = set()

    def _write(self, record: Record) -> None:
        """Writes an outcome into the run's open trial; into a new one if it has none, or another process closed it."""
        trial = record.trial
        outcome, curve = outcome_of(record), curve_of(record)
        if trial.key in self._running:
            with contextlib.suppress(UpdateFinishedTrialError):
                for step, value in curve.items():
                    self.progress(trial, step, value)
                for name, value in outcome.items():  # the record last: from then on the trial has an outcome
                    self._storage.set_trial_user_attr(self._running[trial.key], name, value)
                return
        self._add(trial, outcome, curve)

    def _settle(self, key: str) -> None:
        """Closes the trials of a run in their order: the first that has an outcome keeps it."""
        decided = False
        for frozen in self._trials():
            if _key(frozen) != key:
                continue
            if not frozen.state.is_finished():
                self._end(frozen, keep=not decided)
                frozen = self._storage.get_trial(frozen._trial_id)  # as it ended, whoever was faster
            decided = decided or _counts(frozen)

    def _end(self, frozen: FrozenTrial, *, keep: bool) -> None:
        """Closes a trial: with its outcome if it has one to keep, as pruned otherwise."""
        if not (keep and RECORD in frozen.user_attrs):
            self._prune(frozen._trial_id)
            return
        value = self._outcome(frozen).value
        with contextlib.suppress(UpdateFinishedTrialError):
            if value is None:
                self._storage.set_trial_state_values(frozen._trial_id, TrialState.FAIL)
            else:
                self._storage.set_trial_state_values(frozen._trial_id, TrialState.COMPLETE, [value])

    def _prune(self, trial_id: int) -> None:
        with contextlib.suppress(UpdateFinishedTrialError):
            self._storage.set_trial_state_values(trial_id, TrialState.PRUNED)

    def _trials(self) -> list[FrozenTrial]:
        return self._storage.get_all_trials(self._study_id, deepcopy=False)

    def _take(self, frozen: FrozenTrial) -> None:
        """Keeps the record of a closed trial that counts; of two in a study of an earlier version the first does."""
        if _counts(frozen) and _key(frozen) not in self._records:
            record = self._outcome(frozen)
            self._records.setdefault(record.trial.key, record)

    def _outcome(self, frozen: FrozenTrial) -> Record:
        """The outcome of a trial's run.

        Raises:
            InputError: it is damaged.
        """
        try:
            return restored(frozen.user_attrs[RECORD])
        except ValueError as error:
            raise InputError(
                f"trial {frozen.number} of the study in {without_password(self._location)} is damaged: {error}; put "
                "a copy of the study in its place, or start another one"
            ) from None

    def _is_claimed_before(self, key: str) -> bool:
        """Whether another process has the run under way and claimed it before this one did."""
        return any(_key(frozen) == key and frozen._trial_id < self._running[key] for frozen in self._others)

    def _closed_as_dead(self, frozen: FrozenTrial) -> bool:
        if self._is_claim(frozen) and self._leases.is_alive(frozen.number, frozen.user_attrs.get(BEAT, 0)):
            return False
        self._close_for_another(frozen)
        return True

    def _is_claim(self, frozen: FrozenTrial) -> bool:
        """Whether a trial names its run. One without a name comes from a damaged journal."""
        try:
            return trial_of_frozen(frozen).key == _key(frozen)
        except (KeyError, TypeError, ValueError):
            return False

    def _beat(self) -> None:
        self._beats += 1
        for trial_id in self._running.values():
            with contextlib.suppress(UpdateFinishedTrialError):
                self._storage.set_trial_user_attr(trial_id, BEAT, self._beats)

    def _close_unfinished(self) -> None:
        for frozen in self._trials():
            if not frozen.state.is_finished():
                self._close_for_another(frozen)

    def _close_for_another(self, frozen: FrozenTrial) -> None:
        """Closes a trial whose process is gone, with its outcome if that had been written."""
        key = _key(frozen)
        if key is None or RECORD not in frozen.user_attrs:
            self._end(frozen, keep=True)
        else:
            self._settle(key)

    def _check(self, name: str, values: Mapping[str, Any], problem: str) -> None:
        with self._reachable():
            before = self._storage.get_study_user_attrs(self._study_id).get(name)
            if before is None:
                self._storage.set_study_user_attr(self._study_id, name, json.loads(json.dumps(dict(values))))
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


def _key(frozen: FrozenTrial) -> str | None:
    return frozen.user_attrs.get(KEY)


def _counts(frozen: FrozenTrial) -> bool:
    """Whether a closed trial has an outcome. A pruned one may have written its record a moment too late."""
    return frozen.state != TrialState.PRUNED and RECORD in frozen.user_attrs
