r"""The paper's toy model: loss over (η_A, η_B), and how the best pair moves with the width.

    f(x) = W_out φ(s·B A h),    h = φ(W_in x),    h_k = Θ(1),  A_jk = Θ(n^−½),  B = 0,  (W_out)_i = Θ(n^−c)

The paper derives for Adam that the adapted layer's output moves by Θ(1) through both factors if η_A = Θ(1/n) and
η_B = Θ(1) (section 3). What follows is our own derivation of when the *output* f moves by Θ(1) as well, which bounds
the rates from above; e = ∂L/∂f = Θ(1), z = A h = Θ(1).

Adam moves each entry by about η, with the sign of its gradient. ΔB is aligned with W_out: Δf = Σ_i (W_out)_i ΔB_i z =
Θ(n^(1−c) η_B), so η_B = Θ(n^(c−1)), and then BᵀW_out = Θ(1). ΔA is aligned with h: ΔA h = Θ(n η_A), Δf = Θ(n η_A), so
η_A = Θ(1/n). With c = 1 this is the paper's condition, λ = Θ(n). With the usual variance 1/n, c = ½, a step of size
Θ(1) in the layer's output would move f by √n, so η_B = Θ(n^−½) and λ = Θ(n^½).

SGD moves along the gradient: ∂L/∂B_i = e (W_out)_i φ' z = Θ(n^−c), so Δf = Θ(η_B n^(1−2c)) and η_B = Θ(n^(2c−1)); then
BᵀW_out = Θ(1), ∂L/∂A = Θ(1)·h, ΔA h = Θ(n η_A) and η_A = Θ(1/n). λ = Θ(n) for c = ½ and Θ(n²) for c = 1, where the
layer's output moves by Θ(1) too, as the paper's condition asks.

Source: Hayou, Ghosh, Yu, arXiv 2402.12354, sections 2 and 3 and figure 2.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from loraplus.reproduce import toy_model
from loraplus.reproduce.descriptions import DESCRIPTIONS
from loraplus.reproduce.experiment import Experiment, Record, Records, Run, mean
from loraplus.reproduce.report import Figure, HeatMap, LinePlot, Report, Series, Table, banded, interval
from loraplus.study.search.blocks import Block, BlockGrid, Point, best, centre_of, good_region, rates
from loraplus.study.statistics import exponent, t_interval
from loraplus.study.wording import counted
from loraplus.study.worker import OnStep

WIDTHS = (64, 128, 256, 512, 1024, 2048, 4096)
MAP_WIDTH = 100
STEPS = 100
BATCH = 64
WITHIN = 1.05
"""Pairs whose loss is within 5% of the lowest count as equally good; their centre is what is fitted."""
Tables = dict[tuple[Any, ...], dict[Point, float]]
QUANTITIES = {"lr_a": "η_A", "lr_b": "η_B", "lr_ratio": "λ"}


@dataclass(frozen=True)
class Family:
    """Networks of all widths with one optimizer and one size of W_out.

    Args:
        optimizer: adam or sgd.
        readout: `standard` for W_out of variance 1/n, `small` for entries of order 1/n.
        title: In words.
        start: Where the search starts at width 64.
        exponents: Of the best η_A and η_B in n, as the theory has them (`toy.py`).
    """

    optimizer: toy_model.Optimizer
    readout: str
    title: str
    start: Point
    exponents: tuple[float, float]

    @property
    def readout_power(self) -> float:
        """c of W_out = Θ(n^−c)."""
        return 0.5 if self.readout == "standard" else 1.0

    def centre(self, width: int) -> Point:
        """Where the search starts: along the theory's slopes. It may end anywhere."""
        growth = 2 * math.log10(width / 64)
        a, b = (round(at + growth * power) for at, power in zip(self.start, self.exponents, strict=True))
        return a, b


FAMILIES = (
    Family("adam", "small", "Adam, W_out of order 1/n", (-2, -1), (-1.0, 0.0)),
    Family("adam", "standard", "Adam, W_out of variance 1/n", (-3, -2), (-1.0, -0.5)),
    Family("sgd", "small", "SGD, W_out of order 1/n", (-2, 4), (-1.0, 1.0)),
    Family("sgd", "standard", "SGD, W_out of variance 1/n", (-1, 1), (-1.0, 0.0)),
)


