"""Two processes over gloo: after wrapping, the rates are right, proved, and the adapter is that of one process."""

from __future__ import annotations

import functools

import pytest
import ranks
import torch
from transformers import get_linear_schedule_with_warmup

from stacks import wrapping
from stacks.contract import RATIO, STEPS, WARMUP, expected_decay, expected_lr
from stacks.models import classifier

DECAY = 0.1


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    made = {}

    def find(kind: str):
        if kind.startswith("zero"):
            pytest.importorskip("deepspeed", reason="deepspeed is not installed")
        if kind not in made:
            made[kind] = ranks.run(wrapping.train, tmp_path_factory.mktemp(kind), kind)
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


def rates(kind, results):
    for result in results:
        missing = alone(DECAY).keys() - result["rates"].keys()  # a flat parameter goes by the name of its first part
        assert result["rates"].keys() <= alone(DECAY).keys()
        assert all(
            kind == "fsdp1-flat" and name.endswith("classifier.modules_to_save.default.bias") for name in missing
        )
        for name, entry in result["rates"].items():
            decay = wrapping.DECAY.get(kind, expected_decay(name))
            assert (entry["base_lr"], entry["weight_decay"]) == (expected_lr(name), decay), name
            assert entry["lr"] == pytest.approx(entry["base_lr"] / 2)  # half-way through the warm-up


def same_adapter(kind, results):
    one, two = (result["weights"] for result in results)
    expected = alone(wrapping.DECAY.get(kind, DECAY))
    assert one.keys() == two.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(one[name], two[name]), name
        torch.testing.assert_close(one[name], value, rtol=2e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def tampered(kind, results):
    for result in results:
        assert "lora_B" in result["tampered"] and f"lr_ratio = {RATIO:g}" in result["tampered"]


PROPERTIES = {"rates": rates, "same_adapter": same_adapter, "tampered": tampered}


# `verify` is called in each process, in warm-up and at the end: a run that gives results has passed it.
@pytest.mark.parametrize("property_", PROPERTIES)
@pytest.mark.parametrize("kind", wrapping.BUILD)
def test_stack(kind, property_, results):
    PROPERTIES[property_](kind, results(kind))


def test_fsdp_that_flattens_a_and_b_together_is_refused_with_what_to_do(tmp_path):
    for message in ranks.run(wrapping.flattened_together, tmp_path):
        assert message.startswith("FlattenedParametersError") and "use_orig_params=True" in message
