"""One row of the comparison: arms in turns over one model and its data, then memory, gradients and the floor."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from loraplus.bench.arms import DEFAULTS, LAMBDA_ONE, OURS, PEFT, Arm, trainer_of
from loraplus.bench.gradients import gradient_errors, profile_of
from loraplus.bench.memory import measured
from loraplus.bench.prepared import Prepared
from loraplus.bench.roofline import floor_of
from loraplus.bench.runs import Run, ended, steps_of
from loraplus.bench.timing import Turn, ratio, spread, take_turns
from loraplus.errors import InputError

_TIMING = 0.6  # of a row's time, where memory is measured too
_LEAST = 3  # rounds
_FEWEST = 4  # batches of a turn: texts of fewer are all of one length, and no arm would pad
_FLOOR = "floor"
Told = Callable[[str], None]


@dataclass
class Measurement:
    """What a row is made of.

    Args:
        name: Short, for --rows and JSON.
        title: In tables.
        unit: "examples" or "tokens", counted a second.
        prepared: Model and data.
        arms: Trainer's defaults first.
        seconds: For all of it, about.
        output: A folder for the trainers.
        memory: Whether memory is measured.
        profile: Whether a step of PEFT's best arm and of ours are taken apart.
        told: Is told what is going on.
    """

    name: str
    title: str
    unit: str
    prepared: Prepared
    arms: list[Arm]
    seconds: float
    output: str
    memory: bool
    profile: bool
    told: Told
    failed: dict[str, str] = field(default_factory=dict, init=False)
    floor: dict[str, float] = field(default_factory=dict, init=False)

    def row(self) -> dict[str, Any]:
        """Measures everything.

        Raises:
            InputError: no arm can run.
        """
        started = time.perf_counter()
        for_turns = self.seconds * (_TIMING if self.memory else 1.0)
        times = self._times(for_turns)
        floor = times.pop(_FLOOR)
        row = self._described(times)
        for name, seconds in times.items():
            row["arms"][name]["share_of_floor"] = ratio(floor, seconds).to_dict()
        row["floor"] = {**self.floor, "seconds_a_step": spread(floor).to_dict()}
        row["ratios"] = self._ratios(times)
        self.told(f"{self.title}: gradients")
        row["gradient_error"] = self._gradients()
        if self.profile:
            for name in {row["ratios"].get("best", {}).get("against"), self._ours()} - {None}:
                arm = next(arm for arm in self.arms if arm.name == name)
                row["arms"][name]["profile"] = profile_of(self.prepared, arm, self.output)
        if self.memory:
            self._measure_memory(row, self.seconds - (time.perf_counter() - started))
        return row

    def _times(self, seconds: float) -> dict[str, list[float]]:
        """Seconds a step, round by round, of every arm that runs and of the floor."""
        end = time.perf_counter() + seconds
        runs: dict[str, Run] = {}
        try:
            self._shorten(seconds)
            for arm in self.arms:
                self._begin(arm, runs)
            if not runs:
                raise InputError(f"no arm of the comparison can run: {next(iter(self.failed.values()))}")

            def told(done: int) -> None:
                self.told(f"{self.title}: round {done}")

            # A packed arm may take another number of steps over the same examples; a step is a batch's worth of these.
            steps = self.prepared.steps
            turns: dict[str, Turn] = {name: (lambda run=run: run.turn() / steps) for name, run in runs.items()}
            floor = floor_of(self.prepared)
            turns[_FLOOR] = floor.turn
            times = take_turns(turns, max(0.0, end - time.perf_counter()), least=_LEAST, told=told)
            self.floor = {"operations_a_step": floor.operations, "most_operations_a_second": floor.fastest}
            return times
        finally:
            for run in runs.values():
                run.end()

    def _shorten(self, seconds: float) -> None:
        """Makes turns so short that the least number of rounds fits, by two steps of the first arm, the slowest."""
        self.told(f"{self.title}: how long a step is")
        try:
            run = Run(trainer_of(self.arms[0], self.prepared, self.output), 1)
        except (InputError, MemoryError):
            raise
        except Exception:
            return  # told when the arm begins
        with suppress(Exception), ended(run):
            run.turn()
            affordable = seconds / (run.turn() * len(self.arms) * (_LEAST + 1))
            batches = max(_FEWEST, int(affordable))
            self.prepared = self.prepared.with_batches(min(self.prepared.batches, batches))

    def _begin(self, arm: Arm, runs: dict[str, Run]) -> None:
        """Starts an arm, and runs a turn of it that does not count."""
        self.told(f"{self.title}: {arm.name}")
        try:
            runs[arm.name] = Run(trainer := trainer_of(arm, self.prepared, self.output), steps_of(trainer))
            runs[arm.name].turn()
        except (InputError, MemoryError):
            raise
        except Exception as error:  # a stack that cannot run this model is a result, too
            self.failed[arm.name] = f"{type(error).__name__}: {error}"[:300]
            self.told(f"{self.title}: {arm.name} does not run: {self.failed[arm.name]}")
            if arm.name in runs:
                runs.pop(arm.name).end()

    def _described(self, times: dict[str, list[float]]) -> dict[str, Any]:
        prepared = self.prepared
        amount = (prepared.examples if self.unit == "examples" else prepared.tokens) / prepared.steps
        lengths, size = prepared.lengths, prepared.config.batch_size
        sorted_batches = [lengths[i : i + size] for i in range(0, len(lengths), size)]
        arms = {}
        for arm in self.arms:
            described: dict[str, Any] = {"side": arm.side}
            if arm.name in times:
                seconds = times[arm.name]
                described |= {"seconds_a_step": spread(seconds).to_dict(), "rounds": seconds}
                described[f"{self.unit}_a_second"] = amount / spread(seconds).median
            else:
                described["failed"] = self.failed[arm.name]
            arms[arm.name] = described
        return {
            "name": self.name,
            "title": self.title,
            "unit": self.unit,
            "batch_size": size,
            "steps_a_turn": prepared.steps,
            "examples_a_turn": prepared.examples,
            "tokens_a_turn": prepared.tokens,
            "real_tokens_when_grouped": prepared.tokens / sum(max(batch) * len(batch) for batch in sorted_batches),
            "arms": arms,
        }

    def _ratios(self, times: dict[str, list[float]]) -> dict[str, Any]:
        """Ours against the others: how many times as fast."""
        by_side = {arm.side: arm.name for arm in self.arms if arm.name in times}
        ours, ratios = by_side.get(OURS), {}
        if ours is None:
            return ratios
        others = [arm.name for arm in self.arms if arm.side in (DEFAULTS, PEFT) and arm.name in times]
        best = min(others, key=lambda name: spread(times[name]).median, default=None)
        for name, other in (("defaults", by_side.get(DEFAULTS)), ("best", best)):
            if other is not None:
                ratios[name] = {"against": other, **ratio(times[other], times[ours]).to_dict()}
        if LAMBDA_ONE.name in times:
            ratios["lambda"] = {"against": LAMBDA_ONE.name, **ratio(times[ours], times[LAMBDA_ONE.name]).to_dict()}
        return ratios

    def _ours(self) -> str | None:
        """The name of our arm, if it runs."""
        return next((arm.name for arm in self.arms if arm.side == OURS and arm.name not in self.failed), None)

    def _gradients(self) -> dict[str, Any]:
        """Of PEFT's arm with batches like ours, and of ours, against PEFT's in float64."""
        ours = [arm for arm in self.arms if arm.side == OURS and arm.name not in self.failed]
        peft = [arm for arm in self.arms if arm.side == PEFT and not arm.dropout and arm.name not in self.failed]
        if not ours or not peft:
            return {}
        try:
            errors = gradient_errors(self.prepared, peft[0], [peft[0], *ours], self.output)
        except Exception as error:
            return {"failed": f"{type(error).__name__}: {error}"[:300]}
        errors_of_both: dict[str, Any] = {"peft": errors[peft[0].name], "ours": errors[ours[0].name]}
        with suppress(ZeroDivisionError):
            errors_of_both["ratio"] = errors_of_both["ours"] / errors_of_both["peft"]
        return errors_of_both

    def _measure_memory(self, row: dict[str, Any], seconds: float) -> None:
        self.told(f"{self.title}: memory")
        first = [self._ours(), *(row["ratios"].get(name, {}).get("against") for name in ("best", "defaults"))]
        arms = [arm for arm in self.arms if arm.name not in self.failed and arm.name != LAMBDA_ONE.name]
        arms.sort(key=lambda arm: arm.name not in first)  # those that are compared, while there is time
        memory = measured(self.prepared.config, self.prepared.batches, arms, max(seconds, 120.0))
        for name, mib in memory.items():
            row["arms"][name]["memory_over_idle_mib" if isinstance(mib, float) else "memory"] = mib
        ours = next((arm.name for arm in arms if arm.side == OURS), "")
        if not isinstance(memory.get(ours), float):
            return
        for name in ("defaults", "best"):
            other = memory.get(row["ratios"].get(name, {}).get("against", ""))
            if isinstance(other, float) and other > 0:
                row["ratios"][name]["memory"] = float(memory[ours]) / other