@dataclass(frozen=True)
class Toy(Experiment):
    """The toy model at the published size (d = 5, n = 100, r = 4) and at seven widths."""

    widths: tuple[int, ...] = WIDTHS
    map_width: int = MAP_WIDTH
    steps: int = STEPS

    name = "toy"
    title, claims, scales = DESCRIPTIONS[name]

    def settings(self) -> dict[str, Any]:
        return super().settings() | {
            "inputs": toy_model.INPUTS, "rank": toy_model.RANK, "scaling": toy_model.SCALING, "activation": "silu",
            "noise": toy_model.NOISE, "train_points": toy_model.TRAIN_POINTS, "test_points": toy_model.TEST_POINTS,
            "betas": toy_model.BETAS, "batch": BATCH, "schedule": "linear decay to 0", "within": WITHIN,
            "families": [f"{family.optimizer}/{family.readout}" for family in FAMILIES],
        }  # fmt: skip

    def needs(self) -> list[str]:
        return ["no data and no model", "about 5 minutes on two idle cores with 3 seeds"]

    def describe(self, run: Run) -> str:
        tied = " diagonal" if run["shape"] == "diagonal" else ""
        return f"{run['optimizer']} W_out {run['readout']} n {run['width']} seed {run['seed']}{tied}"

    def main(self, result: Record) -> tuple[str, float] | None:
        return "lowest_test_loss", min(float(row["test_loss"]) for row in result.rows)

    def next_runs(self, results: Records) -> Sequence[Run]:
        widths = sorted({*self.widths, self.map_width}, reverse=True)
        tables = _tables(results)
        return [run for width in widths for family in FAMILIES for run in self._missing(family, width, results, tables)]

    def _missing(self, family: Family, width: int, results: Records, tables: Tables) -> list[Run]:
        per_seed = [tables[family.optimizer, family.readout, width, seed] for seed in range(self.seeds)]
        joint = _over_seeds(per_seed)
        tried = dict.fromkeys(_blocks(family, width, results, self.seeds), joint)
        wanted = BlockGrid(family.centre(width)).next(tried)
        runs = [_run(family, width, seed, block) for block in wanted for seed in range(self.seeds)]
        return [run for run in runs if run.key not in results]

    def _per_seed(self, family: Family, width: int, tables: Tables) -> list[dict[Point, float]]:
        return [tables[family.optimizer, family.readout, width, seed] for seed in range(self.seeds)]

    def run(self, run: Run, on_step: OnStep) -> Record:
        torch.set_flush_denormal(True)  # what decays to nothing would slow the rest down
        family = next(f for f in FAMILIES if (f.optimizer, f.readout) == (run["optimizer"], run["readout"]))
        block = Block(run["shape"], run["a_from"], run["a_to"], run["b_from"], run["b_to"])
        model = toy_model.frozen(run["width"], run["seed"], family.readout_power)
        lr_a, lr_b = (torch.tensor(column) for column in zip(*map(rates, block.points), strict=True))
        losses = toy_model.train(
            model, family.optimizer, lr_a, lr_b, steps=self.steps, batch=BATCH, seed=run["seed"], on_part=on_step
        )
        rows = [
            {"log_a": a / 2, "log_b": b / 2, "train_loss": _digits(train), "test_loss": _digits(test)}
            for (a, b), train, test in zip(block.points, losses.train.tolist(), losses.test.tolist(), strict=True)
        ]
        return Record(run, "done", rows=tuple(rows))

    def figures(self, results: Records) -> dict[str, Any]:
        """For each family: fitted exponents beside the theory's, the best pairs by width, the cost of a tied rate."""
        tables = _tables(results)
        return {
            f"{family.optimizer}/{family.readout}": {
                "title": family.title,
                "exponents": self._exponents(family, tables),
                "theory": dict(zip(QUANTITIES, _theory(family), strict=True)),
                "widths": {str(width): self._at(family, width, tables) for width in self.widths},
                "map": self._at(family, self.map_width, tables),
            }
            for family in FAMILIES
        }

    def _exponents(self, family: Family, tables: Tables) -> dict[str, dict[str, float]]:
        by_width = [[_best_logs(losses) for losses in self._per_seed(family, width, tables)] for width in self.widths]
        tracks = list(zip(*by_width, strict=True))  # one a seed
        return {
            quantity: exponent(self.widths, [[logs[place] for logs in track] for track in tracks]).to_dict()
            for place, quantity in enumerate(QUANTITIES)
        }

    def _at(self, family: Family, width: int, tables: Tables) -> dict[str, Any]:
        per_seed = self._per_seed(family, width, tables)
        joint = _over_seeds(per_seed)
        point, tied = best(joint), best(joint, _is_tied)
        logs = [_best_logs(losses) for losses in per_seed]
        return {
            "best": {"lr_a": rates(point)[0], "lr_b": rates(point)[1], "loss": joint[point]},
            "best_tied": {"lr": rates(tied)[0], "loss": joint[tied]},
            "inside": all((point[0] + da, point[1] + db) in joint for da in (-1, 0, 1) for db in (-1, 0, 1)),
            "log10": {
                quantity: t_interval([row[place] for row in logs]).to_dict()
                for place, quantity in enumerate(QUANTITIES)
            },
            "tied_over_best": _tied_over_best(per_seed),
        }

    def report(self, results: Records, figures: Mapping[str, Any]) -> Report:
        parts: list[Table | Figure] = [self._maps(_tables(results))]
        for family in FAMILIES:
            of_family = figures[f"{family.optimizer}/{family.readout}"]
            parts += [_track_figure(family, of_family, self.widths), _track_table(family, of_family)]
        parts.append(_tied_figure(figures, self.widths))
        ratios = [of_family["exponents"]["lr_ratio"] for of_family in figures.values()]
        grows = sum(exponent["low"] > 0 for exponent in ratios)
        headline = f"The best λ grows with the width in {grows} of {counted(len(ratios), 'setting')}"
        return Report(_verdict(figures, self.map_width), parts, _METHOD, _LIMITS, headline)

    def _maps(self, tables: Tables) -> Figure:
        plots = []
        for family in FAMILIES:
            joint = _over_seeds(self._per_seed(family, self.map_width, tables))
            plots.append(_heat_map(family, joint))
        return Figure(
            f"map-{self.map_width}",
            f"Loss over (η_A, η_B) at width {self.map_width}",
            plots,
            "Geometric mean of the test loss over the seeds. Grey or white: diverged, or not tried. "
            "Losses above that of a constant share the darkest colour.",
        )


