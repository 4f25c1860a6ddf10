"""Several processes on one study, killed and started again at random: no run lost, none stored twice.

    python benchmarks/faults/concurrent_studies.py --runs 400 --output benchmarks/results/faults/concurrent-studies.json

Four processes with a worker each share `--runs` runs in a journal, and then on a PostgreSQL server, which is restarted
three times meanwhile. The runs are stubs that take milliseconds; runner, worker processes, leases and storage are the
real ones. A process is killed with its worker (SIGKILL) every second or so and started again, as long as the study is
not done. In the end every run must have one outcome, and only one, and all processes must have read the same.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import pwd
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from loraplus.errors import LoraPlusError
from loraplus.study.records import Record, Trial
from loraplus.study.runner import StudyPlan, run_all
from loraplus.study.store import StudyStore

NAME = "concurrent"
LEASE_SECONDS = 5.0
PROCESSES = 4
RESTARTS = 3


@dataclass(frozen=True)
class Plan(StudyPlan):
    """So many runs, told apart by their seed."""

    runs: int

    def next(self, records: Mapping[str, Record], running: Iterable[Trial]) -> Trial | None:
        busy = {trial.key for trial in running}
        trials = (Trial("tuning", "lora", 1e-3, 1.0, seed) for seed in range(self.runs))
        return next((trial for trial in trials if trial.key not in records and trial.key not in busy), None)

    def done(self, records: Mapping[str, Record]) -> tuple[float, float]:
        return len(records), self.runs


def stub(folder: str, trial: Trial, on_step: Any) -> Record:
    """A run of some milliseconds; its loss tells who did it."""
    with open(Path(folder) / "done", "a") as file:
        file.write(f"{trial.key}\n")
    time.sleep(0.01)
    on_step(1, 1, eval_loss=1.0)
    return Record(trial, "done", 1, 1 + os.getpid() / 1e7, 0.5, 0.01)


def work(location: str, folder: str, runs: int) -> None:
    """What one of the processes does."""
    store = StudyStore.open(location, NAME, shared=True, lease_seconds=LEASE_SECONDS)
    records = run_all(Plan(runs), store, partial(stub, folder), log=f"{folder}/log")
    losses = {key: record.eval_loss for key, record in sorted(records.items())}
    Path(folder, f"read-{os.getpid()}").write_text(json.dumps(losses))


@contextlib.contextmanager
def postgresql() -> Iterator[tuple[str, Any]]:
    """(URL, function that restarts the server) of a server of our own on a free port."""
    controls = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))
    if not controls:
        raise SystemExit("PostgreSQL is not installed; Debian and Ubuntu: apt-get install postgresql")
    programs, folder = controls[-1].parent, Path(tempfile.mkdtemp(prefix="concurrent-postgresql-"))
    account: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": folder, "check": True}
    if os.geteuid() == 0:
        user = pwd.getpwnam("postgres")
        account |= {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        os.chown(folder, user.pw_uid, user.pw_gid)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    data, control = folder / "data", programs / "pg_ctl"
    options = f"-h 127.0.0.1 -p {port} -k {folder} -F"
    start = [control, "-D", data, "-o", options, "-l", folder / "log", "-w", "start"]

    def restart() -> None:
        subprocess.run([control, "-D", data, "-m", "immediate", "-w", "stop"], **account)  # as if it crashed
        time.sleep(3)
        subprocess.run(start, **account)

    subprocess.run([programs / "initdb", "-D", data, "-U", "loraplus", "-A", "trust", "--no-sync"], **account)
    subprocess.run(start, **account)
    try:
        yield f"postgresql://loraplus@127.0.0.1:{port}/postgres", restart
    finally:
        with contextlib.suppress(subprocess.CalledProcessError):
            subprocess.run([control, "-D", data, "-m", "immediate", "stop"], **account)
        shutil.rmtree(folder, ignore_errors=True)


def trial_of(location: str, folder: Path, runs: int, restart: Any, seed: int, seconds_between: float) -> dict[str, Any]:
    """One study from start to end, and what became of it."""
    draw, started, kills, restarts, said = random.Random(seed), time.monotonic(), 0, 0, []
    command = [sys.executable, __file__, "--work", location, str(folder), "--runs", str(runs)]

    def begin() -> subprocess.Popen[str]:
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)

    def progress() -> int:
        done = folder / "done"
        return len(set(done.read_text().splitlines())) if done.exists() else 0

    processes = [begin() for _ in range(PROCESSES)]
    while any(process.poll() is None for process in processes):
        time.sleep(draw.uniform(0.5, 1.5) * seconds_between)
        if restart is not None and restarts < RESTARTS and progress() >= runs * (restarts + 1) / (RESTARTS + 1):
            restart()
            restarts += 1
        place = draw.randrange(PROCESSES)
        if processes[place].poll() is None and progress() < 0.95 * runs:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(processes[place].pid, signal.SIGKILL)
            processes[place].communicate()
            processes[place] = begin()
            kills += 1
    for process in processes:
        _, errors = process.communicate()
        if process.returncode:
            said.append(errors.strip()[-500:])
    store = StudyStore.open(location, NAME, shared=True)
    outcomes = Counter(
        trial.user_attrs["key"] for trial in store._study.trials if trial.state.name in ("COMPLETE", "FAIL")
    )
    kept = {key: record.eval_loss for key, record in sorted(store.records().items())}
    read = [json.loads(path.read_text()) for path in folder.glob("read-*")]
    executed = Counter((folder / "done").read_text().splitlines())
    return {
        "storage": "postgresql" if "://" in location else "journal",
        "runs": runs,
        "kills": kills,
        "server_restarts": restarts,
        "lost": runs - len(kept),
        "stored_twice": sum(count > 1 for count in outcomes.values()),
        "executed_again_after_a_kill_or_restart": sum(count - 1 for count in executed.values()),
        "processes_that_ended_well": len(read),
        "all_read_the_same": all(losses == kept for losses in read),
        "gave_up": said,
        "seconds": round(time.monotonic() - started, 1),
    }


def tried(storage: str, runs: int, seed: int, seconds_between: float) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp(prefix="concurrent-"))
    try:
        if storage == "journal":
            return trial_of(str(folder / "study.journal"), folder, runs, None, seed, seconds_between)
        with postgresql() as (url, restart):
            return trial_of(url, folder, runs, restart, seed, seconds_between)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--between", type=float, default=2.0, help="seconds between kills, on average")
    parser.add_argument("--storages", default="journal,postgresql")
    parser.add_argument("--output")
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        try:
            work(*options.work, options.runs)
        except LoraPlusError as error:
            print(error, file=sys.stderr)
            sys.exit(2)
        return
    outcomes = [tried(storage, options.runs, options.seed, options.between) for storage in options.storages.split(",")]
    where = {"machine": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
    text = json.dumps({"command": " ".join(["python", *sys.argv]), **where, "tried": outcomes}, indent=2) + "\n"
    print(text)
    if options.output:
        Path(options.output).write_text(text)
    sys.exit(any(one["lost"] or one["stored_twice"] or not one["all_read_the_same"] for one in outcomes))


if __name__ == "__main__":
    main()
