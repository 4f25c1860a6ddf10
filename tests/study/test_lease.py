"""Leases, by a clock that the test turns."""

from __future__ import annotations

import pytest

from loraplus.study.lease import LEASE_SECONDS, Leases


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def test_a_lease_goes_by_the_own_clock_alone():
    clock = Clock()
    leases = Leases(10, clock)
    assert leases.is_alive(1, 5)
    clock.now = 10.0
    assert leases.is_alive(1, 5)
    assert leases.is_alive(2, 5), "seen for the first time"
    clock.now = 10.1
    assert not leases.is_alive(1, 5)
    assert leases.is_alive(1, 6)


def test_a_heartbeat_that_stands_still_is_known_by_its_value():
    """The number is read anew each time; large ones are other objects."""
    clock = Clock()
    leases = Leases(10, clock)
    assert leases.is_alive(1, int("5000"))
    clock.now = 11
    assert not leases.is_alive(1, int("5000"))


def test_a_heartbeat_that_goes_on_starts_the_lease_anew():
    clock = Clock(100.0)
    leases = Leases(10, clock)
    for beat in range(5):
        assert leases.is_alive(7, beat)
        clock.now += 9
    clock.now += 2
    assert not leases.is_alive(7, 4)


def test_a_beat_that_went_back_is_a_beat():
    """A process that was started again counts from the beginning."""
    clock = Clock()
    leases = Leases(10, clock)
    assert leases.is_alive(1, 5)
    clock.now = 11
    assert leases.is_alive(1, 0)


def test_what_is_forgotten_is_seen_for_the_first_time_again():
    clock = Clock()
    leases = Leases(10, clock)
    assert leases.is_alive(1, 0) and leases.is_alive(2, 0)
    clock.now = 11.0
    leases.forget_all_but([2])
    assert leases.is_alive(1, 0)
    assert not leases.is_alive(2, 0)


@pytest.mark.parametrize(("lease", "every"), [(LEASE_SECONDS, 5.0), (60.0, 10.0), (0.75, 0.125)])
def test_the_own_heartbeat_is_renewed_six_times_a_lease(lease: float, every: float):
    clock = Clock()
    leases = Leases(lease, clock)
    beats = []
    for eighth in range(100):
        clock.now = eighth * every / 8
        if leases.beat_is_due():
            beats.append(eighth)
    assert beats == list(range(0, 100, 8)), "at once, and then whenever it is due"


@pytest.mark.parametrize("looks_every", [0.2, 1.0, 4.0])
def test_a_process_that_lives_is_never_taken_for_dead(looks_every: float):
    """However seldom either looks, as long as that is well within the lease."""
    clock = Clock()
    owner, other = Leases(30, clock), Leases(30, clock)
    beat = 0
    for _ in range(int(300 / looks_every)):
        beat += owner.beat_is_due()
        clock.now += looks_every / 2
        assert other.is_alive(1, beat)
        clock.now += looks_every / 2
    assert beat >= 300 / (5 + looks_every)


def test_the_default_clock_is_one_that_only_goes_forward():
    leases = Leases(30)
    assert leases.beat_is_due() and not leases.beat_is_due()
    assert leases.lease_seconds == 30 and Leases().lease_seconds == LEASE_SECONDS == 30
