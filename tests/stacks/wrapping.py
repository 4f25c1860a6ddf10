"""What one of two processes does: wraps the classifier, trains it on its half of every batch, and tells what it got."""

from __future__ import annotations

import contextlib
import gc
import math
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import get_linear_schedule_with_warmup

import loraplus
from loraplus.errors import LoraPlusError, RateMismatchError, ResumeMismatchError
from loraplus.integrations.checkpoints import LOOP_WAY, check_resume, rates_in_use, rates_record, roles_of, write_rates
from loraplus.integrations.pytorch import guard_resume, rates_for_log
from loraplus.roles import clean_name
from stacks import loops
from stacks.contract import BATCH, EXAMPLES, LR, RATIO, SAVE_AT, STEPS, WARMUP, Setup, Step, watched
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


def ddp(setup: Setup) -> tuple[Any, Any]:
    model = torch.nn.parallel.DistributedDataParallel(classifier())
    return model, loops.optimizer_of(model, setup)


def fsdp1(setup: Setup, *, use_orig_params: bool, policy: bool) -> tuple[Any, Any]:
    from peft.utils.other import fsdp_auto_wrap_policy
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = classifier()
    model = FullyShardedDataParallel(
        model, use_orig_params=use_orig_params, device_id=torch.device("cpu"),
        auto_wrap_policy=fsdp_auto_wrap_policy(model) if policy else None,
    )  # fmt: skip
    return model, loops.optimizer_of(model, setup)  # as Trainer does: after wrapping


def fsdp2(setup: Setup) -> tuple[Any, Any]:
    from torch.distributed.fsdp import fully_shard

    model = classifier()
    for layer in model.base_model.model.bert.encoder.layer:
        fully_shard(layer)
    fully_shard(model)
    return model, loops.optimizer_of(model, setup)


def deepspeed_on_cpu() -> Any:
    """DeepSpeed without the collectives that it compiles itself: that takes minutes, and a rank that is killed
    meanwhile leaves a lock that all later runs wait for."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def zero(setup: Setup, stage: int) -> tuple[Any, Any]:
    deepspeed = deepspeed_on_cpu()
    from loraplus.integrations.deepspeed import check_deepspeed_config

    config = {
        "train_micro_batch_size_per_gpu": setup.micro_batch // 2, "gradient_accumulation_steps": setup.accumulation,
        "gradient_clipping": setup.clip, "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
    }  # fmt: skip
    check_deepspeed_config(config)
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    model = classifier()
    engine, optimizer, *_ = deepspeed.initialize(model=model, optimizer=loops.optimizer_of(model, setup), config=config)
    return engine, optimizer


BUILD: dict[str, Callable[[Setup], tuple[Any, Any]]] = {
    "ddp": ddp,
    "fsdp1": lambda setup: fsdp1(setup, use_orig_params=True, policy=False),
    "fsdp1-flat": lambda setup: fsdp1(setup, use_orig_params=False, policy=True),
    "fsdp2": fsdp2,
    "zero1": lambda setup: zero(setup, 1),
    "zero2": lambda setup: zero(setup, 2),
    "zero3": lambda setup: zero(setup, 3),
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


class Wrapped:
    """A wrapped model with its optimizer and schedule, trained, saved and loaded in the wrapper's own way."""

    def __init__(self, kind: str, setup: Setup) -> None:
        torch.manual_seed(0)
        self.kind, self.setup = kind, setup
        self.is_zero, self.is_fsdp = kind.startswith("zero"), kind.startswith("fsdp")
        self.model, self.optimizer = BUILD[kind](setup)
        # ZeRO copies the schedule's rates from its own groups.
        self.scheduler = get_linear_schedule_with_warmup(
            getattr(self.optimizer, "optimizer", self.optimizer), WARMUP, STEPS
        )
        if setup.lr_ratio is not None and not self.is_zero:  # DeepSpeed loads a state without the optimizer's hooks
            guard_resume(self.optimizer)

    def backward(self, batch: dict[str, torch.Tensor]) -> None:
        """The gradients of a batch, in parts; only the last part's are exchanged, where the wrapper can wait."""
        parts = self.setup.accumulation
        rows = len(batch["labels"]) // parts
        for part in range(parts):
            last = part == parts - 1
            micro = {key: value[part * rows : (part + 1) * rows] for key, value in batch.items()}
            if self.is_zero:
                self.model.backward(self.model(**micro).loss)
                if not last:
                    self.model.step()  # counts the parts; the optimizer's turn comes with the last
                continue
            if self.kind == "fsdp2":
                self.model.set_requires_gradient_sync(last)
            waits = not last and self.kind != "fsdp2"
            with self.model.no_sync() if waits else contextlib.nullcontext():
                (self.model(**micro).loss / parts).backward()

    def step(self) -> None:
        if self.is_zero:
            self.model.step()
            return
        if self.setup.clip and self.kind.startswith("fsdp1"):
            self.model.clip_grad_norm_(self.setup.clip)  # torch's own would take each rank's shards alone
        elif self.setup.clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.setup.clip)
        self.optimizer.step()

    def save(self) -> None:
        folder, schedule = self.setup.folder, self.scheduler.state_dict()
        if self.is_zero:
            self.model.save_checkpoint(str(folder), client_state={"schedule": schedule})
            if torch.distributed.get_rank() == 0:
                write_rates(folder, rates_record(rates_in_use(self.model, self.optimizer), self.model))
        elif self.is_fsdp:
            from torch.distributed.checkpoint import save

            save({**self._sharded_state(), "schedule": schedule}, checkpoint_id=folder)
        elif torch.distributed.get_rank() == 0:
            folder.mkdir(parents=True)
            parts = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "schedule": schedule}
            torch.save(parts, folder / "checkpoint.pt")
        torch.distributed.barrier()

    def load(self) -> None:
        folder = self.setup.folder
        if self.is_zero:
            check_resume(folder, rates_in_use(self.model, self.optimizer), roles=roles_of(self.model), instead=LOOP_WAY)
            schedule = self.model.load_checkpoint(str(folder))[1]["schedule"]
        elif self.is_fsdp:
            from torch.distributed.checkpoint import load
            from torch.distributed.checkpoint.state_dict import set_model_state_dict, set_optimizer_state_dict

            state = {**self._sharded_state(), "schedule": self.scheduler.state_dict()}
            load(state, checkpoint_id=folder)
            set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"])
            set_model_state_dict(self.model, state["model"])
            schedule = state["schedule"]
        else:
            state = torch.load(folder / "checkpoint.pt")
            self.optimizer.load_state_dict(state["optimizer"])
            self.model.load_state_dict(state["model"])
            schedule = state["schedule"]
        self.scheduler.load_state_dict(schedule)

    def _sharded_state(self) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict import get_state_dict

        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def grad_norm(self, seen: list[Step]) -> float:
        """The norm over all processes, of what their optimizers saw: the whole under DDP, a shard each elsewhere."""
        squares = torch.tensor(sum(each.grad_norm**2 for each in seen), dtype=torch.float64)  # ZeRO: one a group
        if self.kind != "ddp":
            torch.distributed.all_reduce(squares)
        return math.sqrt(float(squares))

    def verify(self) -> dict[str, Any]:
        return loraplus.verify(self.model, self.optimizer, lr_ratio=RATIO, lr=LR).to_dict()["parameters"]

    def tampered(self) -> dict[str, str]:
        """What `verify` says if B's rate is changed now, or at its base."""
        for group in self.optimizer.param_groups:  # the schedule has ended at 0, where no rate differs from another
            group["lr"] = group["initial_lr"] / 2
        self.verify()
        messages = {}
        for key in ("lr", "initial_lr"):
            group = next(group for group in self.optimizer.param_groups if group["name"] == "lora_B")
            before, group[key] = group[key], group[key] / RATIO
            try:
                self.verify()
            except RateMismatchError as error:
                messages[key] = str(error)
            group[key] = before
        self.verify()
        return messages


