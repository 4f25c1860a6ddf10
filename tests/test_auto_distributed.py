"""AutoRates in two processes over gloo: one pair of rates, whatever part of the data each process has seen.

Run with LORAPLUS_DISTRIBUTED_TESTS=1. They are not part of `make test` yet: in one of several runs of the whole suite
both processes had written their results and did not end, and why is not known.
"""

from __future__ import annotations

import json
import os
from datetime import timedelta
from pathlib import Path

import pytest
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


def worker(rank: int, wrapping: str, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    model = adapted()
    if wrapping == "ddp":
        model = DistributedDataParallel(model)
    else:
        for layer in model.base_model.model.bert.encoder.layer:
            fully_shard(layer)
        fully_shard(model)
    optimizer = loraplus.create_optimizer(model, torch.optim.AdamW, lr=1.0, lr_ratio=1, lr_head=1e-3)
    rates = AutoRates(model, optimizer)
    for step in range(STEPS):
        model(**batch(seed=2 * step + rank)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = {name: whole(p.detach()).double().sum().item() for name, p in model.named_parameters() if p.requires_grad}
    own = {name: (layer.lr_a, layer.lr_b) for name, layer in rates.layer_rates.items()}
    content = {"rates": [rates.lr_a, rates.lr_b], "weights": weights, "own": own}
    (Path(folder) / f"{rank}.json").write_text(json.dumps(content))
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not os.environ.get("LORAPLUS_DISTRIBUTED_TESTS"), reason="set LORAPLUS_DISTRIBUTED_TESTS=1")
@pytest.mark.parametrize("wrapping", ["ddp", "fsdp2"])
def test_two_processes_arrive_at_the_same_rates_and_weights(tmp_path, wrapping):
    torch.multiprocessing.spawn(worker, (wrapping, str(tmp_path)), nprocs=2)
    one, two = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert one["rates"] == two["rates"] and all(rate > 0 for rate in one["rates"])
    assert one["weights"] == two["weights"]
    assert one["own"] != two["own"]  # each measured on its own data
