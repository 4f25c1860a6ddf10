"""Finds what of a damaged journal is whole, and puts it together so that every outcome stays with its run.

A journal is one operation a line. Trials are numbered by the order of the lines that create them, and later lines name
them by number: where such a line is lost, all later trials would come by the outcomes of others. So each is given the
number that the lines about it bear out: they come after it, from the same process, and an outcome tells its run.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optuna.storages.journal._storage import JournalOperation, JournalStorageReplayResult
from optuna.trial import FrozenTrial, TrialState

from loraplus.errors import InputError, one_line
from loraplus.files.parsing import ParseError, parse_json
from loraplus.study.format import KEY, RECORD

KeyOf = Callable[[Any], str]
"""The key of the run that a stored outcome belongs to; raises if the outcome cannot be read."""
Operation = dict[str, Any]

_CODES = frozenset(map(int, JournalOperation))
_OF_STUDY = range(JournalOperation.DELETE_STUDY, JournalOperation.CREATE_TRIAL + 1)
_OF_TRIAL = range(JournalOperation.SET_TRIAL_PARAM, JournalOperation.SET_TRIAL_SYSTEM_ATTR + 1)
_OF_OWNER = (JournalOperation.SET_TRIAL_INTERMEDIATE_VALUE, JournalOperation.SET_TRIAL_USER_ATTR)
_MOST_LOST = 500
_CONFLICT, _GAP = 10, 1
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
        found = parse_json(line.decode())
    except UnicodeDecodeError:
        return "not UTF-8"
    except ParseError as error:
        return one_line(error, _LONGEST_REASON)
    if not isinstance(found, dict):
        return "not an operation"
    code = found.get("op_code")
    if not _is_number(code) or code not in _CODES:
        return "not an operation that there is"
    whole = isinstance(found.get("worker_id"), str)
    whole &= code not in _OF_STUDY or _is_number(found.get("study_id"))
    whole &= code not in _OF_TRIAL or _is_number(found.get("trial_id"))
    for name in ("user_attr", "system_attr", "user_attrs"):
        whole &= isinstance(found.get(name, {}), dict)
    return found if whole else "an operation that lacks something"


def mended(path: Path, content: bytes, study: str, key_of: KeyOf | None) -> Mended | None:
    """What a journal should hold; None if it is whole.

    Args:
        path: Of the journal, for messages.
        content: Of the journal.
        study: The study whose outcomes `key_of` can read.
        key_of: See `KeyOf`. Default: outcomes are not looked into.

    Raises:
        InputError: which studies there were cannot be told any more.
    """
    lines = [operation(line) for line in content.splitlines()]
    return _Mending(path, lines, study, key_of).result()


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _process(op: Operation) -> str:
    """Who wrote a line; Optuna adds the thread."""
    return op["worker_id"].rpartition("-")[0]


def _outcome(op: Mapping[str, Any]) -> Any:
    return op.get("user_attr", {}).get(RECORD) or op.get("user_attrs", {}).get(RECORD)


@dataclass
class _Traces:
    """What the lines about one trial number tell of its trial."""

    first: int
    worker: str | None = None
    key: str | None = None
    has_outcome: bool = False


@dataclass
class _Mending:
    path: Path
    lines: Sequence[Operation | str]
    study: str
    key_of: KeyOf | None
    passed_over: dict[int, str] = field(default_factory=dict)
    out: list[Operation] = field(default_factory=list)
    homeless: dict[int, str] = field(default_factory=dict)
    keys: dict[int, tuple[str | None, str]] = field(default_factory=dict)

    def result(self) -> Mended | None:
        ops = {number: op for number, op in enumerate(self.lines, 1) if isinstance(op, dict)}
        self.passed_over = {number: op for number, op in enumerate(self.lines, 1) if isinstance(op, str)}
        before = len(ops)
        added = self.name_study(ops)
        traces = self.traces(ops)
        creations = {n: op for n, op in ops.items() if op["op_code"] == JournalOperation.CREATE_TRIAL}
        numbers = self.true_numbers(creations, traces)
        replay = self.replay(ops, dict(zip(creations, numbers, strict=True)), traces)
        if not self.passed_over and not added and len(self.out) == before and numbers == list(range(len(numbers))):
            return None
        self.passed_over = self.passed_over or self.homeless
        self.close(replay)
        content = "".join(json.dumps(op, separators=(",", ":")) + "\n" for op in self.out)
        finished = {self.key(trial) for trial in self.trials(replay) if RECORD in trial.user_attrs}
        return Mended(content.encode(), sorted(self.passed_over.items()), len(finished))

    def name_study(self, ops: dict[int, Operation]) -> bool:
        """Puts back the line that names the study if it was the only one; returns whether it did.

        Raises:
            InputError: there were several, so nobody can tell which line names which.
        """
        named = JournalStorageReplayResult("")
        known = 0
        for op in ops.values():
            if op["op_code"] in (JournalOperation.CREATE_STUDY, JournalOperation.DELETE_STUDY):
                with contextlib.suppress(Exception):  # `replay` comes to it again
                    named.apply_logs([op])
                known = named._next_study_id
        unknown = [n for n, op in ops.items() if op["op_code"] in _OF_STUDY and op["study_id"] >= known]
        if not known and unknown and all(ops[n]["study_id"] == 0 for n in unknown):
            worker = ops[unknown[0]]["worker_id"]
            op = {"op_code": int(JournalOperation.CREATE_STUDY), "worker_id": worker, "study_name": self.study}
            rest = dict(ops)
            ops.clear()
            ops.update({0: {**op, "directions": [1]}, **rest})
            return True
        if len(unknown) > 1:
            raise InputError(
                f"{self.path} is damaged: lines that name its studies are lost (such as line "
                f"{min(self.passed_over, default=1)}), so its runs cannot be told apart; put a copy of the file in its "
                "place, or start again with another one"
            )
        for number in unknown:
            self.passed_over[number] = "of a study that is not there"
            del ops[number]
        return False

    def traces(self, ops: Mapping[int, Operation]) -> dict[int, _Traces]:
        found: dict[int, _Traces] = {}
        for number, op in ops.items():
            if op["op_code"] not in _OF_TRIAL:
                continue
            trace = found.setdefault(op["trial_id"], _Traces(number))
            if op["op_code"] in _OF_OWNER:
                trace.worker = trace.worker or _process(op)
            if (outcome := _outcome(op)) is not None:
                trace.has_outcome = True
                trace.key = self.key_or_none(outcome)
        return found

    def key_or_none(self, outcome: Any) -> str | None:
        """The key of an outcome that can be read; each is read once, since it may be large."""
        if id(outcome) not in self.keys:
            try:
                self.keys[id(outcome)] = (self.key_of(outcome) if self.key_of else None, "")
            except Exception as error:  # whatever a damaged outcome, or one of another study, meets with
                self.keys[id(outcome)] = (None, str(error) or repr(error))
        return self.keys[id(outcome)][0]

    def true_numbers(self, creations: Mapping[int, Operation], traces: Mapping[int, _Traces]) -> list[int]:
        """The numbers that trials had when their lines were written: rising, with the fewest contradictions and gaps.

        Dynamic programming over the lines that create trials; the state is how many such lines are lost before.
        """

        def contradictions(line: int, op: Operation, number: int) -> int:
            trace, key = traces.get(number), op.get("user_attrs", {}).get(KEY)
            if trace is None:
                return 0
            other_worker = trace.worker is not None and trace.worker != _process(op)
            return (trace.first < line) + other_worker + (None not in (trace.key, key) and trace.key != key)

        count = len(creations)
        beyond = sum(number >= count for number in traces)
        if not beyond and not self.passed_over:
            return list(range(count))
        lost = range(min(beyond + len(self.passed_over) + 1, _MOST_LOST))
        costs, choices = [_GAP * shift for shift in lost], []
        for number, (line, op) in enumerate(creations.items()):
            best, cheapest, chosen = 0, [], []
            for shift in lost:
                if costs[shift] - _GAP * shift < costs[best] - _GAP * best:
                    best = shift
                chosen.append(best)
                gaps = costs[best] + _GAP * (shift - best)
                cheapest.append(gaps + _CONFLICT * contradictions(line, op, number + shift))
            costs = cheapest
            choices.append(chosen)
        # A number beyond the last one is lost as well, or is none; both leave the others as they are.
        shift = min(lost, key=lambda s: costs[s])
        numbers = []
        for number in reversed(range(count)):
            numbers.append(number + shift)
            shift = choices[number][shift]
        return numbers[::-1]

    def replay(
        self, ops: Mapping[int, Operation], true: Mapping[int, int], traces: Mapping[int, _Traces]
    ) -> JournalStorageReplayResult:
        """Carries out what is whole under new numbers, which `out` has then."""
        replay = JournalStorageReplayResult("")
        places: dict[int, int] = {}
        claimed = set(true.values())
        studies = {op["worker_id"]: op["study_id"] for n, op in ops.items() if n in true}
        for line, op in ops.items():
            if line in true:
                places[true[line]] = len(replay._trials)
            elif op["op_code"] in _OF_TRIAL:
                number = op["trial_id"]
                if number not in places and number not in claimed and traces[number].has_outcome:
                    self.homeless[line] = f"of trial {number}, which is not there"
                    places[number] = len(replay._trials)  # the line that created it is lost, its outcome is not
                    study = studies.get(op["worker_id"], next(iter(studies.values()), 0))
                    self.carry_out(replay, line, _creation(op["worker_id"], study))
                if number not in places:
                    self.passed_over[line] = f"of trial {number}, which is not there"
                    continue
                op = op | {"trial_id": places[number]}
            if not self.carry_out(replay, line, op) and line in true:
                del places[true[line]]
        return replay

    def carry_out(self, replay: JournalStorageReplayResult, line: int, op: Operation) -> bool:
        try:
            if _outcome(op) is not None:
                self.check_outcome(replay, op)
            replay.apply_logs([op])
        except Exception as error:  # whatever Optuna meets with in a line that is not one of its own
            said = error if isinstance(error, ValueError) else f"not an operation of Optuna's: {error!r}"
            self.passed_over[line] = one_line(said, _LONGEST_REASON)
            return False
        self.out.append(op)
        return True

    def check_outcome(self, replay: JournalStorageReplayResult, op: Operation) -> None:
        """Raises unless the outcome can be read and is of its trial's run; outcomes of other studies count as right."""
        trial = replay._trials.get(op.get("trial_id", -1))
        if self.key_of is None:
            return
        study = op["study_id"] if trial is None else replay._trial_id_to_study_id[trial._trial_id]
        if replay.get_study(study).study_name != self.study:
            return
        attributes = op.get("user_attrs", {}) if trial is None else trial.user_attrs
        key, expected = self.key_or_none(_outcome(op)), attributes.get(KEY)
        if problem := self.keys[id(_outcome(op))][1]:
            raise ValueError(problem)
        if expected not in (None, key):
            raise ValueError(f"the outcome of {key} in a trial of {expected}")

    def trials(self, replay: JournalStorageReplayResult) -> list[FrozenTrial]:
        """Those of the study, in order."""
        found = [study for study in replay.get_all_studies() if study.study_name == self.study]
        return [trial for study in found for trial in replay.get_all_trials(study._study_id, None)]

    def key(self, trial: FrozenTrial) -> str | None:
        return trial.user_attrs.get(KEY) or self.key_or_none(trial.user_attrs.get(RECORD))

    def close(self, replay: JournalStorageReplayResult) -> None:
        """Opens the trial again whose end is lost: an outcome is pruned only where the run has another one."""
        counted = {self.key(t) for t in self.trials(replay) if RECORD in t.user_attrs and t.state != TrialState.PRUNED}
        again = set()
        for trial in self.trials(replay):
            if RECORD in trial.user_attrs and self.key(trial) not in counted:
                counted.add(self.key(trial))
                again.add(trial._trial_id)
        ends = JournalOperation.SET_TRIAL_STATE_VALUES
        self.out = [op for op in self.out if op["op_code"] != ends or op["trial_id"] not in again]


def _creation(worker: str, study: int) -> Operation:
    """The line that creates a trial of which only the outcome is known."""
    return {"op_code": int(JournalOperation.CREATE_TRIAL), "worker_id": worker, "study_id": study,
            "datetime_start": None, "state": int(TrialState.RUNNING)}  # fmt: skip
