"""The contract: every stack × every property, `pytest tests/stacks -k "lightning and resume"`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from older import skip_before

import loraplus
from loraplus.errors import RateMismatchError, ResumeMismatchError
from stacks import loops, trainers
from stacks.contract import (
    FACTORS,
    LR,
    RATIO,
    SAVE_AT,
    STEPS,
    Run,
    Setup,
    Stack,
    expected_decay,
    expected_lr,
)

STACKS = [
    Stack("pytorch", loops.pytorch, splits_decay=False),
    Stack("accelerate", loops.accelerate, ("accelerate",), splits_decay=False),
    Stack("lightning", loops.lightning, ("lightning",), splits_decay=False),
    Stack("trainer-class", trainers.trainer_class),
    Stack("trainer-attach", trainers.attach),
    Stack("trainer-factory", trainers.optimizer_cls_and_kwargs),
    *(
        Stack(
            f"trl-{kind.lower()}",
            lambda setup, kind=kind: trainers.attached(trainers.trl_trainer(kind, setup), setup),
            ("trl",),
        )
        for kind in trainers.TRL_OPTIONS
    ),
    Stack("trl-sft-factory", trainers.sft_factory, ("trl",)),
]


class Runs:
    """The runs of one stack, each made once."""

    def __init__(self, stack: Stack, folder: Path) -> None:
        self.stack = stack
        self.made: dict[str, Run] = {}
        self.setup = partial(Setup, folder / "base")
        self.base_folder, self.other_folder = folder / "base", folder / "other"

    @property
    def base(self) -> Run:
        return self._once("base", Setup(self.base_folder))

    @property
    def resumed(self) -> Run:
        _ = self.base
        return self._once("resumed", Setup(self.base_folder, resume=True))

    def other(self, **options) -> Run:
        return self._once(str(options), Setup(self.other_folder, **options))

    def _once(self, name: str, setup: Setup) -> Run:
        if name not in self.made:
            self.made[name] = self.stack(setup)
        return self.made[name]


def equal(a: Run, b: Run) -> None:
    ours, theirs = a.weights(), b.weights()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def rates(runs: Runs) -> None:
    """Every trainable parameter has its rate and weight decay, by name."""
    table = loraplus.explain(runs.base.model, runs.base.optimizer).to_dict()["parameters"]
    assert table.keys() == {loraplus.roles.clean_name(name) for name in runs.base.weights()}
    assert {entry["role"] for entry in table.values()} >= {"lora_A", "lora_B"}
    for name, entry in table.items():
        assert (entry["base_lr"], entry["weight_decay"]) == (expected_lr(name), expected_decay(name)), name


def ratio_one(runs: Runs) -> None:
    """λ = 1 gives the weights of the stack's own optimizer, bit for bit."""
    decay = {"weight_decay": 0.1 if runs.stack.splits_decay else None}
    plain, ours = runs.other(lr_ratio=None, **decay), runs.other(lr_ratio=1.0, **decay)
    assert len(plain.steps) == len(ours.steps) == STEPS
    equal(plain, ours)


def scheduler(runs: Runs) -> None:
    """At every step that was taken, A is at the schedule's rate and B at λ times it."""
    assert len(runs.base.steps) == STEPS
    for factor, step in zip(FACTORS, runs.base.steps, strict=True):
        assert step.rates["lora_A"] == pytest.approx(LR * factor)
        assert step.rates["lora_B"] == pytest.approx(LR * RATIO * factor)


