"""AutoRates in two processes over gloo: one pair of rates, whatever part of the data each process has seen."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import ranks
import torch
from test_feature_updates import adapted, batch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import loraplus
from loraplus.auto import AutoRates

STEPS = 12


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def wrapped(wrapping: str) -> Any:
    model: Any = adapted()
    if wrapping == "ddp":
        return DistributedDataParallel(model)
    for layer in model.base_model.model.bert.encoder.layer:
        fully_shard(layer)
    return fully_shard(model)


def started(wrapping: str):
    model = wrapped(wrapping)
    optimizer = loraplus.create_optimizer(model, torch.optim.AdamW, lr=1.0, lr_ratio=1, lr_head=1e-3)
    return model, optimizer, AutoRates(model, optimizer)


def train(model, optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        model(**batch(seed=2 * step + torch.distributed.get_rank())).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def weights_of(model) -> dict:
    return {name: whole(p.detach()).double().sum().item() for name, p in model.named_parameters() if p.requires_grad}


def worker(wrapping: str) -> dict:
    model, optimizer, rates = started(wrapping)
    train(model, optimizer, 0, STEPS)
    own = {name: (layer.lr_a, layer.lr_b) for name, layer in rates.layer_rates.items()}
    found = {"rates": [rates.lr_a, rates.lr_b], "weights": weights_of(model), "own": own, "k": rates._growth.factor}
    states = [copy.deepcopy(part.state_dict()) for part in (model, optimizer, rates)]
    again = started(wrapping)
    for part, state in zip(again, states, strict=True):
        part.load_state_dict(state)
    for run in ((model, optimizer), again[:2]):
        train(*run, STEPS, STEPS + 3)
    ends = [weights_of(each) for each in (model, again[0])]
    return {**found, "ends": ends, "looks": [each._growth._looks for each in (rates, again[2])]}


def each_its_own(group: str) -> dict:
    """A model of its own in each process, trained for a number of steps of its own; with a group they are one."""
    rank = torch.distributed.get_rank()
    model = adapted(0 if group else rank)
    optimizer = loraplus.create_optimizer(model, torch.optim.AdamW, lr=1.0, lr_ratio=1, lr_head=1e-3)
    rates = AutoRates(model, optimizer, process_group=torch.distributed.group.WORLD if group else None)
    for step in range(3 if group else 3 + rank):
        model(**batch(seed=step + rank)).loss.backward()
        for p in model.parameters():
            if group and p.grad is not None:
                torch.distributed.all_reduce(p.grad)
        optimizer.step()
        optimizer.zero_grad()
    return {"rates": [rates.lr_a, rates.lr_b]}


def test_processes_that_train_different_models_do_not_share_rates(tmp_path):
    found = ranks.run(each_its_own, tmp_path, "")
    for rank in range(2):
        model = adapted(rank)
        optimizer = loraplus.create_optimizer(model, torch.optim.AdamW, lr=1.0, lr_ratio=1, lr_head=1e-3)
        rates = AutoRates(model, optimizer)
        for step in range(3 + rank):
            model(**batch(seed=step + rank)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert found[rank]["rates"] == pytest.approx([rates.lr_a, rates.lr_b], rel=1e-3)
    assert found[0] != found[1]


def test_processes_that_average_gradients_by_themselves_name_their_group(tmp_path):
    one, two = ranks.run(each_its_own, tmp_path, "together")
    assert one == two


@pytest.mark.parametrize("wrapping", ["ddp", "fsdp2"])
def test_two_processes_arrive_at_the_same_rates_and_weights(tmp_path, wrapping):
    one, two = ranks.run(worker, tmp_path, wrapping)
    assert one["rates"] == two["rates"] and all(rate > 0 for rate in one["rates"])
    assert one["weights"] == two["weights"]
    assert one["own"] != two["own"]  # each measured on its own data
    assert one["k"] == two["k"] > 1
    assert one["ends"] == two["ends"] and one["looks"] == two["looks"]
    if wrapping == "ddp":
        assert one["ends"][0] == one["ends"][1]
    assert one["looks"][0] - one["looks"][1] == (wrapping == "fsdp2")  # a checkpoint has no step of shards
