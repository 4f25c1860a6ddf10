"""Tells by its heartbeat whether the process that owns a run is alive.

The owner raises a number beside the run several times in `lease_seconds`. If another process sees no change for
`lease_seconds` by its own clock, it takes the owner for dead. So clocks of two machines are never compared.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

LEASE_SECONDS = 30.0
BEATS_PER_LEASE = 6


class Leases:
    """The heartbeats of all other processes, as this one has seen them.

    Args:
        lease_seconds: How long a heartbeat may stand still.
        clock: Seconds that only go forward.
    """

    def __init__(self, lease_seconds: float = LEASE_SECONDS, clock: Callable[[], float] = time.monotonic) -> None:
        self.lease_seconds = lease_seconds
        self._clock = clock
        self._seen: dict[int, tuple[int, float]] = {}
        self._beaten = -lease_seconds

    def is_alive(self, number: int, beat: int) -> bool:
        """Whether trial `number`, whose heartbeat now stands at `beat`, still has an owner."""
        now = self._clock()
        last = self._seen.get(number)
        if last is None or last[0] != beat:
            self._seen[number] = last = (beat, now)
        return now - last[1] <= self.lease_seconds

    def forget_all_but(self, numbers: Iterable[int]) -> None:
        """Drops what is known of trials that are no longer under way."""
        keep = set(numbers)
        self._seen = {number: seen for number, seen in self._seen.items() if number in keep}

    def beat_is_due(self) -> bool:
        """Whether this process should renew its own heartbeats now. If the answer is True, it is taken to do so."""
        now = self._clock()
        if now - self._beaten < self.lease_seconds / BEATS_PER_LEASE:
            return False
        self._beaten = now
        return True