def accumulation(runs: Runs) -> None:
    """Two parts a step give the weights of one, to rounding, and as many steps."""
    parts = runs.other(accumulation=2)
    assert [step.rates for step in parts.steps] == [step.rates for step in runs.base.steps]
    whole = runs.base.weights()
    for name, value in parts.weights().items():
        torch.testing.assert_close(value, whole[name], rtol=2e-3, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")


def clipping(runs: Runs) -> None:
    """Clipping holds the norm over the gradients of all groups together."""
    free = [step.grad_norm for step in runs.base.steps]
    at = min(norm for norm in free if norm) / 4
    held = [step.grad_norm for step in runs.other(clip=at).steps]
    assert len(held) == STEPS and max(held) == pytest.approx(at, rel=1e-3)
    assert runs.other(clip=at).steps[2].rates == runs.base.steps[2].rates


def resume(runs: Runs) -> None:
    """A run resumed half-way ends at the weights of the uninterrupted one."""
    assert len(runs.resumed.steps) == STEPS - SAVE_AT
    equal(runs.base, runs.resumed)
    loraplus.verify(runs.resumed.model, runs.resumed.optimizer, lr_ratio=RATIO, lr=LR)


def other_ratio(runs: Runs) -> None:
    """Resuming under another ratio or another lr is refused before a step is taken, and says both numbers."""
    _ = runs.base
    with pytest.raises(ResumeMismatchError, match=r"16.*2.*resume with"):
        runs.stack(Setup(runs.base_folder, lr_ratio=2.0, resume=True))
    with pytest.raises(ResumeMismatchError, match=r"lr = 0\.005.*0\.002.*resume with lr = 0\.005"):
        runs.stack(Setup(runs.base_folder, lr=2e-3, resume=True))


def logs(runs: Runs) -> None:
    """Each step's log holds every group's rate by name, as it was in the step."""
    assert len(runs.base.logs) == STEPS
    for logged, step in zip(runs.base.logs, runs.base.steps, strict=True):
        assert logged == pytest.approx({f"lr/{name}": rate for name, rate in step.rates.items()})


def verified(runs: Runs) -> None:
    """`verify` passes on what the stack left, and says the same as the optimizer."""
    table = loraplus.verify(runs.base.model, runs.base.optimizer, lr_ratio=RATIO, lr=LR)
    assert all(entry.lr is not None for entry in table.entries)


def tampered(runs: Runs) -> None:
    """`verify` fails, and names the parameters, if a rate is changed now, at its base, or for one parameter."""
    optimizer, check = runs.base.optimizer, partial(loraplus.verify, lr_ratio=RATIO, lr=LR)
    group = next(group for group in optimizer.param_groups if group["name"] == "lora_B")
    for each in optimizer.param_groups:  # the schedule has ended at 0, where no rate differs from another
        each["lr"] = each["initial_lr"] / 2
    check(runs.base.model, optimizer)
    for key in ("lr", "initial_lr"):
        before, group[key] = group[key], group[key] / RATIO
        with pytest.raises(RateMismatchError, match=r"lora_B.*expected"):
            check(runs.base.model, optimizer)
        group[key] = before
    moved = group["params"].pop()
    try:
        with pytest.raises(RateMismatchError, match=r"lora_B.*in no group"):
            check(runs.base.model, optimizer)
    finally:
        group["params"].append(moved)
    check(runs.base.model, optimizer)


PROPERTIES: dict[str, Callable[[Runs], None]] = {
    "rates": rates, "ratio_one": ratio_one, "scheduler": scheduler, "accumulation": accumulation,
    "clipping": clipping, "resume": resume, "other_ratio": other_ratio, "logs": logs, "verify": verified,
    "tampered": tampered,
}  # fmt: skip


@pytest.fixture(scope="module")
def runs_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Stack], Runs]:
    made: dict[str, Runs] = {}

    def find(stack: Stack) -> Runs:
        return made.setdefault(stack.name, Runs(stack, tmp_path_factory.mktemp(stack.name)))

    return find


# One stack's tests stay in one process (tests/matrix.py): they share its runs.
@pytest.mark.parametrize("property_", PROPERTIES)
@pytest.mark.parametrize("stack", STACKS, ids=lambda stack: stack.name)
def test_stack(stack, property_, runs_of):
    if property_ == "resume" and stack.name in ("trl-dpo", "trl-kto"):
        skip_before("transformers", "5.23.0", "does not resume DPO and KTO to the same weights, without LoRA+ either")
    PROPERTIES[property_](runs_of(stack))
