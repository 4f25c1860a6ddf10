"""Does the runs of a plan in parallel processes. Finished runs are stored at once, and stored runs are not repeated.

The parent process decides, stores and reports; the workers train. Each worker is a fresh process (spawn: safe with
threads and with CUDA) that lives as long as the study, so models, tokenizers and data are loaded once per worker.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from loraplus.errors import InterruptedRun, LoraPlusError
from loraplus.files.scratch import scratch_folder
from loraplus.notices import acknowledge
from loraplus.study.records import Keyed, Record
from loraplus.study.store import StudyStore
from loraplus.study.worker import RunTrial, perform, set_up

Records = Mapping[str, Record]
"""Finished runs by key."""
JOURNAL_FILE = "study.journal"
LOG_FILE = "workers.log"
MOST_WORKERS_ON_CPU = 2
SECONDS_BETWEEN_LOOKS = 0.2
SECONDS_BETWEEN_REFRESHES = 1.0
SECONDS_TO_TERMINATE = 3.0


class StudyPlan(ABC):
    """What a study consists of; it holds no state, so that everything follows from the records."""

    @abstractmethod
    def done(self, records: Records) -> tuple[float, float]:
        """How much is done and how much there is in all, in runs of full length."""

    @abstractmethod
    def next(self, records: Records, running: Iterable[Any]) -> Any | None:
        """The run to start next, or None if nothing can start before one under way has finished."""

    def known(self, records: Records, trial: Any) -> Record | None:
        """The outcome of a run if a finished one of another name was the same training."""
        return None

    @property
    def full_length(self) -> int | None:
        """Steps of a run of full length, where runs differ in length."""
        return None


@dataclass(frozen=True)
class Event:
    """Something that a progress display may want to show.

    `planned` comes first, without a trial; then `started`, any number of `step`, and `finished` for every run. A run
    whose training another run had already done is finished with `reused` set, without having been started. `records`
    are those of all runs that have finished so far, by key.
    """

    kind: Literal["planned", "started", "step", "finished"]
    done: float
    planned: float
    trial: Keyed | None = None
    step: int = 0
    total_steps: int = 0
    eval_loss: float | None = None
    record: Record | None = None
    reused: bool = False
    elsewhere: bool = False
    full_steps: int | None = None
    records: Records = field(default_factory=dict, repr=False, compare=False)


OnEvent = Callable[[Event], None]


def has_begun(folder: str | os.PathLike[str], *results: str) -> bool:
    """Whether runs have been started into an output folder: their log is there, or one of the results."""
    return any(os.path.lexists(os.path.join(folder, name)) for name in (LOG_FILE, *results))


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def default_workers() -> int:
    """One run at a time on a GPU, one a core up to two on a CPU."""
    on_gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    return 1 if on_gpu else min(MOST_WORKERS_ON_CPU, available_cores())


def threads_of_each(workers: int) -> int:
    """Threads of each process that trains: its share of the cores, and no more than this process was told to use.

    torch reads OMP_NUM_THREADS and its relatives, and `torch.set_num_threads` says it in a script.
    """
    return max(1, min(torch.get_num_threads(), available_cores() // workers))


def run_all(
    plan: StudyPlan,
    store: StudyStore,
    run: RunTrial,
    *,
    workers: int = 1,
    on_event: OnEvent | None = None,
    log: str | os.PathLike[str] | None = None,
) -> dict[str, Record]:
    """Does every run of the plan that the store does not hold yet; other processes may share the store and the work.

    Args:
        plan: What to run.
        store: Where finished runs are kept.
        run: Does one trial; a function (or `functools.partial`) that a new process can import.
        workers: Runs side by side. The cores are divided among them.
        on_event: Called in this process with every `Event`.
        log: File that takes what the workers print.

    Returns:
        All records of the study by key.

    Raises:
        InterruptedRun: SIGINT or SIGTERM came; finished runs are stored.
        DivergedError: all tuning runs of an arm diverged.
        LoraPlusError: a worker was killed, or a run met with a mistake of the user's.
    """
    return _Coordinator(plan, store, run, workers, on_event or (lambda event: None), log).work()


class _Coordinator:
    """One call of `run_all`."""

    def __init__(
        self,
        plan: StudyPlan,
        store: StudyStore,
        run: RunTrial,
        workers: int,
        on_event: OnEvent,
        log: str | os.PathLike[str] | None,
    ) -> None:
        self.plan, self.store, self.workers, self.on_event = plan, store, workers, on_event
        self.records = store.records()
        self.looked = 0.0
        self.running: dict[Future[Record], Keyed] = {}
        self.stop = threading.Event()
        store.stop_waiting_if(self.stop.is_set)
        self.siblings = {process.pid for process in multiprocessing.active_children()}
        context = multiprocessing.get_context("spawn")
        self.messages: Any = context.Queue()
        self.for_workers = (run, self.messages, threads_of_each(workers), None if log is None else os.fspath(log))
        self.context = context

    def work(self) -> dict[str, Record]:
        with scratch_folder() as scratch, _signals_set(self.stop):
            self.pool = ProcessPoolExecutor(
                self.workers, mp_context=self.context, initializer=set_up, initargs=(*self.for_workers, scratch)
            )
            try:
                self.emit("planned")
                while True:
                    self.check_stop()
                    self.look_elsewhere()
                    self.start_runs()
                    if not self.running:
                        if not self.store.elsewhere():
                            break
                        self.stop.wait(SECONDS_BETWEEN_LOOKS)
                        continue
                    finished, _ = wait(self.running, SECONDS_BETWEEN_LOOKS, FIRST_COMPLETED)
                    self.read_messages()
                    for future in finished:
                        self.take(future)
            except (KeyboardInterrupt, InterruptedRun):
                self.end_workers()
                raise InterruptedRun(
                    f"interrupted after {self.progress} runs; go on with the same command and --resume"
                ) from None
            except BaseException:
                self.end_workers()
                raise
            self.pool.shutdown()
        return self.records

    def check_stop(self) -> None:
        if self.stop.is_set():
            raise InterruptedRun

    def emit(self, kind: Literal["planned", "started", "step", "finished"], **details: Any) -> None:
        done, planned = self.plan.done(self.records)
        length = self.plan.full_length
        self.on_event(Event(kind, done=done, planned=planned, full_steps=length, records=self.records, **details))

    @property
    def progress(self) -> str:
        done, planned = self.plan.done(self.records)
        return f"{done:.3g} of {planned:.3g}"

    def look_elsewhere(self) -> None:
        """Takes over what other processes of a shared study have finished since the last look."""
        now = time.monotonic()
        if not self.store.shared or now - self.looked < SECONDS_BETWEEN_REFRESHES:
            return
        self.looked = now
        self.store.refresh()
        self.take_news()

    def take_news(self) -> None:
        for key, record in self.store.records().items():
            if key not in self.records:
                self.records[key] = record
                self.emit("finished", trial=record.trial, record=record, elsewhere=True)

    def start_runs(self) -> None:
        while (trial := self.plan.next(self.records, [*self.running.values(), *self.store.elsewhere()])) is not None:
            known = self.plan.known(self.records, trial)
            if known is not None:
                self.keep(known, reused=True)
            elif len(self.running) < self.workers:
                if not self.store.start(trial):  # another process was faster
                    self.take_news()
                    continue
                self.emit("started", trial=trial)
                with _signals_blocked():
                    self.running[self.submit(trial)] = trial
            else:
                return

    def submit(self, trial: Keyed) -> Future[Record]:
        try:
            return self.pool.submit(perform, trial)
        except BrokenProcessPool:
            raise self.broken([trial]) from None

    def take(self, future: Future[Record]) -> None:
        try:
            record = future.result()
        except BrokenProcessPool:
            raise self.broken(list(self.running.values())) from None
        self.keep(record)
        del self.running[future]

    def keep(self, record: Record, reused: bool = False) -> None:
        key = record.trial.key
        self.store.finish(record)
        self.records[key] = record = self.store.records()[key]
        self.emit("finished", trial=record.trial, record=record, reused=reused)
        self.take_news()

    def broken(self, trials: list[Keyed]) -> LoraPlusError:
        """Why workers are gone; a signal to the whole process group, as `timeout` sends it, ends them as well."""
        if self.stop.wait(SECONDS_BETWEEN_LOOKS):
            return InterruptedRun()
        names = ", ".join(trial.key for trial in trials)
        return LoraPlusError(
            f"a training process was killed (out of memory?) after {self.progress} runs, "
            f"during {names}; finished runs are stored: go on with the same command and --resume, "
            "with --workers 1 if memory ran out"
        )

    def read_messages(self) -> None:
        trials = {trial.key: trial for trial in self.running.values()}
        with contextlib.suppress(queue.Empty):
            while True:
                message = self.messages.get_nowait()
                trial = trials.get(message.key)
                if trial is None:
                    continue
                if message.eval_loss is not None:
                    self.store.progress(trial, message.step, message.eval_loss)
                self.emit(
                    "step", trial=trial, step=message.step, total_steps=message.total_steps, eval_loss=message.eval_loss
                )

    def end_workers(self) -> None:
        """Stops the workers at once and leaves no run marked as under way."""
        processes = [p for p in multiprocessing.active_children() if p.pid not in self.siblings]
        for process in processes:
            process.terminate()
        for process in processes:
            process.join(SECONDS_TO_TERMINATE)
            if process.is_alive():
                process.kill()
        self.pool.shutdown(wait=False, cancel_futures=True)
        for trial in self.running.values():
            if trial.key not in self.records:
                self.store.abandon(trial)


@contextlib.contextmanager
def _signals_set(stop: threading.Event) -> Iterator[None]:
    """SIGINT and SIGTERM set `stop` rather than interrupt, so that they cannot hit the middle of a write."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(*_: object) -> None:
        if not stop.is_set():
            stop.set()
            acknowledge("stopping; what has finished is kept")

    for number in earlier:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """A process started in here inherits a blocked SIGINT: Ctrl-C cannot hit it before `set_up` has run."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    earlier = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, earlier)
