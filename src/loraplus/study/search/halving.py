"""Successive halving for (η_A, λ): many short runs, few longer ones, at least one of full length.

    rung 1   an eighth      a line over √(η_A·η_B) in half decades at λ = 16, until its best lies inside; around it
                            λ = 4 and 64, each at two rates, and λ = 1 if 4 is better than 16
    rung 2   a half         rates a fifth of a decade apart around the lowest point of a parabola through rung 1, until
             (or less)      their best lies inside, three at least; there the second-best λ, if it is close
    rung 3   full length    the lowest point of a parabola through rung 2; what is left of the budget refines it

A short run has its own warm-up and its own decay to zero. A long run cut short is still near its peak rate: its loss
is mostly the noise that the decay would have removed, so it favours rates that are too low. A short run that decays
answers the same question on a smaller scale, and its best rate is only a little higher than that of a long run: the
search follows by `DRIFT`. That is also why most of the budget goes to runs of half the length, which tell the best
rate within what one halving moves it, rather than to many short ones.

The search is a pure function of the losses so far: `Halving.next` replays it from the start and stops at the first
rung with a loss missing. So it does not matter who ran what, or how often a study was interrupted.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from loraplus.errors import InvalidRateError
from loraplus.study.search.parabola import any_finite, curvature, lowest, lowest_ratio, offset, vertex
from loraplus.study.search.point import Point, finite

RATIO = 16.0
HIGHEST_RATIO = 256.0
# log10 √(η_A·η_B), the middle first: a small budget takes the first few.
LINE = (-3.0, -2.5, -3.5, -2.0)
LINE_STEP = 0.5
# The best √(η_A·η_B) moves little when λ does; how far a factor of 4 takes it, at most, downwards.
RATIO_SHIFT = 0.25
LOWEST, HIGHEST = -8.0, 2.0
REFINED_STEP = 0.2
LAST_STEP = 0.2
SMALLEST_STEP = 0.04
FIRST_RUNG = 1 / 8
REFINING_RUNGS = (1 / 2, 1 / 4, FIRST_RUNG)
# In fewer steps a run has learned too little to tell one rate from another.
FEWEST_STEPS = 20
# How many decades the best rate falls when training gets twice as long.
DRIFT = 0.04
# A λ that is worse by no more than this part in rung 1 gets a second chance in rung 2.
CLOSE = 0.02
_EPSILON = 1e-9


@dataclass(frozen=True)
class Candidate:
    """A pair of rates and the length of the run that tries it."""

    point: Point
    steps: int


Losses = Mapping[Candidate, float]
Rung = Generator[list[Candidate], Losses, None]


@dataclass
class Halving:
    """One search within a budget.

    Args:
        full_steps: Optimizer steps of a run of full length.
        budget: What all runs together may cost, in runs of full length; at least 1.

    Raises:
        InvalidRateError: the budget does not hold one run of full length.

    Example:
        >>> [run.point.lr for run in Halving(full_steps=800, budget=4).next({})]
        [0.00025, 0.000791, 7.91e-05, 0.0025]
    """

    full_steps: int
    budget: float = math.inf

    def __post_init__(self) -> None:
        if not self.budget >= 1 or self.full_steps < 1:
            raise InvalidRateError(
                f"a search needs at least one run of one step, got {self.budget} runs of {self.full_steps} steps"
            )

    def next(self, losses: Losses) -> list[Candidate]:
        """The runs of the current rung that have no loss yet; none when the search is over."""
        search = _Replay(self.full_steps, self.budget).runs()
        try:
            asked = next(search)
            while True:
                missing = [run for run in asked if run not in losses]
                if missing:
                    return missing
                asked = search.send({run: finite(losses[run]) for run in asked})
        except StopIteration:
            return []

    @property
    def first_rung(self) -> list[Candidate]:
        """The runs that every search starts with whose budget holds them and a run of full length."""
        return Halving(self.full_steps).next({})

    def best(self, losses: Losses) -> Candidate | None:
        """The run of full length with the lowest loss, or None if there is none or all diverged."""
        of_full_length = {run: finite(loss) for run, loss in losses.items() if run.steps == self.full_steps}
        best = min(
            of_full_length,
            key=lambda run: (of_full_length[run], run.point.geometric_mean_lr, run.point.lr_ratio),
            default=None,
        )
        return best if best is not None and math.isfinite(of_full_length[best]) else None

    def cost(self, runs: Iterable[Candidate]) -> float:
        """Cost of some runs in runs of full length: their share of optimizer steps."""
        return sum(run.steps for run in runs) / self.full_steps


@dataclass
class _Replay(Halving):
    """A search replayed from the start, with what is known by the rung that it has reached."""

    known: dict[Candidate, float] = field(default_factory=dict)
    minima: dict[float, float] = field(default_factory=dict)
    """Lowest loss of rung 1 by λ, and where it is."""
    best_rates: dict[float, float] = field(default_factory=dict)
    ratio: float = RATIO
    rival: float | None = None
    centre: float = LINE[0]
    """log10 √(η_A·η_B) of the lowest loss in the rung so far, for runs of `length`."""
    length: int = 0
    curvature: float | None = None

    def runs(self) -> Rung:
        self.length = self._steps(FIRST_RUNG)
        yield from self._line()
        yield from self._ratios()
        yield from self._refine()
        yield from self._last()
        yield from self._rest()

    def _line(self) -> Rung:
        """Tries half decades up and down, until the best rate has a worse neighbour on both sides."""
        start = [self._run(x) for x in LINE]
        yield from self._ask(start[: self._affordable(self.length, keep=1)])
        yield from self._bracket(LINE_STEP)

    def _ratios(self) -> Rung:
        """Tries other λ, each at its neighbour's best rate and a quarter of a decade on, where its own should lie."""
        row = self._row()
        if not any_finite(row):
            return
        start = lowest(row)
        self.centre = start + offset(row, start, LINE_STEP)
        here = self._pair(RATIO, self.centre, 0)
        up, down = self._pair(4 * RATIO, self.centre, -1), self._pair(RATIO / 4, self.centre, 1)
        yield from self._ask(self._within([*here[:1], *down, *up]))
        for ratio, runs in ((RATIO, here[:1]), (RATIO / 4, down), (4 * RATIO, up)):
            self._note_best(ratio, runs)
        if self._best_ratio() == RATIO / 4:
            further = self._pair(1.0, self.best_rates[RATIO / 4], 1)
            yield from self._ask(self._within(further))
            self._note_best(1.0, further)
        if not self.minima:
            return
        best = self._best_ratio()
        self.ratio = lowest_ratio(self.minima)
        self.centre = self._rate_at(self.ratio)
        close = self.minima[best] * (1 + CLOSE)
        rivals = [ratio for ratio in self.minima if ratio != self.ratio and self.minima[ratio] <= close]
        self.rival = min(rivals, key=lambda ratio: self.minima[ratio], default=None)

    def _pair(self, ratio: float, x: float, way: int) -> list[Candidate]:
        return [self._run(x, ratio), self._run(x + way * RATIO_SHIFT, ratio)]

    def _within(self, runs: list[Candidate]) -> list[Candidate]:
        """As many of some runs as leave room for rung 2, or at least for a run of full length."""
        refining = 3 * self._steps(REFINING_RUNGS[0]) / self.full_steps
        number = self._affordable(self.length, keep=1 + refining)
        return runs[: number if number >= len(runs) - 1 else self._affordable(self.length, keep=1)]

    def _note_best(self, ratio: float, runs: list[Candidate]) -> None:
        tried = [run for run in runs if math.isfinite(self.known.get(run, math.inf))]
        if tried:
            best = min(tried, key=lambda run: self.known[run])
            self.minima[ratio], self.best_rates[ratio] = self.known[best], _log_rate(best)

    def _best_ratio(self) -> float:
        return min(self.minima, key=lambda ratio: self.minima[ratio], default=RATIO)

    def _rate_at(self, ratio: float) -> float:
        """Best rate at a λ that may lie between two that were tried."""
        known = sorted(self.best_rates)
        return float(np.interp(math.log(ratio), [math.log(r) for r in known], [self.best_rates[r] for r in known]))

    def _refine(self) -> Rung:
        """Three rates or more at a longer length, and there once more the second-best λ."""
        length = self._refining_length()
        if length is None or not any_finite(self._row(RATIO)):
            return
        self._move_to(length)
        yield from self._ask([self._run(self.centre + n * REFINED_STEP) for n in (0.5, -0.5)])
        yield from self._bracket(REFINED_STEP)
        row = self._row()
        if not any_finite(row):
            return
        best = lowest(row)
        self.centre = best + offset(row, best, REFINED_STEP)
        self.curvature = curvature(row, best)
        if self.rival is not None and self._affordable(self.length, keep=1):
            shift = self._rate_at(self.rival) - self._rate_at(self.ratio)
            rival = self._run(best + shift, self.rival)
            yield from self._ask([rival])
            if self.known[rival] < row[best]:
                self.ratio, self.centre, self.curvature = self.rival, self.centre + shift, None

    def _last(self) -> Rung:
        """Two rates around the expected best where the budget holds two, else the expected best itself."""
        self._move_to(self.full_steps)
        two = self._affordable(self.full_steps, keep=0) >= 2
        places = (-0.5, 0.5) if two else (0.0,)
        yield from self._ask([self._run(self.centre + place * LAST_STEP) for place in places])

    def _rest(self) -> Rung:
        """Spends what is left on full length: lower rates while all diverge, the parabola's lowest point, other λ."""
        while self._affordable(self.full_steps, keep=0) >= 1:
            run = self._next_full()
            if run is None:
                return
            yield from self._ask([run])
            losses = {run: loss for run, loss in self.known.items() if run.steps == self.full_steps}
            best = self.best(losses)
            if best is not None:
                self.ratio = best.point.lr_ratio

    def _next_full(self) -> Candidate | None:
        row = self._row()
        if not any_finite(row):
            lower = min(row) - LINE_STEP
            return self._run(lower) if lower >= LOWEST else None
        best = lowest(row)
        wanted = [vertex(row, best, self.curvature, LAST_STEP)]
        tried = [self._run(x) for x in wanted if all(abs(x - other) >= SMALLEST_STEP for other in row)]
        tried += [self._run(best, ratio=self.ratio * factor) for factor in (4, 1 / 4, 2, 1 / 2)]
        tried += [self._run(best + step) for size in (0.1, 0.05) for step in (size, -size)]
        return next((r for r in tried if r not in self.known and 1 <= r.point.lr_ratio <= HIGHEST_RATIO), None)

    def _bracket(self, step: float) -> Rung:
        """Extends a row of equally spaced rates beyond its edge for as long as the best lies there."""
        while row := self._row():
            best = lowest(row)
            if not any_finite(row) or best == min(row):
                further = min(row) - step
            elif best == max(row):
                further = max(row) + step
            else:
                return
            if not (LOWEST <= further <= HIGHEST and self._affordable(self.length, keep=1)):
                return
            yield from self._ask([self._run(further)])

    def _ask(self, runs: Sequence[Candidate]) -> Rung:
        new = [run for run in dict.fromkeys(runs) if run not in self.known]
        if new:
            self.known.update((yield new))

    def _run(self, x: float, ratio: float | None = None) -> Candidate:
        return Candidate(Point.from_geometric_mean(10**x, self.ratio if ratio is None else ratio), self.length)

    def _row(self, ratio: float | None = None) -> dict[float, float]:
        """Loss by log10 √(η_A·η_B), at this length and at λ = `ratio`, by default the λ that the search is at."""
        ratio = self.ratio if ratio is None else ratio
        return {
            _log_rate(run): loss
            for run, loss in self.known.items()
            if run.steps == self.length and run.point.lr_ratio == ratio
        }

    def _move_to(self, length: int) -> None:
        self.centre -= DRIFT * math.log2(length / self.length)
        self.length = length

    def _steps(self, fraction: float) -> int:
        """Optimizer steps of a part of a run; the whole if a part would be too short to tell anything."""
        steps = max(math.ceil(fraction * self.full_steps), FEWEST_STEPS)
        return steps if 2 * steps <= self.full_steps else self.full_steps

    def _affordable(self, steps: int, keep: float) -> int:
        """How many runs of this length fit if `keep` runs of full length are to remain."""
        left = self.budget - keep - self.cost(self.known)
        return max(0, math.floor(left * self.full_steps / steps + _EPSILON)) if math.isfinite(left) else len(LINE)

    def _refining_length(self) -> int | None:
        """The longest rung of three runs that leaves one run of full length."""
        for fraction in REFINING_RUNGS:
            steps = self._steps(fraction)
            if self.length <= steps < self.full_steps and self._affordable(steps, keep=1) >= 3:
                return steps
        return None


def _log_rate(run: Candidate) -> float:
    return math.log10(run.point.geometric_mean_lr)
