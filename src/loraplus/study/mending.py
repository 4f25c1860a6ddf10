"""Writes a damaged journal anew from its whole lines, so that every outcome stays with its run.

A journal has one operation a line. Lines that create trials number them by their order, and later lines use these
numbers. If such a line is lost, all later trials would get the outcomes of others. But every outcome names its run, so
the journal is written anew from its outcomes, and runs without one are done again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optuna.storages import JournalStorage
from optuna.storages.journal import BaseJournalBackend
from optuna.storages.journal._storage import JournalOperation, JournalStorageReplayResult
from optuna.study import StudyDirection
from optuna.trial import TrialState

from loraplus.errors import InputError, one_line
from loraplus.files.parsing import ParseError, parse_json
from loraplus.study.optuna_trials import curve_of, frozen_trial, outcome_of
from loraplus.study.records import KEY, RECORD, Record, restored

Operation = dict[str, Any]

_CODES = frozenset(map(int, JournalOperation))
_OF_STUDY = range(JournalOperation.DELETE_STUDY, JournalOperation.CREATE_TRIAL + 1)
_OF_TRIAL = range(JournalOperation.SET_TRIAL_PARAM, JournalOperation.SET_TRIAL_SYSTEM_ATTR + 1)
_ENDS = JournalOperation.SET_TRIAL_STATE_VALUES
_OURS = {KEY, RECORD, "phase", "params"}
_LONGEST_REASON = 80


@dataclass(frozen=True)
class Mended:
    """A journal put together again.

    Args:
        content: Of the file.
        passed_over: (line, from 1; what is wrong with it).
        finished: Runs of the study that have an outcome.
    """

    content: bytes
    passed_over: list[tuple[int, str]]
    finished: int


def operation(line: bytes) -> Operation | str:
    """The operation that a line holds, or what is wrong with it."""
    try:
        op = parse_json(line.decode())
    except UnicodeDecodeError:
        return "not UTF-8"
    except ParseError as error:
        return one_line(error, _LONGEST_REASON)
    if not isinstance(op, dict):
        return "not an operation"
    code = op.get("op_code")
    if not _is_number(code) or code not in _CODES:
        return "not an operation that there is"
    whole = isinstance(op.get("worker_id"), str)
    whole &= code != JournalOperation.CREATE_STUDY or {"study_name", "directions"} <= op.keys()
    whole &= code not in _OF_STUDY or _is_number(op.get("study_id"))
    whole &= code not in _OF_TRIAL or _is_number(op.get("trial_id"))
    for name in ("user_attr", "system_attr", "user_attrs"):
        whole &= isinstance(op.get(name, {}), dict)
    return op if whole else "an operation that lacks something"


def mended(path: Path, content: bytes, study: str) -> Mended | None:
    """What a journal should hold; None if it is whole.

    Args:
        path: Of the journal, for messages.
        content: Of the journal.
        study: The study that is wanted.

    Raises:
        InputError: the lines that name the studies are lost, or a study is another program's.
    """
    lines = [operation(line) for line in content.splitlines()]
    ops = {number: op for number, op in enumerate(lines, 1) if isinstance(op, dict)}
    bad = {number: op for number, op in enumerate(lines, 1) if isinstance(op, str)}
    outcomes: dict[int, Record] = {}
    for number, op in ops.items():
        if (data := _outcome(op)) is not None:
            try:
                outcomes[number] = restored(data)
            except ValueError as error:
                bad[number] = one_line(error, _LONGEST_REASON)
    if not bad:
        astray = _astray(ops, outcomes)
        if not astray:
            return None
        bad = astray if len(astray) == 1 else {}  # several: a line before them is missing
    studies = _studies(path, ops, bad, study)
    of_worker = {_process(op): op["study_id"] for op in ops.values() if op.get("study_id") in studies}
    ends = {op["trial_id"]: op.get("state") for op in ops.values() if op["op_code"] == _ENDS}
    for number in sorted(outcomes, key=lambda number: _precedence(number, ops[number], ends)):
        of_study = studies[of_worker.get(_process(ops[number]), min(studies))]
        of_study.outcomes.setdefault(outcomes[number].trial.key, outcomes[number])
    kept = [known for known in studies.values() if not known.deleted]
    if foreign := next((known for known in kept if known.trials and not (known.ours or known.outcomes)), None):
        raise InputError(
            f"{path} is damaged and holds the study {foreign.name!r} of another program, which cannot be mended here; "
            "put a copy of the file in its place, or start again with another one"
        )
    finished = sum(len(known.outcomes) for known in kept if known.name == study)
    return Mended(_written(kept), sorted(bad.items()), finished)


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _outcome(op: Mapping[str, Any]) -> Any:
    return op.get("user_attr", {}).get(RECORD) or op.get("user_attrs", {}).get(RECORD)


def _astray(ops: Mapping[int, Operation], outcomes: Mapping[int, Record]) -> dict[int, str]:
    """Lines that do not fit the lines before them, or that hold the outcome of another trial's run."""
    replay, reasons = JournalStorageReplayResult(""), {}
    for number, op in ops.items():
        try:
            if op["op_code"] in _OF_TRIAL and op["trial_id"] not in replay._trials:
                raise ValueError(f"of trial {op['trial_id']}, which is not there")
            if number in outcomes:
                trial = replay._trials.get(op.get("trial_id", -1))
                key = outcomes[number].trial.key
                expected = (trial.user_attrs if trial else op.get("user_attrs", {})).get(KEY)
                if expected not in (None, key):
                    raise ValueError(f"the outcome of {key} in a trial of {expected}")
            replay.apply_logs([op])
        except Exception as error:  # whatever Optuna meets with in a line that is not one of its own
            said = error if isinstance(error, ValueError) else f"not an operation that fits here: {error!r}"
            reasons[number] = one_line(said, _LONGEST_REASON)
    return reasons


