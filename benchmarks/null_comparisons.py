"""How often `compare` finds a difference where there is none, and where there is one. No training: runs are drawn.

    python benchmarks/null_comparisons.py            draws everything anew, in some minutes
    python benchmarks/null_comparisons.py --table    what the committed results come to

A run is right on example e with probability σ(skill of the run + ease of the example). Skills are drawn run by run and
spread over seeds by 2.5 or 3 points of accuracy; eases are drawn once a comparison, so the same examples are hard for
every run. The rule is the project's own (`loraplus.study.statistics.decisions`). Beside it stand what the p over test
examples would have said, the rule that was used before (a bootstrap over seeds and examples, and that p), and what the
rule does with two methods that are level over all examples but are each better at examples of its own.
"""

from __future__ import annotations

import argparse
import csv
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import expit, ndtri

from loraplus.files.single import write_csv
from loraplus.study.statistics import LEAST_SEEDS, LEVEL, decisions, t_test

Floats = NDArray[np.float64]

RESULTS = Path(__file__).parent / "results" / "null-comparisons.csv"
ACCURACY = 0.8
LEVELS = 33
"""Eases come in so many steps, so that a run's score is a sum of binomials; finer ones change nothing."""
ARMS = ("loraplus", "second", "third", "fourth")
TASTE = 1.0
"""Standard deviation, in logits, of how much easier an example is for one method than for the other."""


@dataclass(frozen=True)
class Setting:
    """What is compared: seeds an arm, test examples, points that seeds spread by, how much the examples differ."""

    seeds: int
    examples: int
    spread: float = 2.5
    ease_sd: float = 2.0

    @property
    def eases(self) -> Floats:
        """Equally frequent steps of a normal distribution."""
        return self.ease_sd * ndtri((np.arange(LEVELS) + 0.5) / LEVELS)

    @property
    def skill(self) -> float:
        """Logit at which a run is right on four of five examples."""
        return float(brentq(lambda skill: expit(skill + self.eases).mean() - ACCURACY, -20, 20))

    @property
    def slope(self) -> float:
        """Accuracy per logit of skill."""
        right = expit(self.skill + self.eases)
        return float((right * (1 - right)).mean())

    def skills(self, generator: np.random.Generator, comparisons: int, difference: float) -> Floats:
        """Of LoRA and the other arms, shape (comparisons, 1 + arms, seeds); LoRA+ is ahead by `difference` points."""
        size = (comparisons, 1 + len(ARMS), self.seeds)
        skills = self.skill + self.spread / 100 / self.slope * generator.standard_normal(size)
        skills[:, 1] += difference / 100 / self.slope
        return skills


def accuracies(generator: np.random.Generator, setting: Setting, comparisons: int, difference: float = 0.0) -> Floats:
    """Accuracies of LoRA and the other arms, shape (comparisons, 1 + arms, seeds)."""
    skills = setting.skills(generator, comparisons, difference)
    test_sets = generator.multinomial(setting.examples, [1 / LEVELS] * LEVELS, comparisons)
    right = generator.binomial(test_sets[:, None, None, :], expit(skills[..., None] + setting.eases))
    return right.sum(axis=-1) / setting.examples


def verdicts(
    generator: np.random.Generator, setting: Setting, comparisons: int, difference: float = 0.0
) -> dict[str, float]:
    """Shares of the comparisons that end with a finding.

    Returns:
        "alone": LoRA+ is found to differ from LoRA, in the right direction if it does. "family": with three more arms
        that are no different from LoRA; any of the four where nothing differs, else LoRA+.
    """
    alone = family = 0
    for reference, *arms in accuracies(generator, setting, comparisons, difference):
        by_seed = {name: arm - reference for name, arm in zip(ARMS, arms, strict=True)}
        right = not difference or by_seed[ARMS[0]].mean() > 0
        alone += is_significant(decisions({ARMS[0]: by_seed[ARMS[0]]}, 1 / setting.examples)[ARMS[0]]) and right
        of_all = decisions(by_seed, 1 / setting.examples)
        family += (
            (is_significant(of_all[ARMS[0]]) and right) if difference else any(map(is_significant, of_all.values()))
        )
    return {"alone": alone / comparisons, "family": family / comparisons}


def is_significant(p: float | None) -> bool:
    return p is not None and p < LEVEL


