"""What is off about the rates of what trains beside a linear layer's factors: magnitudes, norms, embeddings, heads.

The argument for a faster B is about the sum over the width that A takes, so it says nothing of these.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from loraplus.diagnosis.diagnosis import Pair, ParameterStep, named, near, number, some
from loraplus.parts import Role

_HARDLY = 0.01  # of A's rate: an embedding's factors do not learn at less
_OTHERS = {Role.MAGNITUDE: "DoRA magnitude", Role.NORM_BIAS: "norm or bias", Role.EMBEDDING: "embedding"}
_OF_EMBEDDINGS = {Role.EMBEDDING_A, Role.EMBEDDING_B, Role.EMBEDDING}


def beside_factors(
    entries: Sequence[ParameterStep], pairs: Sequence[Pair], *, asked_by_name: bool = False
) -> Iterator[str]:
    """What is off, the worst first.

    Args:
        entries: every trainable parameter, with the rate that its step had.
        pairs: of factors.
        asked_by_name: somebody asked for the rates of the others by name, so one that is B's is what was meant.
    """
    fast = None if asked_by_name else _rate_of_b(pairs)
    if fast is not None:
        yield from _at_rate_of_b(entries, fast)
    yield from _slow_embeddings(entries, pairs)
    if fast is not None:
        yield from _split_heads(entries)


def _rate_of_b(pairs: Sequence[Pair]) -> float | None:
    """B's rate, where it is one and not A's."""
    ratios = [pair for pair in pairs if pair.lr_ratio is not None and not near(pair.lr_ratio, 1)]
    rates = {pair.lr_b for pair in ratios if pair.lr_b}
    return rates.pop() if len(rates) == 1 else None


def _at_rate_of_b(entries: Sequence[ParameterStep], fast: float) -> Iterator[str]:
    for role, what in _OTHERS.items():
        mine = [entry for entry in entries if entry.role == role and near(entry.step_lr, fast)]
        if mine:
            yield (
                f"{some(len(mine), 'tensor')} of another kind ({what}) learn at B's rate, {number(fast)}: "
                f"{named([entry.name for entry in mine])}; the argument for a faster B is about a linear layer's "
                "factor alone, so give them A's rate"
            )


def _slow_embeddings(entries: Sequence[ParameterStep], pairs: Sequence[Pair]) -> Iterator[str]:
    of_a = min((pair.lr_a for pair in pairs if pair.lr_a), default=0.0)
    slow = [
        entry for entry in entries if entry.role in _OF_EMBEDDINGS and entry.step_lr and entry.step_lr < _HARDLY * of_a
    ]
    if slow:
        yield (
            f"{some(len(slow), 'tensor')} of embeddings learn at {number(slow[0].step_lr)}, which is "
            f"{(slow[0].step_lr or 0) / of_a:.2g} of A's rate, so they hardly train: "
            f"{named([entry.name for entry in slow])}; set loraplus_lr_embedding (its default in PEFT is 1e-6)"
        )


def _split_heads(entries: Sequence[ParameterStep]) -> Iterator[str]:
    by_module: dict[str, list[ParameterStep]] = defaultdict(list)
    for entry in entries:
        if entry.role == Role.HEAD and entry.step_lr:
            by_module[entry.name.rpartition(".")[0]].append(entry)
    for of_module in by_module.values():
        if len({entry.step_lr for entry in of_module}) > 1:
            told = ", ".join(f"{entry.name} at {number(entry.step_lr)}" for entry in of_module)
            yield f"one head learns at several rates: {told}; give its bias the rate of its weight"
