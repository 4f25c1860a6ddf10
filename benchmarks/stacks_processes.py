"""One case of the scoreboard in two processes over gloo: `python stacks_processes.py WRAPPING WHO FOLDER`.

Every trainable weight is 1 before wrapping, every gradient is 1 and the optimizer is SGD, so 1 − weight after one step
is the rate that this weight has, however it is sharded. Rank 0 writes {name: rates} to FOLDER/rates.json, or why not.
"""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

LR, RATIO = 1 / 64, 16.0
WRAPPINGS = {
    "DDP": "DDP, 2 processes",
    "FSDP1": "FSDP1, 2 processes, use_orig_params=True",
    "FSDP1-policy": "FSDP1, 2 processes, use_orig_params=False, PEFT's wrap policy",
    "FSDP1-flat": "FSDP1, 2 processes, use_orig_params=False, A and B in one flat parameter",
    "FSDP2": "FSDP2, 2 processes",
}


def wrap(model: nn.Module, wrapping: str) -> nn.Module:
    cpu = torch.device("cpu")
    if wrapping == "DDP":
        return DistributedDataParallel(model)
    if wrapping == "FSDP2":
        for layer in model.base_model.model.bert.encoder.layer:  # type: ignore[union-attr]
            fully_shard(layer)
        return fully_shard(model)
    if wrapping == "FSDP1":
        return FullyShardedDataParallel(model, use_orig_params=True, device_id=cpu)
    if wrapping == "FSDP1-policy":
        from peft.utils.other import fsdp_auto_wrap_policy

        os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = "BertLayer"
        policy = fsdp_auto_wrap_policy(model)
        return FullyShardedDataParallel(model, use_orig_params=False, auto_wrap_policy=policy, device_id=cpu)
    for layer in model.base_model.model.bert.encoder.layer:  # type: ignore[union-attr]
        for name in ("query", "value"):  # frozen and trained weights cannot share a flat parameter: the pair gets one
            projection = getattr(layer.attention.self, name)
            pair = nn.ModuleDict({"lora_A": projection.lora_A.default, "lora_B": projection.lora_B.default})
            setattr(layer.attention.self, name, FullyShardedDataParallel(pair, use_orig_params=False, device_id=cpu))
    return model


def build(model: nn.Module, who: str) -> torch.optim.Optimizer:
    if who == "PEFT":
        from peft.optimizers import create_loraplus_optimizer

        return create_loraplus_optimizer(model, torch.optim.SGD, lr=LR, loraplus_lr_ratio=RATIO)  # type: ignore[arg-type]
    import loraplus

    optimizer = loraplus.create_optimizer(model, torch.optim.SGD, lr=LR, lr_ratio=RATIO)
    loraplus.verify(model, optimizer, lr_ratio=RATIO, lr=LR)
    return optimizer


def whole_weights(model: nn.Module, wrapping: str) -> dict[str, torch.Tensor]:
    if wrapping.startswith("FSDP1"):
        with FullyShardedDataParallel.summon_full_params(model):
            return {name: p.detach().clone() for name, p in model.named_parameters()}
    return {name: getattr(p, "full_tensor", p.detach)().clone() for name, p in model.named_parameters()}


def worker(rank: int, wrapping: str, who: str, folder: str) -> None:
    from stacks_cases import adapted  # takes seconds to import, which the parent process need not spend

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    model = adapted()
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.fill_(1.0)
    model = wrap(model, wrapping)
    try:
        optimizer = build(model, who)
    except ValueError as error:  # loraplus' refusals; the same on both ranks
        content = {"refused": f"{type(error).__name__}: {error}"}
    else:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        rates: dict[str, list[float]] = {}
        for name, weight in whole_weights(model, wrapping).items():
            clean = name.replace("_fsdp_wrapped_module.", "").removeprefix("module.")
            if clean in trained or (wrapping == "FSDP1-flat" and ".lora_" in clean):
                rates[clean] = sorted({round(value, 9) for value in (1.0 - weight.double()).flatten().tolist()})
        content = {"rates": rates, "empty": sum(not group["params"] for group in optimizer.param_groups)}
    if rank == 0:
        (Path(folder) / "rates.json").write_text(json.dumps(content))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.spawn(worker, tuple(sys.argv[1:4]), nprocs=2)