def train(kind: str, setup: Setup) -> dict[str, Any]:
    """One run: what its steps were at, what it logged, and the weights that it ended with."""
    wrapped = Wrapped(kind, setup)
    data = batches(torch.distributed.get_rank(), torch.distributed.get_world_size())
    result: dict[str, Any] = {"steps": [], "logs": [], "verified": []}
    ours = setup.lr_ratio == RATIO
    if setup.resume:
        try:
            wrapped.load()
        except ResumeMismatchError as error:
            return {**result, "refused": str(error)}
    for step in range(SAVE_AT if setup.resume else 0, STEPS):
        with watched() as seen:
            wrapped.backward(data[step % len(data)])
            wrapped.step()
        rates = {name: rate for each in seen for name, rate in each.rates.items()}  # ZeRO steps group by group
        result["steps"].append(Step(rates, wrapped.grad_norm(seen)))
        result["logs"].append(rates_for_log(wrapped.optimizer))
        if ours and step == 1:
            result["verified"].append(wrapped.verify())  # in the warm-up
        wrapped.scheduler.step()
        None if wrapped.is_zero else wrapped.optimizer.zero_grad()
        if step + 1 == SAVE_AT and not setup.resume and ours:
            wrapped.save()
    result["weights"] = whole_weights(kind, wrapped.model)
    if ours:
        result["verified"].append(wrapped.verify())
        result["tampered"] = wrapped.tampered()
    return result


def runs(kind: str, folder: str) -> dict[str, dict[str, Any]]:
    """All runs that the contract asks for, in one launch; one that fails leaves its error in its place."""
    made: dict[str, dict[str, Any]] = {}
    decay = DECAY.get(kind, 0.1)

    def run(name: str, checkpoint: str, **options: Any) -> None:
        setup = Setup(Path(folder) / checkpoint, **{"weight_decay": decay, **options})
        try:
            made[name] = train(kind, setup)
        except Exception:
            made[name] = {"error": traceback.format_exc()}
        gc.collect()  # wrappers hold cycles

    run("base", "base")
    run("resumed", "base", resume=True)
    run("other_ratio", "base", resume=True, lr_ratio=2.0)
    run("plain", "plain", lr_ratio=None, weight_decay=None)
    run("ratio_one", "ratio_one", lr_ratio=1.0, weight_decay=None)
    run("accumulation", "accumulation", accumulation=2)
    norms = [step.grad_norm for step in made["base"].get("steps", [])]
    if norms:
        run("clip", "clip", clip=min(norms) / 4)
    return made


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
