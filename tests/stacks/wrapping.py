"""What one of two processes does: wraps the classifier, trains it on its half of every batch, and tells what it got."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import get_linear_schedule_with_warmup

import loraplus
from loraplus.errors import LoraPlusError, RateMismatchError
from loraplus.roles import clean_name
from stacks.contract import BATCH, EXAMPLES, LR, RATIO, STEPS, WARMUP
from stacks.models import Tokens, classifier


def batches(rank: int, ranks: int) -> list[dict[str, torch.Tensor]]:
    """This rank's part of each of the three batches."""
    data = Tokens()
    rows = [data[index] for index in range(EXAMPLES)]
    labels = torch.tensor([row["labels"] for row in rows])
    found = []
    for start in range(0, EXAMPLES, BATCH):
        mine = slice(start + rank, start + BATCH, ranks)
        ids = data.ids[mine]
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels[mine]})
    return found


# A head's weight and bias lie in one flat parameter, which has one decay: loraplus refuses any but 0 there.
DECAY = {"fsdp1-flat": 0.0}


def optimizer_of(model: torch.nn.Module, weight_decay: float = 0.1) -> torch.optim.Optimizer:
    return loraplus.create_optimizer(model, torch.optim.AdamW, lr=LR, lr_ratio=RATIO, weight_decay=weight_decay)


def ddp() -> tuple[Any, Any]:
    model = torch.nn.parallel.DistributedDataParallel(classifier())
    return model, optimizer_of(model)


def fsdp1(*, use_orig_params: bool, policy: bool, weight_decay: float = 0.1) -> tuple[Any, Any]:
    from peft.utils.other import fsdp_auto_wrap_policy
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = classifier()
    model = FullyShardedDataParallel(
        model, use_orig_params=use_orig_params, device_id=torch.device("cpu"),
        auto_wrap_policy=fsdp_auto_wrap_policy(model) if policy else None,
    )  # fmt: skip
    return model, optimizer_of(model, weight_decay)  # as Trainer does: after wrapping


def fsdp2() -> tuple[Any, Any]:
    from torch.distributed.fsdp import fully_shard

    model = classifier()
    for layer in model.base_model.model.bert.encoder.layer:
        fully_shard(layer)
    fully_shard(model)
    return model, optimizer_of(model)


def deepspeed_on_cpu() -> Any:
    """DeepSpeed without the collectives that it compiles itself: that takes minutes, and a rank that is killed
    meanwhile leaves a lock that all later runs wait for."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def zero(stage: int, **more: Any) -> tuple[Any, Any]:
    deepspeed = deepspeed_on_cpu()
    from loraplus.integrations.deepspeed import check_deepspeed_config

    config = {
        "train_micro_batch_size_per_gpu": BATCH // 2, "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False, **more,
    }  # fmt: skip
    check_deepspeed_config(config)
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    model = classifier()
    engine, optimizer, *_ = deepspeed.initialize(model=model, optimizer=optimizer_of(model), config=config)
    return engine, optimizer


BUILD = {
    "ddp": ddp,
    "fsdp1": lambda: fsdp1(use_orig_params=True, policy=False),
    "fsdp1-flat": lambda: fsdp1(use_orig_params=False, policy=True, weight_decay=DECAY["fsdp1-flat"]),
    "fsdp2": fsdp2,
    "zero1": lambda: zero(1),
    "zero2": lambda: zero(2),
    "zero3": lambda: zero(3),
}


def whole_weights(kind: str, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The trained weights, put together from all processes."""
    if kind.startswith("fsdp1"):
        from torch.distributed.fsdp import FullyShardedDataParallel

        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            return _trained(model)
    if kind == "zero3":
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            return _trained(model)
    return _trained(model)


def _trained(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    values = {clean_name(name): parameter.detach() for name, parameter in model.named_parameters()}
    return {
        name: (value.full_tensor() if hasattr(value, "full_tensor") else value).clone()
        for name, value in values.items()
        if "lora_" in name or "modules_to_save" in name
    }


def train(kind: str) -> dict[str, Any]:
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.manual_seed(0)
    model, optimizer = BUILD[kind]()
    # ZeRO copies the schedule's rates from its own groups.
    scheduler = get_linear_schedule_with_warmup(getattr(optimizer, "optimizer", optimizer), WARMUP, STEPS)
    data = batches(rank, ranks)
    is_zero = kind.startswith("zero")
    for step in range(STEPS):
        loss = model(**data[step % len(data)]).loss
        model.backward(loss) if is_zero else loss.backward()
        if step == 1:
            table = loraplus.verify(model, optimizer, lr_ratio=RATIO, lr=LR)  # in the warm-up
        model.step() if is_zero else optimizer.step()
        scheduler.step()
        None if is_zero else optimizer.zero_grad()
    result = {"rates": table.to_dict()["parameters"], "weights": whole_weights(kind, model)}
    loraplus.verify(model, optimizer, lr_ratio=RATIO, lr=LR)
    for group in optimizer.param_groups:
        if group["name"] == "lora_B":
            group["initial_lr"] = LR
    try:
        loraplus.verify(model, optimizer, lr_ratio=RATIO, lr=LR)
    except RateMismatchError as error:
        result["tampered"] = str(error)
    return result


def flattened_together() -> str:
    """FSDP1 with all factors in one flat parameter: the error."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = classifier()
    for parameter in model.parameters():
        parameter.requires_grad_(True)  # FSDP flattens only what is trained alike
    model = FullyShardedDataParallel(model, use_orig_params=False, device_id=torch.device("cpu"))
    try:
        optimizer_of(model)
    except LoraPlusError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"