def _tables(results: Records) -> Tables:
    """Test losses of all points, by optimizer, W_out, width and seed."""
    tables: Tables = defaultdict(dict)
    for result in results.values():
        table = tables[tuple(result.trial.params[name] for name in ("optimizer", "readout", "width", "seed"))]
        for row in result.rows:
            table[round(2 * float(row["log_a"])), round(2 * float(row["log_b"]))] = float(row["test_loss"])
    return tables


def _blocks(family: Family, width: int, results: Records, seeds: int) -> list[Block]:
    """The blocks that have been trained with all seeds."""
    own = {"optimizer": family.optimizer, "readout": family.readout, "width": width}
    runs_of: Counter[Block] = Counter()
    for result in results.values():
        params = result.trial.params
        if own.items() <= params.items() and params["seed"] < seeds:
            runs_of[Block(*(params[name] for name in ("shape", "a_from", "a_to", "b_from", "b_to")))] += 1
    return [block for block, count in runs_of.items() if count == seeds]


def _run(family: Family, width: int, seed: int, block: Block) -> Run:
    return Run({
        "optimizer": family.optimizer, "readout": family.readout, "width": width, "seed": seed, "shape": block.shape,
        "a_from": block.a_from, "a_to": block.a_to, "b_from": block.b_from, "b_to": block.b_to,
    })  # fmt: skip


def _digits(loss: float) -> float:
    return float(f"{loss:.4g}")


def _is_tied(point: Point) -> bool:
    return point[0] == point[1]


def _theory(family: Family) -> tuple[float, float, float]:
    a, b = family.exponents
    return a, b, b - a


