"""The arms of a comparison. Another one is an entry of `ALL`, and a function in `tasks/methods.py` that trains it."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

from loraplus.errors import InputError
from loraplus.tasks import methods

REFERENCE = "lora"
"""What every other arm is compared with."""


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Args:
        name: in --arms, summary.json and runs.csv.
        title: in tables and sentences.
        about: one line for the report.
        method: makes the `Method` of a run from (config, lr, lr_ratio, model, steps). Arms with the same function are
            taken to train alike, so their runs are shared.
        tuned: its η_A is searched with --tuning-runs runs; otherwise it sets its own rates, and its trials carry
            lr = lr_ratio = 1.
        has_ratio: B learns at λ > 1 times A's rate; λ is --lr-ratio unless it is searched.
        tunes_ratio: λ is searched, too.
        package: that it needs and that may not be installed.
    """

    name: str
    title: str
    about: str
    method: Callable[..., methods.Method]
    tuned: bool = False
    has_ratio: bool = False
    tunes_ratio: bool = False
    package: str | None = None


ALL: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm(REFERENCE, "LoRA", "AdamW at one rate for A and B", methods.adamw, tuned=True),
        Arm(
            "loraplus", "LoRA+", "AdamW with η_B = λ·η_A", methods.adamw,
            tuned=True, has_ratio=True, tunes_ratio=True,
        ),
        Arm("auto", "LoRA+ auto", "AdamW with both rates set from what each layer's output does", methods.automatic),
        Arm("mua", "μA", "AdamW at one rate that follows from width, rank and α", methods.variant("mua")),
        Arm("tinker", "Tinker's formula", "AdamW at one rate that follows from the width", methods.variant("tinker")),
        Arm(
            "lora-rite", "LoRA-RITE", "steps of B·A however it is split", methods.variant("lora-rite"), tuned=True
        ),
        Arm(
            "riemannian", "Riemannian", "AdamW on gradients in the metric of the other factor",
            methods.variant("riemannian"), tuned=True,
        ),
        Arm("muon", "Muon", "orthogonal steps of A and B", methods.variant("muon"), tuned=True),
        Arm(
            "prodigy", "Prodigy", "Prodigy with an estimate each for A, B and the head", methods.prodigy,
            package="prodigyopt",
        ),
        Arm(
            "schedulefree", "schedule-free", "schedule-free AdamW with η_B = λ·η_A, where λ is that of --lr-ratio",
            methods.schedule_free, tuned=True, has_ratio=True, package="schedulefree",
        ),
    )
}  # fmt: skip


def chosen(text: str) -> tuple[str, ...]:
    """The arms that --arms names, in the order of `ALL`.

    Raises:
        InputError: an arm that does not exist, one given twice, no reference, nothing to compare it with, or an arm
            whose package is not installed.

    Example:
        >>> chosen("auto, lora")
        ('lora', 'auto')
    """
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in ALL:
            (near,) = difflib.get_close_matches(name, ALL, n=1, cutoff=0.0)
            raise InputError(f"--arms: there is no arm {name!r}; the nearest is {near!r}, all are {','.join(ALL)}")
        if names.count(name) > 1:
            raise InputError(f"--arms: {name} is given twice")
    if REFERENCE not in names:
        raise InputError(f"--arms must hold {REFERENCE}: every other arm is compared with it")
    if len(names) == 1:
        raise InputError(f"--arms {REFERENCE} has nothing to compare; add an arm, such as loraplus")
    for name in names:
        package = ALL[name].package
        if package is not None and importlib.util.find_spec(package) is None:
            raise InputError(
                f"--arms: {name} needs the package {package}, which is not installed; "
                "it comes with pip install 'loraplus[peers]'"
            )
    return tuple(name for name in ALL if name in names)
