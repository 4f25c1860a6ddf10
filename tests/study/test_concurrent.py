"""Processes that are killed and started again lose no run and store none twice; a server that is away is waited for."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from loraplus.study import storage
from loraplus.study.storage import Patient

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "faults"))

from concurrent_studies import trial_of


def test_processes_killed_at_random_share_a_study_without_loss(tmp_path: Path):
    found = trial_of(str(tmp_path / "study.journal"), tmp_path, 60, None, seed=0, seconds_between=3)
    assert (found["lost"], found["stored_twice"], found["gave_up"]) == (0, 0, [])
    assert found["processes_that_ended_well"] == 4 and found["all_read_the_same"]


class Away:
    """A storage whose server is away for the first calls."""

    def __init__(self, calls: int) -> None:
        self.left = calls

    def get_trial(self, number: int) -> int:
        from sqlalchemy.exc import OperationalError

        self.left -= 1
        if self.left >= 0:
            raise RuntimeError("storage") from OperationalError("select", {}, Exception("connection refused"))
        return number


def test_a_server_that_is_away_is_waited_for_and_no_longer_than_that(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("sqlalchemy")
    monkeypatch.setattr(storage, "_BETWEEN_TRIES", 0.01)
    back: list[int] = []

    def patient(calls: int, location: str = "postgresql://host/db") -> Patient:
        return Patient(Away(calls), location, lambda: back.append(calls))  # pyright: ignore[reportArgumentType]

    assert patient(3).get_trial(7) == 7 and back == [3]
    for waiting in (patient(1, "sqlite:///file"), patient(1, "study.journal")):
        with pytest.raises(RuntimeError):
            waiting.get_trial(7)
    interrupted = patient(10**6)
    interrupted.interrupted = lambda: True
    with pytest.raises(RuntimeError):
        interrupted.get_trial(7)
    monkeypatch.setattr(storage, "WAIT_SECONDS", 0.05)
    with pytest.raises(RuntimeError):
        patient(10**6).get_trial(7)