def _over_seeds(per_seed: Sequence[Mapping[Point, float]]) -> dict[Point, float]:
    """Geometric means of the pairs that all seeds have tried; one that diverged with one seed has diverged."""
    tried = set.intersection(*map(set, per_seed))
    return {
        point: math.exp(logs) if math.isfinite(logs := mean([_log(losses[point]) for losses in per_seed])) else math.inf
        for point in sorted(tried)
    }


def _log(loss: float) -> float:
    return math.log(loss) if loss > 0 else -math.inf


def _best_logs(losses: Mapping[Point, float]) -> tuple[float, float, float]:
    """log10 of η_A, η_B and λ at the centre of what is within 5% of the best."""
    a, b = centre_of(good_region(losses, WITHIN))
    return a, b, b - a


def _tied_over_best(per_seed: Sequence[Mapping[Point, float]]) -> dict[str, Any]:
    """Loss of the best tied rate over that of the best pair, on each seed as the other seeds would choose them.

    A choice that diverges on the seed it is judged on leaves no ratio there; such seeds are counted.
    """
    logs: list[float] = []
    diverged = {"pair": 0, "tied": 0}
    for place, held_out in enumerate(per_seed):
        chosen_on = _over_seeds([losses for other, losses in enumerate(per_seed) if other != place] or per_seed)
        losses = {"pair": held_out[best(chosen_on)], "tied": held_out[best(chosen_on, _is_tied)]}
        for name, loss in losses.items():
            diverged[name] += not math.isfinite(loss)
        if all(map(math.isfinite, losses.values())):
            logs.append(_log(losses["tied"]) - _log(losses["pair"]))
    estimate = t_interval(logs).through(math.exp).to_dict() if logs else {}
    return {**estimate, "seeds": len(logs), "diverged": diverged}


def _factor(figures: Mapping[str, Any]) -> str:
    """How many times the loss, in words, and on how many seeds where a choice diverged on some."""
    away = [f"the {what} on {count}" for what, count in figures["diverged"].items() if count]
    if not figures["seeds"]:
        return "has no figure (a choice diverged on every seed)"
    text = f"has {interval(figures)} times the loss of the best pair, both chosen on other seeds"
    return text + (f" ({figures['seeds']} seeds; the choice diverged for {' and '.join(away)} more)" if away else "")


def _heat_map(family: Family, joint: Mapping[Point, float]) -> HeatMap:
    columns, rows = (sorted({point[axis] for point in joint if not _is_tied(point)}) for axis in (0, 1))
    rectangle = [[joint.get((a, b)) for a in columns] for b in rows]
    point, tied = best(joint), best(joint, _is_tied)
    return HeatMap(
        family.title, "η_A", "η_B", "test loss",
        x=[rates((a, 0))[0] for a in columns], y=[rates((0, b))[1] for b in rows],
        z=[[loss if loss is not None and math.isfinite(loss) else None for loss in row] for row in rectangle],
        marks=[("best pair", *rates(point)), ("best with λ = 1", *rates(tied))], z_max=0.45, log_z=True,
    )  # fmt: skip


def _track_figure(family: Family, of_family: Mapping[str, Any], widths: Sequence[int]) -> Figure:
    plots = []
    for place, (quantity, symbol) in enumerate(QUANTITIES.items()):
        logs = [of_family["widths"][str(width)]["log10"][quantity] for width in widths]
        centre = sum(log["mean"] for log in logs) / len(logs)
        middle = sum(math.log10(width) for width in widths) / len(widths)
        slope = of_family["theory"][quantity]
        name = f"measured, exponent {interval(of_family['exponents'][quantity])}"
        rates_found = [{bound: 10**value for bound, value in log.items()} for log in logs]
        measured = banded(name, widths, rates_found, colour=place)
        theory = Series(
            f"slope {slope:g}", widths, [10 ** (centre + slope * (math.log10(width) - middle)) for width in widths],
            dashed=True, markers=False, colour=place,
        )  # fmt: skip
        plots.append(LinePlot(f"best {symbol}", "width n", symbol, [measured, theory], log_x=True, log_y=True))
    return Figure(
        f"best-{family.optimizer}-{family.readout}",
        f"{family.title}: the best rates by width",
        plots,
        "Centre of all pairs whose loss is within 5% of the lowest: mean over the seeds with its 95% interval. "
        "Dashed: the theory's slope, through the middle of the measured points.",
    )


