"""Two processes over gloo: after wrapping, the rates are right, proved, and the adapter is that of one process."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import pytest
import ranks
import torch
from transformers import get_linear_schedule_with_warmup

from stacks import test_contract, wrapping
from stacks.contract import RATIO, SAVE_AT, STEPS, WARMUP, Step, expected_decay, expected_lr
from stacks.models import classifier

DECAY = 0.1


@dataclass
class Outcome:
    """A run as one process saw it, in the form of the contract's runs."""

    steps: list[Step]
    logs: list[dict[str, float]]
    verified: list[dict[str, Any]]
    weights_: dict[str, torch.Tensor]
    tampered: dict[str, str]
    refused: str

    def weights(self) -> dict[str, torch.Tensor]:
        return self.weights_


class Launched:
    """The runs of a wrapper, from its one launch; what the contract's properties take."""

    stack = test_contract.Stack("wrapped", lambda setup: pytest.fail("made in the launch"), splits_decay=False)

    def __init__(self, kind: str, made: dict[str, dict[str, Any]]) -> None:
        self.kind, self.made = kind, made

    def run(self, name: str) -> Outcome:
        found = self.made[name]
        assert "error" not in found, found["error"]
        return Outcome(
            found["steps"], found["logs"], found["verified"], found.get("weights", {}), found.get("tampered", {}),
            found.get("refused", ""),
        )  # fmt: skip

    @property
    def base(self) -> Outcome:
        return self.run("base")

    @property
    def resumed(self) -> Outcome:
        return self.run("resumed")

    def other(self, **options: Any) -> Outcome:
        if "lr_ratio" in options:
            return self.run("plain" if options["lr_ratio"] is None else "ratio_one")
        return self.run(next(iter(options)))


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    made: dict[str, list[Launched]] = {}

    def find(kind: str) -> list[Launched]:
        if kind.startswith("zero"):
            pytest.importorskip("deepspeed", reason="deepspeed is not installed")
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            results = ranks.run(wrapping.runs, folder, kind, str(folder / "checkpoints"))
            made[kind] = [Launched(kind, result) for result in results]
        return made[kind]

    return find


@functools.cache
def alone(weight_decay: float):
    """The weights that one process arrives at with the whole batches."""
    model = classifier()
    optimizer = wrapping.optimizer_of(model, weight_decay)
    scheduler = get_linear_schedule_with_warmup(optimizer, WARMUP, STEPS)
    data = wrapping.batches(0, 1)
    for step in range(STEPS):
        model(**data[step % len(data)]).loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return wrapping.whole_weights("alone", model)


def rates(runs: Launched) -> None:
    """Every trainable parameter has its rate and weight decay, by name."""
    table = runs.base.verified[0]
    missing = alone(DECAY).keys() - table.keys()  # a flat parameter goes by the name of its first part
    assert table.keys() <= alone(DECAY).keys()
    assert all(
        runs.kind == "fsdp1-flat" and name.endswith("classifier.modules_to_save.default.bias") for name in missing
    )
    for name, entry in table.items():
        decay = wrapping.DECAY.get(runs.kind, expected_decay(name))
        assert (entry["base_lr"], entry["weight_decay"]) == (expected_lr(name), decay), name


def resume(runs: Launched) -> None:
    """A run resumed half-way ends at the weights of the uninterrupted one."""
    assert len(runs.resumed.steps) == STEPS - SAVE_AT
    assert [step.rates for step in runs.resumed.steps] == [step.rates for step in runs.base.steps[SAVE_AT:]]
    test_contract.equal(runs.base, runs.resumed)


def other_ratio(runs: Launched) -> None:
    """Resuming under another ratio is refused before a step is taken, and says both ratios."""
    refused = runs.run("other_ratio")
    assert not refused.steps
    assert "16" in refused.refused and " 2" in refused.refused and "resume with" in refused.refused


def verified(runs: Launched) -> None:
    """`verify` passes in the warm-up, at the end and after resuming, and tells the rates of that moment."""
    warm_up, end = runs.base.verified
    assert len(runs.resumed.verified) == 1
    for name, entry in warm_up.items():
        assert entry["lr"] == pytest.approx(expected_lr(name) / 2)
        assert end[name]["lr"] == runs.resumed.verified[0][name]["lr"] == 0


def tampered(runs: Launched) -> None:
    """`verify` fails, and names the parameters, if a rate is changed now or at its base."""
    messages = runs.base.tampered
    assert messages.keys() == {"lr", "initial_lr"}
    for message in messages.values():
        assert "lora_B" in message and f"lr_ratio = {RATIO:g}" in message


def same_adapter(runs: Launched) -> None:
    """Two processes arrive at the weights of one with the whole batches, to rounding."""
    got, expected = runs.base.weights(), alone(wrapping.DECAY.get(runs.kind, DECAY))
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=2e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


PROPERTIES = {
    "rates": rates, "ratio_one": test_contract.ratio_one, "scheduler": test_contract.scheduler,
    "accumulation": test_contract.accumulation, "clipping": test_contract.clipping, "resume": resume,
    "other_ratio": other_ratio, "logs": test_contract.logs, "verify": verified, "tampered": tampered,
    "same_adapter": same_adapter,
}  # fmt: skip


# One wrapper's tests stay in one process (tests/matrix.py): they share its launch.
@pytest.mark.parametrize("property_", PROPERTIES)
@pytest.mark.parametrize("kind", wrapping.BUILD)
def test_stack(kind, property_, launched):
    one, two = launched(kind)
    for runs in (one, two):
        PROPERTIES[property_](runs)
    test_contract.equal(one.base, two.base)


def test_fsdp_that_flattens_a_and_b_together_is_refused_with_what_to_do(tmp_path):
    for message in ranks.run(wrapping.flattened_together, tmp_path):
        assert message.startswith("FlattenedParametersError") and "use_orig_params=True" in message
