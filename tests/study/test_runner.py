"""Running a plan: equal budgets, nothing twice, and nothing lost when it is stopped."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pytest

from loraplus.errors import DivergedError, InputError, InterruptedRun, LoraPlusError
from loraplus.study.plan import Plan, same_training
from loraplus.study.records import Record, Trial
from loraplus.study.runner import Event, run_all, threads_of_each
from loraplus.study.store import StudyStore
from loraplus.tasks.config import CompareConfig
from study import fake_runs

PLAN = Plan(tuning_runs=3, seeds=2, seed=5, lr_ratio=16.0, untuned_lr=3e-4)
TESTS = Path(__file__).parent.parent


def open_store(folder: Path) -> StudyStore:
    return StudyStore.open(folder / "study.journal", "s")


def execute(folder: Path, function=fake_runs.quick, plan: Plan = PLAN, workers: int = 1, **options):
    return run_all(plan, open_store(folder), partial(function, str(folder)), workers=workers, **options)


def without_processes(plan: Plan, loss) -> tuple[list[Trial], dict[str, Record]]:
    """What the plan would run, in order, if one run finished before the next one starts."""
    order, records = [], {}
    while (trial := plan.next(records, [])) is not None:
        order.append(trial)
        records[trial.key] = Record(trial, "done", 1, loss(trial), 0.5, 0.1)
    return order, records


def distance_from(rate: float):
    return lambda trial: 0.3 + abs(trial.geometric_mean_lr - rate)


def test_both_arms_get_the_same_budget_and_the_same_seeds():
    order, _ = without_processes(PLAN, distance_from(3e-3))
    assert len(order) == PLAN.total == 14
    assert Counter((t.phase, t.arm) for t in order) == {
        ("tuning", "lora"): 3, ("tuning", "loraplus"): 3, ("final", "lora"): 2,
        ("final", "loraplus"): 2, ("untuned", "lora"): 2, ("untuned", "loraplus"): 2,
    }  # fmt: skip
    for arm in ("lora", "loraplus"):
        assert [t.seed for t in order if t.arm == arm] == [5, 5, 5, 6, 7, 6, 7]


def test_the_finals_use_the_point_of_the_lowest_validation_loss():
    order, records = without_processes(PLAN, distance_from(1e-4))
    for arm in ("lora", "loraplus"):
        tuned = [r for r in records.values() if r.trial.arm == arm and r.trial.phase == "tuning"]
        best = min(tuned, key=lambda record: record.eval_loss).trial
        assert {(t.lr, t.lr_ratio) for t in order if t.arm == arm and t.phase == "final"} == {(best.lr, best.lr_ratio)}


def test_untuned_runs_use_the_same_rate_in_both_arms():
    order, _ = without_processes(PLAN, distance_from(1e-4))
    assert {(t.arm, t.lr, t.lr_ratio) for t in order if t.phase == "untuned"} == {
        ("lora", 3e-4, 1.0),
        ("loraplus", 3e-4, 16.0),
    }


def test_an_arm_tunes_one_run_after_the_other_and_the_arms_side_by_side():
    first = PLAN.next({}, [])
    assert first is not None
    second = PLAN.next({}, [first])
    assert second is not None
    assert (first.phase, first.arm, second.phase, second.arm) == ("tuning", "lora", "tuning", "loraplus")
    third = PLAN.next({}, [first, second])
    assert third is not None and third.phase == "untuned"  # a third worker need not wait


def test_a_run_waits_for_its_twin_rather_than_being_done_twice():
    plan = Plan(tuning_runs=1, seeds=1, seed=0, lr_ratio=16.0, untuned_lr=1e-3)  # LoRA's start is its untuned rate
    _, records = without_processes(plan, distance_from(1e-3))
    final, untuned = Trial("final", "lora", 1e-3, 1.0, 1), Trial("untuned", "lora", 1e-3, 1.0, 1)
    assert same_training(final) == same_training(untuned)
    records = {key: record for key, record in records.items() if key not in (final.key, untuned.key)}
    assert plan.next(records, []) == final
    assert plan.next(records, [final]) is None


def test_the_plan_follows_the_configuration():
    config = CompareConfig(tuning_runs=4, seeds=2, seed=3, lr_ratio=8, untuned_lr=1e-4)
    assert Plan.from_config(config) == Plan(4, 2, 3, 8, 1e-4)


def test_a_whole_study_in_two_processes(tmp_path: Path):
    events: list[Event] = []
    plan = Plan(tuning_runs=2, seeds=1, seed=0, lr_ratio=16.0, untuned_lr=1e-3)
    records = execute(tmp_path, fake_runs.overlapping, plan, workers=2, on_event=events.append)
    executed = fake_runs.noted(tmp_path)

    assert len(records) == plan.total == 8
    assert StudyStore.open(tmp_path / "study.journal", "s").records() == records
    assert len(set(executed)) == len(executed)

    spans = [line.split() for line in fake_runs.noted(tmp_path, "spans")]
    assert len({pid for _, pid, _, _ in spans}) == 2, "two workers, each kept alive"
    under_way = Counter()
    tuning = [(arm, what) for arm, _, phase, what in spans if phase == "tuning"]  # an arm's last runs may overlap it
    assert len(tuning) == 8
    for arm, what in tuning:
        under_way[arm] += 1 if what == "start" else -1
        assert under_way[arm] <= 1, "tuning of an arm is sequential"

    kinds = Counter(event.kind for event in events)
    assert events[0].kind == "planned" and events[0].planned == plan.total
    assert kinds["finished"] == plan.total
    assert kinds["started"] == len(executed)
    steps = [event for event in events if event.kind == "step"]
    assert steps and all(1 <= event.step <= event.total_steps == fake_runs.STEPS for event in steps)
    assert [event.done for event in events if event.kind == "finished"] == list(range(1, plan.total + 1))
    assert all(bool(r.test_losses) == (r.trial.phase != "tuning") for r in records.values())

    # All is done: nothing runs again.
    events.clear()
    assert execute(tmp_path, fake_runs.wrong_input, plan, workers=2, on_event=events.append) == records
    assert [event.kind for event in events] == ["planned"]


def test_the_same_training_under_two_names_is_done_once_and_recorded_twice(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    plan = Plan(tuning_runs=1, seeds=1, seed=0, lr_ratio=16.0, untuned_lr=1e-3)
    events: list[Event] = []
    log = tmp_path / "workers.log"
    records = execute(tmp_path, fake_runs.talks, plan, on_event=events.append, log=log)
    executed = fake_runs.noted(tmp_path)
    assert "final/lora/0.001/1/1" in executed and "untuned/lora/0.001/1/1" not in executed
    final, untuned = records["final/lora/0.001/1/1"], records["untuned/lora/0.001/1/1"]
    assert untuned.trial.phase == "untuned"
    assert (untuned.eval_loss, untuned.test_losses) == (final.eval_loss, final.test_losses)
    assert [event.trial.key for event in events if event.reused and event.trial] == ["untuned/lora/0.001/1/1"]
    assert len(executed) == plan.total - 1
    assert "hello from tuning" in log.read_text(), "what workers print goes to the log"
    assert "hello" not in "".join(capfd.readouterr())


def test_a_killed_worker_is_one_clear_line_and_the_study_goes_on_from_there(tmp_path: Path):
    with pytest.raises(LoraPlusError, match=r"process was killed .* after 6 of 14 runs, .*--resume") as caught:
        execute(tmp_path, fake_runs.killed_in_final)
    assert "\n" not in str(caught.value)
    assert len(fake_runs.noted(tmp_path)) == 6
    records = execute(tmp_path)
    assert len(records) == PLAN.total
    executed = fake_runs.noted(tmp_path)
    assert len(executed) == len(set(executed)) == PLAN.total


def test_a_users_mistake_in_a_worker_reaches_the_caller(tmp_path: Path):
    with pytest.raises(InputError, match="the label column is empty"):
        execute(tmp_path, fake_runs.wrong_input)
    assert open_store(tmp_path).records() == {}


def test_an_arm_that_only_diverges_is_an_error():
    with pytest.raises(DivergedError, match=r"all 3 tuning runs of LoRA diverged, down to η_A = 0.0001"):
        without_processes(PLAN, lambda trial: math.inf)


SCRIPT = """
    import sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from study import fake_runs, test_runner
    from loraplus.errors import InterruptedRun

    if __name__ == "__main__":
        try:
            test_runner.execute(Path({folder!r}), fake_runs.hangs_in_final, workers={workers})
        except InterruptedRun as stop:
            print(stop)
            sys.exit(130)