def _track_table(family: Family, of_family: Mapping[str, Any]) -> Table:
    rows = [
        [
            int(width), at["best"]["lr_a"], at["best"]["lr_b"], at["best"]["lr_b"] / at["best"]["lr_a"],
            at["best"]["loss"], at["best_tied"]["lr"], at["best_tied"]["loss"], "yes" if at["inside"] else "no",
        ]
        for width, at in of_family["widths"].items()
    ]  # fmt: skip
    columns = ("n", "η_A", "η_B", "λ", "loss", "best tied η", "loss at λ = 1", "inside")
    return Table(f"{family.title}: the pair with the lowest mean loss", columns, rows)


def _tied_figure(figures: Mapping[str, Any], widths: Sequence[int]) -> Figure:
    plots = []
    for of_family in figures.values():
        at = [of_family["widths"][str(width)] for width in widths]
        both = [
            Series("best pair", widths, [row["best"]["loss"] for row in at]),
            Series("best with λ = 1", widths, [row["best_tied"]["loss"] for row in at], dashed=True),
        ]
        plots.append(LinePlot(of_family["title"], "width n", "test loss", both, log_x=True, log_y=True))
    return Figure(
        "tied-by-width",
        "What one rate for both costs",
        plots,
        "Test loss, geometric mean over the seeds, of the best pair and of the best tied rate.",
    )


def _verdict(figures: Mapping[str, Any], map_width: int) -> list[str]:
    sentences = []
    for of_family in figures.values():
        at, exponents = of_family["map"], of_family["exponents"]
        widest = list(of_family["widths"])[-1]
        factor = _factor(of_family["widths"][widest]["tied_over_best"])
        theory = ", ".join(f"{QUANTITIES[name]} {value:g}" for name, value in of_family["theory"].items())
        measured = ", ".join(f"{QUANTITIES[name]} {interval(value)}" for name, value in exponents.items())
        sentences.append(
            f"{of_family['title']}: at n = {map_width} the best pair has λ = "
            f"{at['best']['lr_b'] / at['best']['lr_a']:.3g} "
            f"(centre of the good region: {10 ** at['log10']['lr_ratio']['mean']:.3g}); exponents in n: {measured}; "
            f"theory: {theory}. At n = {widest} the best tied rate {factor}.{_at_edge(of_family)}"
        )
    return sentences


def _at_edge(of_family: Mapping[str, Any]) -> str:
    """The widths whose best pair is at the edge of the grid, and what that means; else empty."""
    widths = [width for width, at in of_family["widths"].items() if not at["inside"]]
    if not widths:
        return ""
    return f" At n = {', '.join(widths)} the best pair is at the edge of the grid, so these exponents tell nothing."


_METHOD = (
    "d = 5 inputs, rank 4, s = 1; target sin(Σx/√d), 1,000 training points with noise of standard deviation 0.05, 512 "
    "test points without; W_in of variance 1/d and A of variance 1/n, B = 0; W_out of variance 1/n or with entries of "
    "order 1/n. φ is SiLU: with ReLU, B = 0 has no gradient at all. Batches of 64, 100 steps, linear decay to 0.",
    "Every seed has its own data, weights and order. Rates are half a decade apart; the grid is extended until the "
    "pair with the lowest mean loss has neighbours on all sides, and the best tied rate too.",
    "A best pair is uncertain along the ridge η_A·η_B = const, so what is fitted is, for each seed and width, the "
    "centre of all pairs within 5% of the lowest loss. Exponents are least-squares slopes of its logarithm over log n "
    "for each seed; intervals are Student's t over the seeds.",
)
_LIMITS = (
    "Intervals know of nothing but the seeds; with three of them they are wide.",
    "The theory is about large n and a fixed number of steps; at small n its terms that vanish are still there.",
    "One task, one rank, one training length: where the best pair lies depends on all three.",
)