def _process(op: Operation) -> str:
    """Who wrote a line; Optuna adds the thread. Each works on one study."""
    return op["worker_id"].rpartition("-")[0]


def _precedence(number: int, op: Operation, ends: Mapping[int, Any]) -> tuple[int, int]:
    """Sorts the outcomes of one run, of which the first counts: those of trials closed with them, then by order."""
    trial = op.get("trial_id")  # none where the line that creates a trial holds its outcome
    state = ends.get(trial) if trial is not None else None
    closed_with_it = state in (TrialState.COMPLETE, TrialState.FAIL)
    return 0 if closed_with_it else 2 if state == TrialState.PRUNED else 1, number if trial is None else trial


@dataclass
class _Study:
    """What is known of one study."""

    name: str
    directions: list[int]
    attributes: list[Operation] = field(default_factory=list)
    outcomes: dict[str, Record] = field(default_factory=dict)
    trials: int = 0
    ours: bool = False
    deleted: bool = False


def _studies(path: Path, ops: Mapping[int, Operation], bad: dict[int, str], wanted: str) -> dict[int, _Study]:
    """The studies by number; the line that names one is put back if it was the only one.

    Raises:
        InputError: several lines that name studies are lost.
    """
    studies: dict[int, _Study] = {}
    for op in ops.values():
        if op["op_code"] == JournalOperation.CREATE_STUDY:
            if op["study_name"] not in {known.name for known in studies.values() if not known.deleted}:
                studies[len(studies)] = _Study(op["study_name"], op["directions"])
        elif op["op_code"] == JournalOperation.DELETE_STUDY and op["study_id"] in studies:
            studies[op["study_id"]].deleted = True
    used = {number: op for number, op in ops.items() if op["op_code"] in _OF_STUDY}
    if not studies and {op["study_id"] for op in used.values()} <= {0}:
        studies[0] = _Study(wanted, [StudyDirection.MINIMIZE])
    unknown = [number for number, op in used.items() if op["study_id"] not in studies]
    if len(unknown) > 1:
        raise InputError(
            f"{path} is damaged: lines that name its studies are lost (such as line {min(bad, default=1)}), so its "
            "runs cannot be told apart; put a copy of the file in its place, or start again with another one"
        )
    bad |= dict.fromkeys(unknown, "of a study that is not there")
    for number, op in used.items():
        if number in unknown:
            continue
        study = studies[op["study_id"]]
        if op["op_code"] == JournalOperation.CREATE_TRIAL:
            study.trials += 1
            study.ours |= not _OURS.isdisjoint(op.get("user_attrs", {}))
        else:
            study.attributes.append(op)
    return studies


class _Lines(BaseJournalBackend):
    """A journal in memory."""

    def __init__(self) -> None:
        self.lines: list[Operation] = []

    def read_logs(self, log_number_from: int) -> Iterable[Operation]:
        return iter(self.lines[log_number_from:])

    def append_logs(self, logs: Sequence[Operation]) -> None:
        self.lines += logs


def _written(studies: Iterable[_Study]) -> bytes:
    """A journal that holds these studies."""
    journal = _Lines()
    storage = JournalStorage(journal)
    for study in studies:
        number = storage.create_new_study([StudyDirection(way) for way in study.directions], study.name)
        for op in study.attributes:
            for name, value in op.get("user_attr", {}).items():
                storage.set_study_user_attr(number, name, value)
        for record in study.outcomes.values():
            state = TrialState.FAIL if record.value is None else TrialState.COMPLETE
            attributes = {KEY: record.trial.key, **outcome_of(record)}
            template = frozen_trial(record.trial, state, attributes, curve_of(record), record.value)
            storage.create_new_trial(number, template)
    return "".join(json.dumps(op, separators=(",", ":")) + "\n" for op in journal.lines).encode()
