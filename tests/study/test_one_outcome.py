"""A run has one outcome: whatever processes do to it in whatever order, all read the same, and it never changes."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from optuna.storages import JournalStorage
from optuna.storages.journal import BaseJournalBackend
from optuna.trial import TrialState

from loraplus.study.optuna_trials import frozen_trial
from loraplus.study.records import CurvePoint, Record, Trial
from loraplus.study.storage import open_study
from loraplus.study.store import StudyStore

TRIAL = Trial("tuning", "loraplus", 2.5e-4, 16.0, 0, 100)
ANOTHER = replace(TRIAL, lr=1e-3)
FOREVER, AT_ONCE = 1e9, -1.0  # leases: every other process is alive, or dead


def outcome(loss: float, trial: Trial = TRIAL, status: str = "done") -> Record:
    return Record(trial, status, 100, loss, 0.9, 0.1, (CurvePoint(50, 0.6, 0.7), CurvePoint(100, loss, 0.9)))


def shared(location: str, lease_seconds: float = FOREVER) -> StudyStore:
    return StudyStore.open(location, "s", shared=True, lease_seconds=lease_seconds)


@pytest.fixture(params=["journal", "sqlite", "postgresql"])
def locations(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], str]:
    """Gives a place for an empty study whenever it is called."""
    count = itertools.count()
    if request.param == "postgresql":
        url = request.getfixturevalue("postgresql_url")

        def on_server() -> str:
            storage = open_study(url, "s")._storage
            storage.delete_study(storage.get_study_id_from_name("s"))
            return url

        return on_server
    if request.param == "sqlite":
        pytest.importorskip("sqlalchemy")
        return lambda: f"sqlite:///{tmp_path / f'{next(count)}.db'}"
    return lambda: str(tmp_path / f"{next(count)}.journal")


def all_read(location: str, *stores: StudyStore) -> Record:
    """What everybody reads of the run, who must agree."""
    for store in stores:
        store.refresh()
    (read, *others) = [store.records()[TRIAL.key] for store in (*stores, shared(location))]
    assert all(other == read for other in others)
    with_value = [t for t in open_study(location, "s").trials if t.state in (TrialState.COMPLETE, TrialState.FAIL)]
    assert len(with_value) == 1, "Optuna sees one outcome, too"
    return read


def taken_over(location: str) -> tuple[StudyStore, StudyStore]:
    """A process that is only asleep, and the one that took it for dead and has its run under way."""
    late, successor = shared(location), shared(location, AT_ONCE)
    assert late.start(TRIAL)
    successor.refresh()
    assert successor.start(TRIAL)
    return late, successor


@pytest.mark.parametrize("status", ["done", "diverged"])
def test_the_first_outcome_that_is_stored_counts_even_a_late_process_s(locations: Callable[[], str], status: str):
    location = locations()
    late, successor = taken_over(location)
    first = outcome(0.7, status=status)
    late.finish(first)
    assert late.records() == shared(location).records() == {TRIAL.key: first}, "stored, and not only remembered"
    successor.finish(outcome(0.5))
    assert all_read(location, late, successor) == first
    (shown,) = (t for t in open_study(location, "s").trials if t.state != TrialState.PRUNED)
    assert shown.params == {"lr": 2.5e-4, "lr_ratio": 16.0} and shown.intermediate_values == {50: 0.6, 100: 0.7}
    assert shown.value == (0.7 if status == "done" else None)


def test_a_successor_that_is_faster_keeps_its_outcome(locations: Callable[[], str]):
    location = locations()
    late, successor = taken_over(location)
    successor.finish(outcome(0.5))
    late.finish(outcome(0.7))
    assert all_read(location, late, successor) == outcome(0.5)
    assert len(open_study(location, "s").trials) == 2, "a late outcome leaves no trial"


def test_an_outcome_that_comes_between_another_s_look_and_its_close_counts(locations: Callable[[], str]):
    location = locations()
    late, successor = taken_over(location)
    successor._leases.lease_seconds = FOREVER
    prune = late._prune

    def after_the_successor_s_close(trial_id: int) -> None:
        successor._prune = lambda other: None  # type: ignore[method-assign]  # it is killed before it does
        successor.finish(outcome(0.5))
        prune(trial_id)

    late._prune = after_the_successor_s_close  # type: ignore[method-assign]
    late.finish(outcome(0.7))
    assert all_read(location, late, successor) == outcome(0.5)


def test_a_process_that_goes_on_after_a_late_outcome_decides_on_it(locations: Callable[[], str]):
    location = locations()
    late, successor = taken_over(location)
    late.finish(outcome(0.7))
    successor.refresh()
    assert successor.records() == {TRIAL.key: outcome(0.7)} and successor.elsewhere() == []
    third = shared(location, AT_ONCE)
    assert not third.start(TRIAL)
    assert third.start(ANOTHER)
    third.finish(outcome(0.3, ANOTHER))
    successor.finish(outcome(0.5))
    late.refresh()
    assert late.records() == {TRIAL.key: outcome(0.7), ANOTHER.key: outcome(0.3, ANOTHER)}


def test_a_study_taken_up_again_while_its_earlier_process_lives_has_one_outcome(locations: Callable[[], str]):
    location = locations()
    asleep = StudyStore.open(location, "s")
    assert asleep.start(TRIAL)
    resumed = StudyStore.open(location, "s")
    assert resumed.start(TRIAL)
    asleep.finish(outcome(0.7))
    resumed.finish(outcome(0.5))
    assert all_read(location, asleep, resumed) == outcome(0.7)


def orders(counts: list[int]) -> Iterator[tuple[int, ...]]:
    """All ways to lay sequences of these lengths into one."""
    yield from sorted(set(itertools.permutations([who for who, count in enumerate(counts) for _ in range(count)])))


def test_whoever_starts_and_finishes_in_whatever_order_all_decide_on_the_same(locations: Callable[[], str]):
    """Each of two processes starts, takes the other for dead, and finishes: 10 orders."""
    location = locations()
    stores = [shared(location, AT_ONCE), shared(location, AT_ONCE)]
    for seed, order in enumerate(order for order in orders([3, 3]) if order[0] == 0):
        trial = replace(TRIAL, seed=seed)
        steps = [iter(steps_of(store, trial, loss)) for store, loss in zip(stores, (0.7, 0.5), strict=True)]
        seen: set[float] = set()
        for who in order:
            next(steps[who])()
            seen |= {store.records()[trial.key].eval_loss for store in stores if trial.key in store.records()}
        assert len(seen) == 1, order
    for store in stores:
        store.refresh()
    assert stores[0].records() == stores[1].records() == shared(location).records()


def steps_of(store: StudyStore, trial: Trial, loss: float) -> list[Callable[[], object]]:
    return [lambda: store.start(trial), store.refresh, lambda: store.finish(outcome(loss, trial))]


def test_processes_that_finish_at_the_same_moment_read_the_same(locations: Callable[[], str]):
    location = locations()
    stores = [shared(location, AT_ONCE) for _ in range(4)]
    for attempt in range(3):
        trial = replace(TRIAL, seed=attempt)
        for store in stores:
            store.start(trial)
        with ThreadPoolExecutor(len(stores)) as pool:
            list(pool.map(lambda at, t=trial: stores[at].finish(outcome(0.1 * at, t)), range(len(stores))))
        for store in stores:
            store.refresh()
        assert len({store.records()[trial.key].eval_loss for store in stores}) == 1
    counted = [t for t in open_study(location, "s").trials if t.state == TrialState.COMPLETE]
    assert len(counted) == 3 and all(t.state.is_finished() for t in open_study(location, "s").trials)


# Operations of one storage, interleaved one by one.


class Memory(BaseJournalBackend):
    """A journal in a list, which several storages can share."""

    def __init__(self) -> None:
        self.lines: list[dict] = []

    def read_logs(self, log_number_from: int):
        return iter(self.lines[log_number_from:])

    def append_logs(self, logs: list[dict]) -> None:
        self.lines += [dict(line) for line in logs]


class Turns:
    """Lets one thread do one operation at a time, in an order given; who has finished is passed over."""

    def __init__(self, order: list[int], players: int) -> None:
        self._order, self._waiting = itertools.chain(order, itertools.cycle(range(players))), set(range(players))
        self._changed = threading.Condition()
        self._now = self._next()
        self.after: Callable[[], None] = lambda: None

    def _next(self) -> int | None:
        return next((who for who in self._order if who in self._waiting), None) if self._waiting else None

    def take(self, who: int, operation: Callable):
        with self._changed:
            assert self._changed.wait_for(lambda: self._now == who, timeout=30)
            try:
                return operation()
            finally:
                self.after()
                self._now = self._next()
                self._changed.notify_all()

    def leave(self, who: int) -> None:
        with self._changed:
            self._waiting.discard(who)
            if self._now == who:
                self._now = self._next()
            self._changed.notify_all()


class OneByOne:
    """A storage whose operations wait for their turn."""

    def __init__(self, storage: JournalStorage, turns: Turns, who: int) -> None:
        self._storage, self._turns, self._who = storage, turns, who

    def __getattr__(self, name: str):
        method = getattr(self._storage, name)
        return lambda *args, **options: self._turns.take(self._who, lambda: method(*args, **options))


def in_memory(backend: Memory, lease_seconds: float) -> StudyStore:
    study = optuna.create_study(storage=JournalStorage(backend), study_name="s", load_if_exists=True)
    return StudyStore(study, shared=True, lease_seconds=lease_seconds)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    order=st.lists(st.integers(0, 2), max_size=120),
    leases=st.lists(st.sampled_from([AT_ONCE, FOREVER]), min_size=3, max_size=3),
    claims=st.lists(st.booleans(), min_size=3, max_size=3),
)
def test_an_outcome_never_changes_once_it_was_read_however_three_processes_interleave(
    order: list[int], leases: list[float], claims: list[bool]
):
    backend = Memory()
    stores = [in_memory(backend, lease) for lease in leases]
    observer = in_memory(backend, FOREVER)
    turns, read = Turns(order, 3), []

    def observe() -> None:
        observer._records.clear()
        observer.refresh()
        read.extend(record.eval_loss for record in observer.records().values())

    turns.after = observe
    errors: list[BaseException] = []

    def process(who: int) -> None:
        try:
            if claims[who]:  # otherwise its outcome is known without a run
                stores[who].start(TRIAL)
            stores[who].finish(outcome(0.1 * (who + 1)))
        except BaseException as error:
            errors.append(error)
        finally:
            turns.leave(who)

    for who, store in enumerate(stores):
        store._storage = OneByOne(store._storage, turns, who)  # type: ignore[assignment]
    threads = [threading.Thread(target=process, args=(who,)) for who in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    observe()
    assert len(set(read)) == 1, "what was read first is read ever after"
    assert [store.records()[TRIAL.key].eval_loss for store in stores] == [read[0]] * 3
    finals = [trial for trial in observer._trials() if trial.state == TrialState.COMPLETE]
    assert len(finals) == 1 and all(trial.state.is_finished() for trial in observer._trials())


# Studies that earlier versions wrote.


def add(study: optuna.Study, state: TrialState, record: Record | None, **attributes: object) -> None:
    """A trial as earlier versions left it."""
    trial = TRIAL if record is None else record.trial
    attributes |= {} if record is None else {"record": record.to_dict()}
    value = record.eval_loss if record and state == TrialState.COMPLETE else None
    template = frozen_trial(trial, state, attributes, value=value)
    study._storage.create_new_trial(study._study_id, template_trial=template)


@pytest.mark.parametrize("open_shared", [False, True])
@pytest.mark.parametrize("keys", [True, False])  # the first versions noted none
def test_a_study_of_before_opens_with_the_records_it_had(locations: Callable[[], str], open_shared: bool, keys: bool):
    location = locations()
    study = open_study(location, "s")
    diverged = outcome(2.0, replace(TRIAL, lr=0.1), "diverged")
    half_written = outcome(0.6, replace(TRIAL, seed=3))
    for state, record in [
        (TrialState.FAIL, None),  # cut short
        (TrialState.COMPLETE, outcome(0.4)),
        (TrialState.FAIL, diverged),
        (TrialState.COMPLETE, outcome(0.9)),  # a second one of the same run
        (TrialState.RUNNING, half_written),  # killed before it was closed
    ]:
        add(study, state, record, **({"key": record.trial.key if record else TRIAL.key, "beat": 3} if keys else {}))
    store = StudyStore.open(location, "s", shared=open_shared, lease_seconds=AT_ONCE)
    store.refresh()
    assert store.records() == {r.trial.key: r for r in (outcome(0.4), diverged, half_written)}
    store.finish(outcome(0.1))
    assert StudyStore.open(location, "s").records() == store.records(), "finished runs stay as they are"
