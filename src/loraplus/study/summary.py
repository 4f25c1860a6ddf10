"""From the records of a comparison to `summary.json`: tables, paired differences and what decides.

The schema is described in docs/summary-schema.md; `SCHEMA_VERSION` rises when a field changes meaning or goes away.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, geometric_mean
from typing import Any

from loraplus.errors import DivergedError
from loraplus.study.arms import ALL, REFERENCE
from loraplus.study.learning import TEST, learning, nothing_learnt
from loraplus.study.pairs import (
    Pair,
    cost_ratio,
    decided,
    deciding,
    estimates,
    finished,
    finite_perplexity,
    runs_of,
    seconds_per_step,
)
from loraplus.study.records import ARMS, Record
from loraplus.study.statistics import LEAST_SEEDS, LEVEL
from loraplus.study.verdict import divergence, verdict
from loraplus.tasks.measures import ACCURACY, LOSS, PERPLEXITY, measures_of

SCHEMA_VERSION = 1
_MAIN = "loraplus"


def summarise(records: Sequence[Record], *, config: dict[str, Any], data_facts: dict[str, Any]) -> dict[str, Any]:
    """Draws the conclusions of a comparison.

    Args:
        records: of all phases and arms.
        config: the settings, as saved.
        data_facts: sizes, columns and what was removed.

    Returns:
        The content of summary.json; strict JSON, missing numbers are None.

    Raises:
        DivergedError: every tuning run of an arm diverged, or no seed finished in both LoRA and LoRA+ (or, without
            LoRA+, in LoRA and any other arm).
    """
    there = {record.trial.arm for record in records}
    arms = [arm for arm in ALL if arm in there]
    best = {arm: _best(arm, records) for arm in arms if ALL[arm].tuned}
    measures = measures_of(config)
    further = [arm for arm in arms if arm not in ARMS]
    main, *others = decided([Pair.of(records, "final", arm, measures) for arm in (_MAIN, *further)])
    (untuned,) = decided([Pair.of(records, "untuned", _MAIN, measures)])  # a question of its own
    if not (main.runs if _MAIN in arms else any(pair.runs for pair in others)):
        lost = divergence(records, "final", ARMS if _MAIN in arms else arms)
        raise DivergedError(
            f"no seed's final run finished in both arms ({lost or 'none diverged'}), so there "
            "is nothing to compare; start again with more --tuning-runs or more --seeds"
        )
    runs = {pair.arm: pair.runs for pair in others}
    if _MAIN in arms:
        runs |= {REFERENCE: main.reference, _MAIN: main.runs}
    else:
        runs[REFERENCE] = tuple(record for record in runs_of(records, "final", REFERENCE) if finished(record))
    summary = {
        "schema_version": SCHEMA_VERSION,
        "arms": {arm: _arm(arm, best.get(arm), records, runs[arm], measures) for arm in arms},
        "untuned": _untuned(untuned, records),
        "paired": main.to_dict(),
        "steps_to_target": {**main.steps_to_target(), "steps": runs[REFERENCE][0].steps},
        "data": data_facts,
        "config": config,
        "cost": {"seconds_per_step_ratio": cost_ratio(records, _MAIN)},
        "decision": _decision([main, *others], measures),
    }
    learnt = {arm: learning(runs[arm]) for arm in arms}
    if any(learnt.values()):
        untuned_runs = {REFERENCE: untuned.reference, _MAIN: untuned.runs}
        untuned_learnt = {arm: learning(of_arm) for arm, of_arm in untuned_runs.items()}
        summary["learning"] = {
            "test": TEST,
            "level": LEVEL,
            "arms": learnt,
            "nothing": nothing_learnt(learnt),
            "untuned": untuned_learnt,
            "nothing_untuned": nothing_learnt(untuned_learnt),
        }
    if others:
        summary["paired_with_lora"] = {pair.arm: _paired_with_lora(pair, records) for pair in others}
    summary["verdict"] = verdict(main, untuned, others, records, summary.get("learning"))
    return summary


def _decision(pairs: Sequence[Pair], measures: Sequence[str]) -> dict[str, Any]:
    """What the verdict rests on."""
    return {
        "measure": deciding(measures),
        "test": "paired Student's t over seeds",
        "level": LEVEL,
        "least_seeds": LEAST_SEEDS,
        "correction": "Holm",
        "family": [pair.arm for pair in pairs if pair.differs is not None],
    }


def _paired_with_lora(pair: Pair, records: Sequence[Record]) -> dict[str, Any]:
    return {
        **pair.to_dict(),
        "steps_to_target": pair.steps_to_target(),
        "seconds_per_step_ratio": cost_ratio(records, pair.arm),
    }


def _best(arm: str, records: Sequence[Record]) -> Record:
    """The tuning run with the lowest validation loss."""
    runs = [record for record in runs_of(records, "tuning", arm) if finished(record)]
    if not runs:
        raise DivergedError(f"every tuning run of {ALL[arm].title} diverged")
    return min(runs, key=lambda record: record.eval_loss)


def _at_edge(best: float, tried: Sequence[float]) -> bool:
    """Whether the best rate is the lowest or highest of several; equal up to rounding is the same rate."""
    low, high = (math.isclose(best, edge, rel_tol=1e-6) for edge in (min(tried), max(tried)))
    return low != high


def _arm(
    arm: str, best: Record | None, records: Sequence[Record], runs: Sequence[Record], measures: Sequence[str]
) -> dict[str, Any]:
    tuning = runs_of(records, "tuning", arm)
    tried = [record.trial.geometric_mean_lr for record in tuning]
    return {
        "best": {"lr": best.trial.lr, "lr_ratio": best.trial.lr_ratio} if best else _rates_found(runs),
        "tuning_runs": len(tuning),
        "diverged_runs": sum(not finished(record) for record in tuning),
        "best_at_edge": best is not None and _at_edge(best.trial.geometric_mean_lr, tried),
        "seeds": [record.trial.seed for record in runs],
        "test": estimates(runs, measures) if runs else None,
        "eval": {measure: _on_validation(runs, measure) if runs else None for measure in measures},
        "seconds_per_step": seconds_per_step(records, arm),
    }


def _on_validation(runs: Sequence[Record], measure: str) -> float | None:
    if measure == ACCURACY:
        return fmean(record.eval_accuracy or 0.0 for record in runs)
    loss = fmean(record.eval_loss for record in runs)
    return finite_perplexity(loss) if measure == PERPLEXITY else loss


def _rates_found(runs: Sequence[Record]) -> dict[str, float | None]:
    """Geometric means over the final runs of the rates that a method arrived at by itself."""
    rates = [record.rates_reached for record in runs if record.rates_reached and min(record.rates_reached) > 0]
    if not rates:
        return {"lr": None, "lr_ratio": None}
    lr, lr_b = (geometric_mean(values) for values in zip(*rates, strict=True))
    return {"lr": lr, "lr_ratio": lr_b / lr}


def _untuned(pair: Pair, records: Sequence[Record]) -> dict[str, Any]:
    section: dict[str, Any] = {}
    for arm, runs in ((REFERENCE, pair.reference), (_MAIN, pair.runs)):
        rates = next((r.trial for r in runs_of(records, "untuned", arm)), None)
        section[arm] = {
            "lr": rates.lr if rates else None,
            "lr_ratio": rates.lr_ratio if rates else None,
            "seeds": [record.trial.seed for record in runs],
            "test": estimates(runs, pair.measures) if runs else None,
        }
    kept = (
        "accuracy_difference", "loss_difference", "p_value" if ACCURACY in pair.measures else "loss_p_value", "found",
        "by_seed", "over_examples",
    )  # fmt: skip
    return section | {name: value for name, value in pair.to_dict().items() if name in kept}


def runs_csv_rows(records: Sequence[Record], measures: Sequence[str] = (LOSS, ACCURACY)) -> list[dict[str, Any]]:
    """One row a run, for runs.csv."""
    other = PERPLEXITY if PERPLEXITY in measures else ACCURACY
    return [
        {
            "phase": record.trial.phase,
            "arm": record.trial.arm,
            "lr": record.lr,
            "lr_b": record.lr_b,
            "lr_ratio": record.lr_ratio,
            "seed": record.trial.seed,
            "status": record.status,
            "steps": record.steps,
            "eval_loss": record.eval_loss if math.isfinite(record.eval_loss) else None,
            f"eval_{other}": _on_validation([record], other) if record.status == "done" else None,
            "test_loss": fmean(record.test_losses) if record.test_losses and finished(record) else None,
            f"test_{other}": _on_test(record, other) if record.test_losses and finished(record) else None,
            "seconds_per_step": record.seconds_per_step,
        }
        for record in records
    ]


def _on_test(record: Record, measure: str) -> float | None:
    return finite_perplexity(fmean(record.test_losses)) if measure == PERPLEXITY else fmean(record.test_correct)
