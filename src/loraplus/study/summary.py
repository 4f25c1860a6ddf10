"""From the records of a comparison to `summary.json`: tables, paired differences and a verdict in words.

The schema is described in docs/summary-schema.md; `SCHEMA_VERSION` rises when a field changes meaning or goes away.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any

from loraplus.errors import DivergedError
from loraplus.study.records import ARM_TITLES, ARMS, Arm, Phase, Record, Trial
from loraplus.study.statistics import PairedDifference, bootstrap_mean, paired_difference, steps_to_target

SCHEMA_VERSION = 1
_FEW_SEEDS = 5


def summarise(records: Sequence[Record], *, config: dict[str, Any], data_facts: dict[str, Any]) -> dict[str, Any]:
    """Draws the conclusions of a comparison.

    Args:
        records: of all phases.
        config: the settings, as saved.
        data_facts: sizes, columns and what was removed.

    Returns:
        The content of summary.json; strict JSON, missing numbers are None.

    Raises:
        DivergedError: every tuning run of an arm diverged, or no seed finished in both arms.
    """
    final = _paired_records(records, "final")
    untuned = _paired_records(records, "untuned")
    best = {arm: _best(arm, records) for arm in ARMS}
    accuracy, loss = _differences(final)
    if accuracy is None or loss is None:
        raise DivergedError(
            f"no seed's final run finished in both arms ({_divergence(records, 'final') or 'none diverged'}), so there "
            "is nothing to compare; start again with more --tuning-runs or more --seeds"
        )
    summary = {
        "schema_version": SCHEMA_VERSION,
        "arms": {arm: _arm(arm, best[arm], records, final) for arm in ARMS},
        "untuned": _untuned(untuned, records),
        "paired": {
            "accuracy_difference": accuracy.difference.to_dict(),
            "loss_difference": loss.difference.to_dict(),
            "p_value": accuracy.p_value,
            "p_value_over_seeds": accuracy.p_value_over_seeds,
            "loss_p_value": loss.p_value,
            "loss_p_value_over_seeds": loss.p_value_over_seeds,
            "diverged_seeds": len(set().union(*(_diverged(records, "final", arm) for arm in ARMS))),
        },
        "steps_to_target": _steps_to_target(final),
        "data": data_facts,
        "config": config,
    }
    seconds = [summary["arms"][arm]["seconds_per_step"] for arm in ARMS]
    summary["cost"] = {"seconds_per_step_ratio": seconds[1] / seconds[0] if all(seconds) else None}
    summary["verdict"] = _verdict(accuracy, loss, _differences(untuned), records, len(final["lora"]))
    return summary


def _of(records: Sequence[Record], phase: Phase, arm: Arm) -> list[Record]:
    found = [record for record in records if record.trial.phase == phase and record.trial.arm == arm]
    return sorted(found, key=lambda record: record.trial.seed)


def _finished(record: Record) -> bool:
    """Whether a run ended well: a loss can become NaN at the last evaluation, too late to stop the run."""
    losses = (record.eval_loss, *record.test_losses)
    return record.status == "done" and all(math.isfinite(loss) for loss in losses)


def _diverged(records: Sequence[Record], phase: Phase, arm: Arm) -> set[int]:
    """Seeds that an arm diverged on."""
    return {record.trial.seed for record in _of(records, phase, arm) if not _finished(record)}


def _divergence(records: Sequence[Record], phase: Phase) -> str:
    """The words "LoRA+ diverged on 1 of 3 seeds" for the arms that did; else nothing."""
    parts = []
    for arm in ARMS:
        seeds, diverged = {r.trial.seed for r in _of(records, phase, arm)}, _diverged(records, phase, arm)
        if diverged:
            parts.append(f"{ARM_TITLES[arm]} diverged on {len(diverged)} of {_seeds(len(seeds))}")
    return " and ".join(parts)


def _seeds(count: int) -> str:
    return f"{count} seed{'' if count == 1 else 's'}"


def _paired_records(records: Sequence[Record], phase: Phase) -> dict[Arm, list[Record]]:
    """The runs of a phase on the seeds that both arms finished."""
    done = {arm: [r for r in _of(records, phase, arm) if _finished(r)] for arm in ARMS}
    common = set.intersection(*({r.trial.seed for r in done[arm]} for arm in ARMS))
    return {arm: [r for r in done[arm] if r.trial.seed in common] for arm in ARMS}


def _scores(runs: Sequence[Record], kind: str) -> list[list[float]]:
    return [[float(value) for value in (r.test_correct if kind == "accuracy" else r.test_losses)] for r in runs]


def _differences(pairs: dict[Arm, list[Record]]) -> tuple[PairedDifference | None, PairedDifference | None]:
    """LoRA+ − LoRA in accuracy and in loss."""
    if not pairs["lora"]:
        return None, None
    accuracy, loss = (
        paired_difference(_scores(pairs["lora"], kind), _scores(pairs["loraplus"], kind))
        for kind in ("accuracy", "loss")
    )
    return accuracy, loss


def _test(runs: Sequence[Record]) -> dict[str, Any]:
    return {kind: bootstrap_mean(_scores(runs, kind)).to_dict() for kind in ("loss", "accuracy")}


def _best(arm: Arm, records: Sequence[Record]) -> Record:
    """The tuning run with the lowest validation loss."""
    finished = [record for record in _of(records, "tuning", arm) if _finished(record)]
    if not finished:
        raise DivergedError(f"every tuning run of {ARM_TITLES[arm]} diverged")
    return min(finished, key=lambda record: record.eval_loss)


def _at_edge(best: float, tried: Sequence[float]) -> bool:
    """Whether the best rate is the lowest or highest of several; equal up to rounding is the same rate."""
    low, high = (math.isclose(best, edge, rel_tol=1e-6) for edge in (min(tried), max(tried)))
    return low != high


def _arm(arm: Arm, best: Record, records: Sequence[Record], final: dict[Arm, list[Record]]) -> dict[str, Any]:
    tuning = _of(records, "tuning", arm)
    runs = final[arm]
    return {
        "best": {"lr": best.trial.lr, "lr_ratio": best.trial.lr_ratio},
        "tuning_runs": len(tuning),
        "diverged_runs": sum(not _finished(record) for record in tuning),
        "best_at_edge": _at_edge(best.trial.geometric_mean_lr, [record.trial.geometric_mean_lr for record in tuning]),
        "seeds": [record.trial.seed for record in runs],
        "test": _test(runs),
        "eval": {"loss": fmean(r.eval_loss for r in runs), "accuracy": fmean(r.eval_accuracy for r in runs)},
        "seconds_per_step": median(
            record.seconds_per_step for record in records if record.trial.arm == arm and record.status == "done"
        ),
    }


def _untuned(untuned: dict[Arm, list[Record]], records: Sequence[Record]) -> dict[str, Any]:
    section: dict[str, Any] = {}
    for arm in ARMS:
        runs = untuned[arm]
        rates = next((r.trial for r in _of(records, "untuned", arm)), None)
        section[arm] = {
            "lr": rates.lr if rates else None,
            "lr_ratio": rates.lr_ratio if rates else None,
            "seeds": [record.trial.seed for record in runs],
            "test": _test(runs) if runs else None,
        }
    accuracy, loss = _differences(untuned)
    section["accuracy_difference"] = accuracy.difference.to_dict() if accuracy else None
    section["loss_difference"] = loss.difference.to_dict() if loss else None
    section["p_value"] = accuracy.p_value if accuracy else None
    return section


def _mean_curve(runs: Sequence[Record]) -> tuple[list[int], list[float]]:
    """Validation loss averaged over the seeds, at the steps that every run was evaluated at."""
    losses = [{p.step: p.eval_loss for p in record.curve if math.isfinite(p.eval_loss)} for record in runs]
    steps = sorted(set.intersection(*(set(curve) for curve in losses)))
    return steps, [fmean(curve[step] for curve in losses) for step in steps]


def _steps_to_target(final: dict[Arm, list[Record]]) -> dict[str, Any]:
    curves = {arm: _mean_curve(final[arm]) for arm in ARMS}
    targets = {arm: losses[-1] if losses else None for arm, (_, losses) in curves.items()}
    needed = {
        arm: _whole(steps_to_target(*curves[arm], target)) if (target := targets[other]) is not None else None
        for arm, other in zip(ARMS, reversed(ARMS), strict=True)
    }
    return {
        "lora_to_reach_loraplus": needed["lora"],
        "loraplus_to_reach_lora": needed["loraplus"],
        "steps": final["lora"][0].steps,
        "target_loss": targets,
    }


def _whole(step: float | None) -> int | None:
    """The first whole step that is not before `step`; rounded first, so that 95.00000000000001 is 95."""
    return None if step is None else math.ceil(round(step, 6))


def _signed(value: float, digits: int) -> str:
    """With its sign, and no -0.0."""
    return f"{round(value, digits) + 0.0:+.{digits}f}"


def _points(difference: PairedDifference) -> str:
    d = difference.difference
    mean, low, high = (_signed(100 * value, 1) for value in (d.mean, d.low, d.high))
    return f"{mean} points (95% interval {low} to {high})"


def _verdict(
    accuracy: PairedDifference,
    loss: PairedDifference,
    untuned: tuple[PairedDifference | None, PairedDifference | None],
    records: Sequence[Record],
    seeds: int,
) -> str:
    """The conclusion in words; "no difference found" where none was."""
    sentences = []
    d = loss.difference
    loss_words = f"test loss {_signed(d.mean, 3)} ({_signed(d.low, 3)} to {_signed(d.high, 3)})"
    if accuracy.found:
        word = "better" if accuracy.difference.mean > 0 else "worse"
        sentences.append(
            f"Tuned with equal budgets, LoRA+ is {word} than LoRA in test accuracy: {_points(accuracy)}, {loss_words}."
        )
    elif loss.found:
        word = "lower" if d.mean < 0 else "higher"
        sentences.append(
            f"Tuned with equal budgets, no difference found in test accuracy between LoRA+ and LoRA: "
            f"{_points(accuracy)}; LoRA+ has a {word} {loss_words}."
        )
    else:
        sentences.append(
            f"Tuned with equal budgets, no difference found between LoRA+ and LoRA: {_points(accuracy)}, {loss_words}."
        )
    if diverged := _divergence(records, "final"):
        sentences.append(f"In these runs {diverged}; seeds that an arm diverged on are left out of both.")
    if trials := {arm: runs[0].trial for arm in ARMS if (runs := _of(records, "untuned", arm))}:
        sentences.append(_untuned_sentence(untuned[0], trials, _divergence(records, "untuned")))
    if seeds < _FEW_SEEDS:
        sentences.append(
            f"This rests on {_seeds(seeds)} an arm, which says little about how results "
            "vary from seed to seed; more --seeds give a firmer answer."
        )
    return " ".join(sentences)


def _untuned_sentence(accuracy: PairedDifference | None, trials: Mapping[str, Trial], diverged: str) -> str:
    """How the arms stand without a search; an arm that diverged there is part of that picture."""
    rate = next(iter(trials.values())).lr
    ratio = f" (λ = {trials['loraplus'].lr_ratio:g})" if "loraplus" in trials else ""
    at = f"Untuned, at a usual rate of {rate:g}{ratio}"
    if accuracy is None:
        return f"{at}, {diverged or 'one arm was not run'}: no seed is left to compare."
    left = f" on the seeds that are left, since {diverged}" if diverged else ""
    if not accuracy.found:
        return f"{at}, no difference found{left}: {_points(accuracy)}."
    ahead = "ahead of" if accuracy.difference.mean > 0 else "behind"
    return f"{at}, LoRA+ is {ahead} LoRA{left}: {_points(accuracy)}."


def runs_csv_rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    """One row a run, for runs.csv."""
    return [
        {
            "phase": record.trial.phase,
            "arm": record.trial.arm,
            "lr": record.trial.lr,
            "lr_b": record.trial.lr * record.trial.lr_ratio,
            "lr_ratio": record.trial.lr_ratio,
            "seed": record.trial.seed,
            "status": record.status,
            "steps": record.steps,
            "eval_loss": record.eval_loss if math.isfinite(record.eval_loss) else None,
            "eval_accuracy": record.eval_accuracy if record.status == "done" else None,
            "test_loss": fmean(record.test_losses) if record.test_losses and _finished(record) else None,
            "test_accuracy": fmean(record.test_correct) if record.test_correct and _finished(record) else None,
            "seconds_per_step": record.seconds_per_step,
        }
        for record in records
    ]