"""


def started_script(folder: Path, workers: int) -> subprocess.Popen[str]:
    """A study in a process group of its own, at the point where its final runs hang."""
    script = folder / "script.py"
    script.write_text(textwrap.dedent(SCRIPT.format(tests=str(TESTS), folder=str(folder), workers=workers)))
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 60
    while len(fake_runs.noted(folder, "hangs")) < workers:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    return process


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def hung_workers_end(folder: Path, seconds: float = 5) -> bool:
    pids = [int(pid) for pid in fake_runs.noted(folder, "hangs")]
    deadline = time.monotonic() + seconds
    while any(is_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(is_alive(pid) for pid in pids)


def test_ctrl_c_ends_the_workers_and_keeps_the_runs(tmp_path: Path):
    process = started_script(tmp_path, workers=2)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the whole group
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 130
    assert output.strip() == "interrupted after 6 of 14 runs; go on with the same command and --resume"
    assert hung_workers_end(tmp_path)
    assert len(open_store(tmp_path).records()) == 6


def test_a_killed_study_leaves_no_worker_and_goes_on_where_it_was(tmp_path: Path):
    process = started_script(tmp_path, workers=1)
    process.kill()
    process.communicate(timeout=20)
    assert hung_workers_end(tmp_path)
    before = fake_runs.noted(tmp_path)
    records = execute(tmp_path)
    executed = fake_runs.noted(tmp_path)
    assert len(before) == 6
    assert len(records) == len(set(executed)) == len(executed) == PLAN.total


@pytest.mark.parametrize("how", ["SIGTERM", "KeyboardInterrupt"])
def test_a_stop_during_the_display_ends_the_study_too(tmp_path: Path, how: str):
    def stop(event: Event) -> None:
        if event.kind == "finished" and how == "SIGTERM":
            os.kill(os.getpid(), signal.SIGTERM)
        elif event.kind == "finished":
            raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(InterruptedRun, match="interrupted after 1 of 14 runs"):
        execute(tmp_path, on_event=stop)
    assert len(open_store(tmp_path).records()) == 1
    assert signal.getsignal(signal.SIGTERM) == before


def test_processes_that_train_use_no_more_threads_than_they_were_told_to(monkeypatch):
    monkeypatch.setattr("loraplus.study.runner.available_cores", lambda: 8)
    monkeypatch.setattr("torch.get_num_threads", lambda: 1)  # OMP_NUM_THREADS=1
    assert [threads_of_each(workers) for workers in (1, 2, 16)] == [1, 1, 1]
    monkeypatch.setattr("torch.get_num_threads", lambda: 8)
    assert [threads_of_each(workers) for workers in (1, 2, 16)] == [8, 4, 1]