def scores(generator: np.random.Generator, setting: Setting, taste: float = 0.0) -> NDArray[np.float32]:
    """One comparison example by example: LoRA+ − LoRA, shape (seeds, examples)."""
    eases = setting.ease_sd * generator.standard_normal(setting.examples)
    tastes = taste * generator.standard_normal((2, 1, setting.examples))
    logits = setting.skills(generator, 1, 0.0)[0, :2, :, None] + eases + tastes
    right = generator.random(logits.shape, dtype=np.float32) < expit(logits.astype(np.float32))
    return right[1].astype(np.float32) - right[0]


def beside(generator: np.random.Generator, setting: Setting, comparisons: int) -> dict[str, float]:
    """Shares of null comparisons in which other rules find something, and in which ours does where examples differ."""
    draws = 999
    examples = generator.multinomial(setting.examples, [1 / setting.examples] * setting.examples, draws)
    weights = (examples / setting.examples).astype(np.float32)
    over_examples = before = own = 0
    for _ in range(comparisons):
        difference = scores(generator, setting)
        by_examples = is_significant(t_test(difference.mean(axis=0)))
        over_examples += by_examples
        if by_examples:
            seeds = generator.multinomial(setting.seeds - 1, [1 / setting.seeds] * setting.seeds, draws)
            means = ((weights @ difference.T) * seeds).sum(axis=1) / (setting.seeds - 1)
            low, high = np.quantile(means, [LEVEL / 2, 1 - LEVEL / 2])
            before += bool(low > 0 or high < 0)
        by_seed = scores(generator, setting, TASTE).mean(axis=1)
        own += is_significant(decisions({ARMS[0]: by_seed}, 1 / setting.examples)[ARMS[0]])
    shares = {"over_examples": over_examples, "rule_before": before, "own_examples": own}
    return {name: count / comparisons for name, count in shares.items()}


TABLES = (
    {
        "LoRA+ alone": ("alone", "0"),
        "any of four arms": ("family", "0"),
        "p over examples < 0.05": ("over_examples", "0"),
        "earlier rule": ("rule_before", "0"),
        "own examples": ("own_examples", "0"),
    },
    {
        f"{points} point{'s' if points > '1' else ''}, {words}": (name, points)
        for points in ("1", "2", "4")
        for name, words in (("alone", "alone"), ("family", "of four arms"))
    },
)


def table() -> None:
    """For seeds and test examples, the lowest and highest share over spreads and eases, as in docs/comparisons.md."""
    with RESULTS.open(newline="") as file:
        rows = list(csv.DictReader(file))

    def shares(column: str, difference: str, seeds: str, examples: str) -> str:
        values = [
            100 * float(row[column])
            for row in rows
            if (row["seeds"], row["examples"], row["difference"]) == (seeds, examples, difference)
        ]
        return f"{min(values):.1f} to {max(values):.1f}%" if values else "–"

    for columns in TABLES:
        print("| seeds | test examples |", " | ".join(columns), "|")
        print("|" + "---|" * (2 + len(columns)))
        for seeds in dict.fromkeys(row["seeds"] for row in rows):
            for examples in dict.fromkeys(row["examples"] for row in rows):
                cells = [shares(name, points, seeds, examples) for name, points in columns.values()]
                if "–" not in cells:
                    print("|", " | ".join([seeds, f"{int(examples):,}", *cells]), "|")
        print()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--comparisons",
        type=int,
        default=10_000,
        help="Drawn for each row; a fifth where there is a difference, a twentieth example by example.",
    )
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="Draw nothing; show the committed results.")
    options = parser.parse_args()
    if options.table:
        table()
        return
    rows: list[dict[str, Any]] = []
    for spread, ease_sd in ((2.5, 0.0), (2.5, 2.0), (3.0, 0.0), (3.0, 2.0)):
        for examples in (400, 20_000):
            for seeds in (2, 3, 5, 10):
                setting = Setting(seeds, examples, spread, ease_sd)
                for difference in (0, 1, 2, 4) if seeds >= LEAST_SEEDS else (0,):
                    generator = np.random.default_rng([seeds, examples, int(10 * spread), int(ease_sd), difference])
                    count = options.comparisons if not difference else options.comparisons // 5
                    shares = verdicts(generator, setting, count, difference)
                    if not difference:
                        shares |= beside(generator, setting, options.comparisons // 20)
                    rows.append({**asdict(setting), "difference": difference, "comparisons": count, **shares})
                    print(rows[-1], flush=True)
    write_csv(options.output, rows)


if __name__ == "__main__":
    main()
