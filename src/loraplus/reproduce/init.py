"""Which factor starts at random, rank and α: how the best rate moves, and what the best loss is.

A small decoder tells which book a verse is from. Both starts make B·A zero: A random and B zero (the usual one), or
A zero and B random. "B" is always the factor that writes the layer's output, whichever of the two starts at zero
(docs/decisions.md): with B random, λ = η_B/η_A > 1 speeds up the factor that is not zero.

The four rules for α set the scale s of s·B·A x:

    α = r: s = 1    α = 2r: s = 2    α = 16: s = 16/r    rsLoRA with α = 16: s = 16/√r

A rule acts through s alone, so rules with the same s at a rank share their runs. For Adam, whose steps do not depend on
the size of the gradient, s and the rate of the factor that starts at zero are one quantity: (s, η_A, η_B) with B zero
trains as (1, η_A, s·η_B).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from loraplus.reproduce import small_decoders, small_tasks
from loraplus.reproduce.descriptions import DESCRIPTIONS
from loraplus.reproduce.experiment import Experiment, Record, Records, Run
from loraplus.reproduce.report import Figure, LinePlot, Report, Series, Table, interval
from loraplus.reproduce.small_training import WARMUP, SmallAdapter, Start, batches, build, train
from loraplus.reproduce.tuned_arms import FINAL, LOSS, TEST_LOSS, TUNING, TUNING_SEED, fresh_seeds
from loraplus.study.search.grid import HALF_DECADE, best_step, lr_of, next_in_column
from loraplus.study.statistics import finite_t_interval
from loraplus.study.worker import OnStep

STARTS: tuple[Start, ...] = ("A-random", "B-random")
RULES = ("α = r", "α = 2r", "α = 16", "rsLoRA, α = 16")
_FIXED_ALPHA = 16
_EVALUATIONS = {TUNING: 1, FINAL: 2}
BY_SEED = "test_loss_by_seed"
_EXPECTED = 10
"""Step of the grid where the best rate is expected for s = 1; a column starts near it."""


class Column(NamedTuple):
    """What is tuned over one rate: a start, a rank, a scale and a λ."""

    start: Start
    rank: int
    scale: float
    lr_ratio: float


def scale_of(rule: str, rank: int) -> float:
    """s by a rule for α, to four digits.

    Example:
        >>> [scale_of(rule, 64) for rule in RULES]
        [1.0, 2.0, 0.25, 2.0]
    """
    values = (1.0, 2.0, _FIXED_ALPHA / rank, _FIXED_ALPHA / math.sqrt(rank))
    return float(f"{values[RULES.index(rule)]:.4g}")


@dataclass(frozen=True)
class Init(Experiment):
    """A random and B zero against the reverse, over ranks and rules for α."""

    width: int = 64
    ranks: tuple[int, ...] = (2, 8, 64)
    lr_ratio: float = 16.0
    steps: int = 200
    batch: int = 16

    name = "init"
    title, claims, scales = DESCRIPTIONS[name]
    assets = ("verses", "rated-snippets")
    main_value = LOSS

    def columns(self) -> list[Column]:
        """λ = 1 for every scale that a rule gives; λ > 1 for α = 2r."""
        columns: dict[Column, None] = {}
        for start in STARTS:
            for rank in self.ranks:
                for rule in RULES:
                    columns[Column(start, rank, scale_of(rule, rank), 1.0)] = None
                columns[Column(start, rank, scale_of("α = 2r", rank), self.lr_ratio)] = None
        return list(columns)

    def settings(self) -> dict[str, Any]:
        own = super().settings()
        width = own.pop("width")  # it says which model
        return own | {
            "model": f"decoder of width {width}",
            "task": small_tasks.BOOK,
            "targets": ["q_proj", "v_proj"],
            "schedule": "linear",
            "warmup": WARMUP,
        }

    def next_runs(self, results: Records) -> Sequence[Run]:
        wanted: list[Run] = []
        for columns in self._groups():
            steps = {c: next_in_column(self._losses(c, results), _first_step(c.scale)) for c in columns}
            wanted += [_run(c, TUNING, step, TUNING_SEED) for c, step in steps.items() if step is not None]
            if all(step is None for step in steps.values()):
                wanted += self._final_runs(self._winner(columns, results), results)
        return [run for run in wanted if run.key not in results]

    def _groups(self) -> list[list[Column]]:
        """Columns of one start, rank and λ, which differ in the rule for α only."""
        groups: dict[tuple[Start, int, float], list[Column]] = {}
        for column in self.columns():
            groups.setdefault((column.start, column.rank, column.lr_ratio), []).append(column)
        return list(groups.values())

    def _winner(self, columns: Sequence[Column], results: Records) -> Column:
        """The column of the lowest loss on the tuning seed."""
        return min(columns, key=lambda column: min(self._losses(column, results).values()))

    def _final_runs(self, column: Column, results: Records) -> list[Run]:
        best = best_step(self._losses(column, results))
        return [_run(column, FINAL, best, seed) for seed in fresh_seeds(self.seeds)]

    def _losses(self, column: Column, results: Records) -> dict[int, float]:
        return {
            result.trial["grid_step"]: result.values[LOSS] if result.status == "done" else math.inf
            for result in results.values()
            if result.trial["phase"] == TUNING and _column_of(result.trial) == column
        }

    def run(self, run: Run, on_step: OnStep) -> Record:
        data = Path(self.data)
        task = small_tasks.load(data, small_tasks.BOOK, self.width)
        adapter = SmallAdapter(run["rank"], run["scale"] * run["rank"], run["start"])
        model = build(small_decoders.obtain(data, self.width), task, adapter, run["seed"])
        order = batches(task.train.ids, self.batch, run["seed"])
        result = train(
            model, task, run["lr"], run["lr_ratio"], steps=self.steps, order=order,
            evaluations=_EVALUATIONS[run["phase"]], on_step=on_step,
        )  # fmt: skip
        return replace(result, trial=run)

    def describe(self, run: Run) -> str:
        """Such as "A-random, rank 8, s 2, tuning: λ 1, η_A 0.003162, seed 0"."""
        return (
            f"{run['start']}, rank {run['rank']}, s {run['scale']:g}, {run['phase']}: λ {run['lr_ratio']:g}, "
            f"η_A {run['lr']:g}, seed {run['seed']}"
        )

    def figures(self, results: Records) -> dict[str, Any]:
        """By column: the best rate and its loss; by start, rank and λ: the losses of the best rule over fresh seeds."""
        tuned, best = [], []
        for columns in self._groups():
            done = [column for column in columns if next_in_column(self._losses(column, results), 0) is None]
            tuned += [self._tuned(column, results) for column in done]
            if len(done) == len(columns):
                winner = self._winner(columns, results)
                runs = self._final_runs(winner, results)
                if all(run.key in results for run in runs):
                    best.append({**winner._asdict(), **_finals([results[run.key] for run in runs])})
        return {"columns": tuned, "best": best}

    def _tuned(self, column: Column, results: Records) -> dict[str, Any]:
        losses = self._losses(column, results)
        best = best_step(losses)
        return {
            **column._asdict(),
            "lr_a": lr_of((column.lr_ratio, best)),
            "optimum": _optimum(losses),
            "tuning_runs": len(losses),
            LOSS: losses[best],
        }

    def report(self, results: Records, figures: Mapping[str, Any]) -> Report:
        tuned = {Column(*(row[name] for name in Column._fields)): row for row in figures["columns"]}
        return Report(
            verdict=[*self._moves(tuned), *self._starts(tuned), *self._gaps(figures["best"])],
            parts=[
                self._table_of_finals(figures["best"]),
                Figure(
                    "best-rate-by-rank",
                    "Where the best rate sits",
                    self._by_rank(tuned, "optimum", "√(η_A·η_B) at the optimum"),
                ),
                Figure("loss-by-rank", "The loss at the best rate", self._by_rank(tuned, LOSS, "validation loss")),
                self._table_of_columns(tuned),
            ],
            method=[
                f"A decoder of width {self.width} tells which of the large books a verse is from; adapters on query "
                f"and value layers, {self.steps} steps of {self.batch} verses, linear schedule.",
                "Every start, rank, scale and λ was tuned on seed 0 in half decades until the best rate lay between "
                "worse neighbours. The optimum is the minimum of the parabola through the best point and its "
                f"neighbours. The best rule of every start, rank and λ was then trained on {self.seeds} fresh seeds.",
                "B is the factor that writes the output in both starts, so with B random λ > 1 speeds up the factor "
                "that is not zero.",
            ],
            limits=[
                "One small model, one task, short runs. A width of 64 is also the largest rank.",
                "Half-decade steps on one seed: differences of less than a factor of about 1.5 between best rates mean "
                "little.",
            ],
        )

    def _moves(self, tuned: Mapping[Column, Mapping[str, Any]]) -> list[str]:
        """How the best rate at λ = 1 goes with the rank under every rule."""
        sentences = []
        for start in STARTS:
            parts = []
            for rule in RULES:
                own = [tuned.get(Column(start, rank, scale_of(rule, rank), 1.0)) for rank in self.ranks]
                first, last = own[0], own[-1]
                if first and last:
                    expected = math.sqrt(_product(rule, self.ranks[0]) / _product(rule, self.ranks[-1]))
                    parts.append(f"{rule}: × {last['optimum'] / first['optimum']:.2g} ({expected:.2g})")
            if parts:
                sentences.append(
                    f"{start}: from rank {self.ranks[0]} to {self.ranks[-1]} the best rate at λ = 1 goes (in brackets: "
                    f"as 1/√(r·s)) {'; '.join(parts)}."
                )
        return sentences

    def _starts(self, tuned: Mapping[Column, Mapping[str, Any]]) -> list[str]:
        """Which start ends lower, over all columns that both have, on the tuning seed."""
        gaps = [
            tuned[column._replace(start="B-random")][LOSS] - own[LOSS]
            for column, own in tuned.items()
            if column.start == "A-random" and column._replace(start="B-random") in tuned
        ]
        if not gaps:
            return []
        lower = sum(gap > 0 for gap in gaps)
        return [
            f"A random and B zero ends lower than the reverse in {lower} of {len(gaps)} pairs of tuned columns; the "
            f"reverse is {math.fsum(gaps) / len(gaps):+.3f} nats off in the mean (one seed)."
        ]

    def _gaps(self, best: Sequence[Mapping[str, Any]]) -> list[str]:
        """What λ > 1 gains over λ = 1 with either start, and what one start over the other, on fresh seeds."""
        losses_of = {(row["start"], row["rank"], row["lr_ratio"]): row[BY_SEED] for row in best}
        kinds = {
            f"{start}: test loss at λ = {self.lr_ratio:g} minus that at λ = 1": ((start, 1.0), (start, self.lr_ratio))
            for start in STARTS
        } | {
            f"B random minus A random, λ = {ratio:g}": (("A-random", ratio), ("B-random", ratio))
            for ratio in (1.0, self.lr_ratio)
        }
        sentences = []
        for kind, ((start, ratio), (other, other_ratio)) in kinds.items():
            parts = []
            for rank in self.ranks:
                one, two = losses_of.get((start, rank, ratio)), losses_of.get((other, rank, other_ratio))
                gap = finite_t_interval([b - a for a, b in zip(one, two, strict=True)]) if one and two else None
                if gap is not None:
                    parts.append(f"rank {rank}: {gap.mean:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]")
            if parts:
                sentences.append(f"{kind}, each at its best rate, paired over fresh seeds: {'; '.join(parts)}.")
        return sentences

    def _table_of_finals(self, best: Sequence[Mapping[str, Any]]) -> Table:
        rows = []
        for row in best:
            loss = row[TEST_LOSS]
            text = interval(loss, 3) if loss else "diverged"
            rows.append([row["start"], row["rank"], row["lr_ratio"], row["scale"], text])
        caption = f"Means over {self.seeds} seeds that nothing was tuned on, with 95% intervals (Student's t)."
        return Table(
            "The best rule of every start, rank and λ", ["start", "rank", "λ", "s", "test loss"], rows, caption
        )

    def _table_of_columns(self, tuned: Mapping[Column, Mapping[str, Any]]) -> Table:
        rows = []
        for column, own in tuned.items():
            rules = ", ".join(rule for rule in RULES if scale_of(rule, column.rank) == column.scale)
            rows.append([column.start, column.rank, rules, column.scale, column.lr_ratio, own["lr_a"],
                         own["optimum"], own["tuning_runs"], own[LOSS]])  # fmt: skip
        names = ["start", "rank", "rule", "s", "λ", "best η_A tried", "√(η_A·η_B) at the optimum", "tuning runs",
                 "validation loss"]  # fmt: skip
        return Table("Every start, rank, rule and λ, tuned on one seed", names, rows)

    def _by_rank(self, tuned: Mapping[Column, Mapping[str, Any]], value: str, label: str) -> list[LinePlot]:
        plots = []
        for start in STARTS:
            series = []
            for place, rule in enumerate(RULES):
                own = [(rank, tuned.get(Column(start, rank, scale_of(rule, rank), 1.0))) for rank in self.ranks]
                points = [(rank, row[value]) for rank, row in own if row]
                if points:
                    ranks, values = zip(*points, strict=True)
                    series.append(Series(rule, ranks, values, colour=place))
            plots.append(LinePlot(f"{start}, λ = 1", "rank", label, series, log_x=True, log_y=value == "optimum"))
        return plots


def _product(rule: str, rank: int) -> float:
    return rank * scale_of(rule, rank)


def _first_step(scale: float) -> int:
    return HALF_DECADE * round((_EXPECTED - HALF_DECADE * math.log10(scale)) / HALF_DECADE)


def _optimum(losses: Mapping[int, float]) -> float:
    """√(η_A·η_B) at the minimum of the parabola through the best step and its neighbours."""
    best = best_step(losses)
    low, mid, high = (losses[best + distance] for distance in (-HALF_DECADE, 0, HALF_DECADE))
    bend = low - 2 * mid + high
    shift = 0.0 if not math.isfinite(bend) or bend <= 0 else HALF_DECADE * (low - high) / (2 * bend)
    return float(f"{1e-3 * 10 ** ((best + shift) / 16):.4g}")


def _run(column: Column, phase: str, step: int, seed: int) -> Run:
    lr = lr_of((column.lr_ratio, step))
    return Run({**column._asdict(), "phase": phase, "grid_step": step, "lr": lr, "seed": seed})


def _column_of(run: Run) -> Column:
    return Column(*(run[name] for name in Column._fields))


def _finals(runs: Sequence[Record]) -> dict[str, Any]:
    """Intervals over the fresh seeds, None where a run diverged, and the test losses by seed, for pairing."""
    losses = {
        name: [run.values[name] if run.status == "done" else math.inf for run in runs] for name in (LOSS, TEST_LOSS)
    }
    estimates = {name: finite_t_interval(values) for name, values in losses.items()}
    return {
        **{name: estimate and estimate.to_dict() for name, estimate in estimates.items()},
        BY_SEED: losses[TEST_LOSS],
    }
