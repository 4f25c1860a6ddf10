"""From the records of a comparison to `summary.json`: tables, paired differences and a verdict in words.

The schema is described in docs/summary-schema.md; `SCHEMA_VERSION` rises when a field changes meaning or goes away.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, geometric_mean
from typing import Any

from loraplus.errors import DivergedError
from loraplus.study.arms import ALL, REFERENCE
from loraplus.study.pairs import (
    Pair,
    cost_ratio,
    diverged,
    estimates,
    finished,
    finite_perplexity,
    runs_of,
    seconds_per_step,
)
from loraplus.study.records import ARMS, Phase, Record, Trial
from loraplus.study.statistics import PairedDifference
from loraplus.tasks.measures import ACCURACY, LOSS, PERPLEXITY, measures_of, perplexity

SCHEMA_VERSION = 1
_FEW_SEEDS = 5
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
    main, untuned = (Pair.of(records, phase, _MAIN, measures) for phase in ("final", "untuned"))
    others = [Pair.of(records, "final", arm, measures) for arm in arms if arm not in ARMS]
    if not (main.runs if _MAIN in arms else any(pair.runs for pair in others)):
        lost = _divergence(records, "final", ARMS if _MAIN in arms else arms)
        raise DivergedError(
            f"no seed's final run finished in both arms ({lost or 'none diverged'}), so there "
            " is nothing to compare; start again with more --tuning-runs or more --seeds"
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
    }
    if others:
        summary["paired_with_lora"] = {pair.arm: _paired_with_lora(pair, records) for pair in others}
    summary["verdict"] = _verdict(main, untuned, others, records, len(runs[REFERENCE]))
    return summary


def _paired_with_lora(pair: Pair, records: Sequence[Record]) -> dict[str, Any]:
    return {
        **pair.to_dict(),
        "steps_to_target": pair.steps_to_target(),
        "seconds_per_step_ratio": cost_ratio(records, pair.arm),
    }


def _divergence(records: Sequence[Record], phase: Phase, arms: Sequence[str] = ARMS) -> str:
    """The words "LoRA+ diverged on 1 of 3 seeds" for the arms that did; else nothing."""
    parts = []
    for arm in arms:
        seeds, lost = {r.trial.seed for r in runs_of(records, phase, arm)}, diverged(records, phase, arm)
        if lost:
            parts.append(f"{ALL[arm].title} diverged on {len(lost)} of {_seeds(len(seeds))}")
    return " and ".join(parts)


def _seeds(count: int) -> str:
    return f"{count} seed{'' if count == 1 else 's'}"


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
    found = [record.found for record in runs if record.found and min(record.found) > 0]
    if not found:
        return {"lr": None, "lr_ratio": None}
    lr, lr_b = (geometric_mean(values) for values in zip(*found, strict=True))
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
    kept = ("accuracy_difference", "loss_difference", "p_value" if ACCURACY in pair.measures else "loss_p_value")
    return section | {name: value for name, value in pair.to_dict().items() if name in kept}


def _signed(value: float, digits: int) -> str:
    """With its sign, and no -0.0."""
    return f"{round(value, digits) + 0.0:+.{digits}f}"


def _points(difference: PairedDifference) -> str:
    d = difference.difference
    mean, low, high = (_signed(100 * value, 1) for value in (d.mean, d.low, d.high))
    return f"{mean} points (95% interval {low} to {high})"


def _verdict(main: Pair, untuned: Pair, others: Sequence[Pair], records: Sequence[Record], seeds: int) -> str:
    """The conclusion in words; "no difference found" where none was."""
    sentences = []
    if main.accuracy and main.loss:
        sentences.append(_main_sentence(main.accuracy, main.loss))
    elif main.loss:
        sentences.append(_main_loss_sentence(main.loss))
    if lost := _divergence(records, "final"):
        sentences.append(f"In these runs {lost}; seeds that an arm diverged on are left out of both.")
    sentences += [_other_sentence(pair, records) for pair in others]
    if trials := {arm: runs[0].trial for arm in ARMS if (runs := runs_of(records, "untuned", arm))}:
        sentences.append(_untuned_sentence(untuned, trials, _divergence(records, "untuned")))
    if seeds < _FEW_SEEDS:
        sentences.append(
            f"This rests on {_seeds(seeds)} an arm, which says little about how results "
            "vary from seed to seed; more --seeds give a firmer answer."
        )
    return " ".join(sentences)


def _loss_words(loss: PairedDifference) -> str:
    d = loss.difference
    return f"test loss {_signed(d.mean, 3)} ({_signed(d.low, 3)} to {_signed(d.high, 3)})"


def _token_loss_words(loss: PairedDifference) -> str:
    d = loss.difference
    return (
        f"{_signed(d.mean, 4)} a token (95% interval {_signed(d.low, 4)} to {_signed(d.high, 4)}), "
        f"perplexity ×{perplexity(d.mean):.4g}"
    )


def _main_loss_sentence(loss: PairedDifference) -> str:
    """LoRA+ against LoRA where loss is what counts."""
    if not loss.found:
        return f"Tuned with equal budgets, no difference found between LoRA+ and LoRA: {_token_loss_words(loss)}."
    word = "better" if loss.difference.mean < 0 else "worse"
    return f"Tuned with equal budgets, LoRA+ is {word} than LoRA in test loss: {_token_loss_words(loss)}."


def _main_sentence(accuracy: PairedDifference, loss: PairedDifference) -> str:
    """LoRA+ against LoRA."""
    if accuracy.found:
        word = "better" if accuracy.difference.mean > 0 else "worse"
        return (
            f"Tuned with equal budgets, LoRA+ is {word} than LoRA in test accuracy: {_points(accuracy)}, "
            f"{_loss_words(loss)}."
        )
    if loss.found:
        word = "lower" if loss.difference.mean < 0 else "higher"
        return (
            f"Tuned with equal budgets, no difference found in test accuracy between LoRA+ and LoRA: "
            f"{_points(accuracy)}; LoRA+ has a {word} {_loss_words(loss)}."
        )
    return (
        f"Tuned with equal budgets, no difference found between LoRA+ and LoRA: {_points(accuracy)}, "
        f"{_loss_words(loss)}."
    )


def _other_sentence(pair: Pair, records: Sequence[Record]) -> str:
    """A further arm against LoRA, with what was spent on its rates."""
    title, tuning_runs = ALL[pair.arm].title, len(runs_of(records, "tuning", pair.arm))
    who = f"{title} ({tuning_runs} tuning run{'' if tuning_runs == 1 else 's'})"
    lost = _divergence(records, "final", [pair.arm])
    if pair.loss is None:
        return f"{who} leaves no seed to compare with LoRA: {lost or 'LoRA diverged'}."
    if pair.accuracy is None:
        differences = _token_loss_words(pair.loss) + (f"; {lost}" if lost else "")
        if not pair.loss.found:
            return f"{who}: no difference found to tuned LoRA: {differences}."
        word = "better" if pair.loss.difference.mean < 0 else "worse"
        return f"{who} is {word} than tuned LoRA in test loss: {differences}."
    differences = f"{_points(pair.accuracy)}, {_loss_words(pair.loss)}" + (f"; {lost}" if lost else "")
    if pair.accuracy.found:
        word = "better" if pair.accuracy.difference.mean > 0 else "worse"
        return f"{who} is {word} than tuned LoRA in test accuracy: {differences}."
    if pair.loss.found:
        word = "lower" if pair.loss.difference.mean < 0 else "higher"
        return f"{who} has a {word} test loss than tuned LoRA, no difference found in test accuracy: {differences}."
    return f"{who}: no difference found to tuned LoRA: {differences}."


def _untuned_sentence(pair: Pair, trials: Mapping[str, Trial], diverged: str) -> str:
    """How the arms stand without a search; an arm that diverged there is part of that picture."""
    rate = next(iter(trials.values())).lr
    ratio = f" (λ = {trials['loraplus'].lr_ratio:g})" if "loraplus" in trials else ""
    at = f"Untuned, at a usual rate of {rate:g}{ratio}"
    if pair.loss is None:
        return f"{at}, {diverged or 'one arm was not run'}: no seed is left to compare."
    left = f" on the seeds that are left, since {diverged}" if diverged else ""
    if pair.accuracy is None:
        judged, words, better = pair.loss, _token_loss_words(pair.loss), pair.loss.difference.mean < 0
    else:
        judged, words, better = pair.accuracy, _points(pair.accuracy), pair.accuracy.difference.mean > 0
    if not judged.found:
        return f"{at}, no difference found{left}: {words}."
    return f"{at}, LoRA+ is {'ahead of' if better else 'behind'} LoRA{left}: {words}."


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
