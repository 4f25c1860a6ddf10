"""The conclusion of a comparison in words. Claims rest on seeds; "no difference found" is a conclusion, too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loraplus.study.arms import ALL
from loraplus.study.learning import nothing_sentence, some_seeds_sentence
from loraplus.study.pairs import Pair, diverged, runs_of
from loraplus.study.records import ARMS, Phase, Record, Trial
from loraplus.study.statistics import LEAST_SEEDS, PairedDifference
from loraplus.study.wording import in_seeds, p_value, signed
from loraplus.tasks.measures import ACCURACY, LOSS, perplexity

_FEW_SEEDS = 5
_UNTUNED_NOTHING = "Untuned, at a usual rate, neither arm learnt anything."


def verdict(
    main: Pair,
    untuned: Pair,
    others: Sequence[Pair],
    records: Sequence[Record],
    learnt: Mapping[str, Any] | None = None,
) -> str:
    """Every comparison with LoRA in a sentence or two, and how much it rests on.

    Args:
        main: LoRA+ against LoRA at their best rates, decided in one family with `others`.
        untuned: the same at a usual rate.
        others: further arms against LoRA.
        records: of all phases and arms.
        learnt: what the arms learnt, as under "learning" in summary.json; None where that is not known.

    Returns:
        Sentences; "no difference found" where none was, "no verdict" where there are too few seeds for one, and no
        statistics of arms that learnt nothing.
    """
    of_arms, nothing = (learnt["arms"], learnt["nothing"]) if learnt else ({}, [])
    sentences = [nothing_sentence(of_arms, nothing)] if nothing else []
    if main.runs and main.arm not in nothing:
        sentences.append(_main_sentence(main))
    if some := some_seeds_sentence(of_arms, but=nothing):
        sentences.append(some)
    if lost := divergence(records, "final"):
        sentences.append(f"In these runs {lost}; seeds that an arm diverged on are left out of both.")
    sentences += [_other_sentence(pair, records) for pair in others if pair.arm not in nothing]
    if trials := {arm: runs[0].trial for arm in ARMS if (runs := runs_of(records, "untuned", arm))}:
        if learnt and learnt["nothing_untuned"]:
            sentences.append("Untuned, at a usual rate, nothing was learnt either." if nothing else _UNTUNED_NOTHING)
        else:
            sentences.append(_untuned_sentence(untuned, trials, divergence(records, "untuned")))
    told = [pair for pair in (main, *others) if pair.arm not in nothing]
    told += [] if learnt and learnt["nothing_untuned"] else [untuned]
    if caveat := _caveat([len(pair.runs) for pair in told if pair.runs]):
        sentences.append(caveat)
    return " ".join(sentences)


def divergence(records: Sequence[Record], phase: Phase, arms: Sequence[str] = ARMS) -> str:
    """The words "LoRA+ diverged on 1 of 3 seeds" for the arms that did; else nothing."""
    parts = []
    for arm in arms:
        seeds, lost = {r.trial.seed for r in runs_of(records, phase, arm)}, diverged(records, phase, arm)
        if lost:
            parts.append(f"{ALL[arm].title} diverged on {len(lost)} of {in_seeds(len(seeds))}")
    return " and ".join(parts)


def _main_sentence(pair: Pair) -> str:
    """LoRA+ against LoRA."""
    start = "Tuned with equal budgets, "
    if pair.differs is None:
        return f"{start}LoRA+ − LoRA in test {pair.decides} is {_figures(pair)}: no verdict."
    if not pair.differs:
        return f"{start}no difference found between LoRA+ and LoRA in test {pair.decides}: {_figures(pair)}."
    word = "better" if _ahead(pair) else "worse"
    return f"{start}LoRA+ is {word} than LoRA in test {pair.decides}: {_figures(pair)}."


def _other_sentence(pair: Pair, records: Sequence[Record]) -> str:
    """A further arm against LoRA, with what was spent on its rates."""
    title, tuning_runs = ALL[pair.arm].title, len(runs_of(records, "tuning", pair.arm))
    who = f"{title} ({tuning_runs} tuning run{'' if tuning_runs == 1 else 's'})"
    lost = divergence(records, "final", [pair.arm])
    if not pair.runs:
        return f"{who} leaves no seed to compare with LoRA: {lost or 'LoRA diverged'}."
    figures = _figures(pair) + (f"; {lost}" if lost else "")
    if pair.differs is None:
        return f"{who} − tuned LoRA in test {pair.decides} is {figures}: no verdict."
    if not pair.differs:
        return f"{who}: no difference found to tuned LoRA in test {pair.decides}: {figures}."
    return f"{who} is {'better' if _ahead(pair) else 'worse'} than tuned LoRA in test {pair.decides}: {figures}."


def _untuned_sentence(pair: Pair, trials: Mapping[str, Trial], lost: str) -> str:
    """How the arms stand without a search; an arm that diverged there is part of that picture."""
    rate = next(iter(trials.values())).lr
    ratio = f" (λ = {trials['loraplus'].lr_ratio:g})" if "loraplus" in trials else ""
    at = f"Untuned, at a usual rate of {rate:g}{ratio}"
    if not pair.runs:
        return f"{at}, {lost or 'one arm was not run'}: no seed is left to compare."
    left = f" on the seeds that are left, since {lost}" if lost else ""
    if pair.differs is None:
        return f"{at}, LoRA+ − LoRA{left} is {_figures(pair)}: no verdict."
    if not pair.differs:
        return f"{at}, no difference found{left}: {_figures(pair)}."
    return f"{at}, LoRA+ is {'ahead of' if _ahead(pair) else 'behind'} LoRA{left}: {_figures(pair)}."


def _caveat(seeds: Sequence[int]) -> str:
    """How much the verdict rests on, if that is little."""
    fewest = min(seeds, default=_FEW_SEEDS)
    if fewest < LEAST_SEEDS:
        return (
            f"A verdict takes {LEAST_SEEDS} seeds or more that both arms finished, and {in_seeds(fewest)} cannot tell "
            f"a method from the luck of a run; --seeds {_FEW_SEEDS} is the default."
        )
    if fewest < _FEW_SEEDS:
        return (
            f"This rests on {in_seeds(fewest)} an arm, which shows large differences only; more --seeds give a firmer "
            "answer."
        )
    return ""


def _ahead(pair: Pair) -> bool:
    """Whether the arm is better than LoRA in what decides."""
    mean = pair.judged.difference.mean if pair.judged else 0.0
    return mean > 0 if pair.decides == ACCURACY else mean < 0


def _figures(pair: Pair) -> str:
    """The difference in what decides, with what supports it; then the loss, which describes."""
    if pair.judged is None or pair.loss is None:
        return ""
    of_loss = pair.loss.difference
    if pair.decides == LOSS:
        mean = f"{signed(of_loss.mean, 4)} a token"
        return f"{mean} ({_support(pair, pair.judged, 1, 4)}), perplexity ×{perplexity(of_loss.mean):.4g}"
    interval = "" if pair.differs is None else f" ({signed(of_loss.low, 3)} to {signed(of_loss.high, 3)})"
    mean = f"{signed(100 * pair.judged.difference.mean, 1)} points"
    return f"{mean} ({_support(pair, pair.judged, 100, 1)}), test loss {signed(of_loss.mean, 3)}{interval}"


def _support(pair: Pair, judged: PairedDifference, scale: float, digits: int) -> str:
    """The interval and the p that decides; without a verdict, what the seeds say one by one."""
    if pair.differs is None:
        return f"seed by seed {' and '.join(signed(scale * value, digits) for value in judged.by_seed)}"
    low, high = (signed(scale * value, digits) for value in (judged.difference.low, judged.difference.high))
    alone, corrected = (" of this arm alone", f" corrected for {pair.family} arms") if pair.family > 1 else ("", "")
    interval = f"95% interval{alone} {low} to {high} over {in_seeds(len(pair.runs))}"
    return f"{interval}, {p_value(pair.p_value_holm)}{corrected}"
