"""What the doctor says: the rate and decay of every parameter's step, λ of every pair, what is off, and a verdict."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

NEAR = 0.02  # relative: above the rounding of a step in 32 bits, below any difference of rates that matters
_NAMED = 2


@dataclass(frozen=True)
class ParameterStep:
    """One trainable parameter, and what a step does with it.

    Args:
        name: without what wrappers add.
        role: as `loraplus.explain` has it; empty where only the model could tell.
        optimizer, group: that hold it; None if none does.
        lr: what its group says, at the step; the base rate where the schedule is at 0.
        step_lr: what its step had; None if it took none.
        weight_decay: what its step had.
        parameters: how many numbers it has; 0 of one on another's memory.
        measured: `step_lr` is read off a step, and not off the group alone.
        shares: the first parameter on the same memory.
    """

    name: str
    role: str
    optimizer: str | None
    group: str | None
    lr: float | None
    step_lr: float | None
    weight_decay: float | None
    parameters: int
    measured: bool = True
    shares: str | None = None


@dataclass(frozen=True)
class Pair:
    """The two factors of a layer, and λ = η_B/η_A of their steps; None where A is frozen or a rate is not known."""

    layer: str
    lr_a: float | None
    lr_b: float | None
    a_frozen: bool = False
    b_frozen: bool = False

    @property
    def lr_ratio(self) -> float | None:
        """λ."""
        return self.lr_b / self.lr_a if self.lr_a and self.lr_b is not None else None


@dataclass(frozen=True)
class OptimizerSeen:
    """An optimizer: its class, how many steps were watched, and its groups: label, lr, weight_decay, tensors."""

    name: str
    steps: int
    groups: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Diagnosis:
    """What was found; prints as tables and a verdict.

    Args:
        source: what was looked at.
        entries: every trainable parameter.
        pairs: every pair of factors of a linear layer.
        optimizers: those that were seen.
        problems: what is off, the worst first; each says what to do.
        notes: what is worth knowing and not off.
    """

    source: str
    entries: tuple[ParameterStep, ...]
    pairs: tuple[Pair, ...]
    optimizers: tuple[OptimizerSeen, ...]
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing is off."""
        return not self.problems

    @property
    def lr_ratio(self) -> float | None:
        """λ, if all pairs have one."""
        ratios = set(ratios_of(self.pairs))
        return ratios.pop() if len(ratios) == 1 else None

    @property
    def verdict(self) -> str:
        """One line."""
        if self.ok:
            words = in_words(self.pairs)
            known = all(pair.lr_ratio is not None or pair.a_frozen for pair in self.pairs)
            return f"right: {words}" if known and self.lr_ratio != 1 else words
        worst, *others = self.problems
        return f"wrong: {worst.partition('; ')[0]}{f' (and {len(others)} more)' if others else ''}"

    def groups(self) -> list[dict[str, Any]]:
        """One row an optimizer, group, role and rate: those, lr, step_lr, weight_decay, tensors, parameters."""
        rows: dict[tuple[Any, ...], dict[str, Any]] = {}
        for entry in self.entries:
            shared = {name: getattr(entry, name) for name in ("optimizer", "group", "role", "lr")}
            step_lr = entry.step_lr
            if step_lr is not None and step_lr != entry.lr:
                step_lr = rounded(step_lr)
            shared |= {"step_lr": step_lr, "weight_decay": entry.weight_decay}
            row = rows.setdefault(tuple(shared.values()), {**shared, "tensors": 0, "parameters": 0})
            row["tensors"] += 1
            row["parameters"] += entry.parameters
        return list(rows.values())

    def to_dict(self) -> dict[str, Any]:
        """All of it, as `loraplus doctor --json` prints it."""
        parameters = {}
        for entry in self.entries:
            fields = asdict(entry)
            parameters[fields.pop("name")] = fields
        return {
            "source": self.source,
            "verdict": self.verdict,
            "ok": self.ok,
            "lr_ratio": self.lr_ratio,
            "problems": list(self.problems),
            "notes": list(self.notes),
            "groups": self.groups(),
            "pairs": [{**asdict(pair), "lr_ratio": pair.lr_ratio} for pair in self.pairs],
            "optimizers": [asdict(optimizer) for optimizer in self.optimizers],
            "parameters": parameters,
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Diagnosis:
        """What `to_dict` made, from another process."""
        pairs = [{key: value for key, value in pair.items() if key != "lr_ratio"} for pair in content["pairs"]]
        return cls(
            source=content["source"],
            entries=tuple(ParameterStep(name, **fields) for name, fields in content["parameters"].items()),
            pairs=tuple(Pair(**pair) for pair in pairs),
            optimizers=tuple(OptimizerSeen(o["name"], o["steps"], tuple(o["groups"])) for o in content["optimizers"]),
            problems=tuple(content["problems"]),
            notes=tuple(content["notes"]),
        )

    def __str__(self) -> str:
        several = len({entry.optimizer for entry in self.entries}) > 1
        header = ("optimizer", "group", "role", "lr of the group", "lr of the step", "weight decay", "tensors")
        rows: list[tuple[str, ...]] = [header]
        for row in self.groups():
            held = row["group"] or "(no optimizer)"
            numbers = (number(row[name]) for name in ("lr", "step_lr", "weight_decay"))
            rows.append((row["optimizer"] or "–", held, row["role"] or "–", *numbers, str(row["tensors"])))
        rows = rows if several else [row[1:] for row in rows]
        left = 3 if several else 2
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        rows.insert(1, tuple("-" * width for width in widths))
        lines = []
        for row in rows:
            cells = zip(row, widths, strict=True)
            padded = [
                cell.ljust(width) if place < left else cell.rjust(width) for place, (cell, width) in enumerate(cells)
            ]
            lines.append("  ".join(padded).rstrip())
        marked = [f"✗ {problem}" for problem in self.problems] + [f"· {note}" for note in self.notes]
        return "\n".join([self.source, "", *lines, "", *marked, self.verdict])


def ratios_of(pairs: Iterable[Pair]) -> list[float]:
    """λ of every pair that has one; those alike within what a step shows are one number."""
    ratios: list[float] = []
    for pair in pairs:
        if pair.lr_ratio is not None:
            alike = (known for known in ratios if near(known, pair.lr_ratio))
            ratios.append(next(alike, rounded(pair.lr_ratio)))
    return ratios


def in_words(pairs: Sequence[Pair]) -> str:
    """λ of all pairs.

    Example:
        >>> in_words([Pair("q", 0.001, 0.016), Pair("v", 0.001, 0.016)])
        'B learns 16 times as fast as A in all 2 pairs'
        >>> in_words([Pair("q", 0.001, 0.001), Pair("v", 0.001, 0.016)])
        'λ = 1 in 1 pair, λ = 16 in 1 pair'
    """
    counts = Counter(ratios_of(pairs))
    if len(counts) == 1 and counts.total() == len(pairs):
        (ratio,) = counts
        every = f"all {len(pairs)} pairs" if len(pairs) > 1 else "the one pair"
        if ratio == 1:
            return f"plain LoRA: B learns at A's rate in {every}"
        return f"B learns {ratio:g} times as fast as A in {every}"
    told = [f"λ = {ratio:g} in {some(count, 'pair')}" for ratio, count in sorted(counts.items())]
    frozen = sum(pair.a_frozen for pair in pairs)
    if frozen:
        told.append(f"A is frozen in {frozen} of {some(len(pairs), 'pair')}, where B alone learns")
    rest = len(pairs) - counts.total() - frozen
    if rest:
        told.append(f"λ is not known in {some(rest, 'pair')}")
    return ", ".join(told) or "no pair of factors trains"


def near(rate: float | None, other: float) -> bool:
    """Whether two rates, or ratios of them, are one within what a step shows."""
    return rate is not None and math.isclose(rate, other, rel_tol=NEAR)


def some(count: int, what: str) -> str:
    """A number of things.

    Example:
        >>> some(1, "pair"), some(2, "pair")
        ('1 pair', '2 pairs')
    """
    return f"{count} {what}{'' if count == 1 else 's'}"


def named(names: Sequence[str]) -> str:
    """The first names, without what PEFT puts before all of them, and how many more there are."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{', '.join(short(name) for name in names[:_NAMED])}{more}"


def short(name: str) -> str:
    """A name without what PEFT puts before all of them."""
    return name.replace("base_model.model.", "", 1)


def number(value: float | None) -> str:
    """Four digits; a dash for what is not known."""
    return "–" if value is None else f"{value:.4g}"


def rounded(value: float) -> float:
    """To the digits that a step in 32 bits shows."""
    return float(f"{value:.3g}")
