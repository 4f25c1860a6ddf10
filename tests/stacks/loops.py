"""Loops of one's own: plain PyTorch, Accelerate, Lightning."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import get_linear_schedule_with_warmup

import loraplus
from loraplus.integrations.pytorch import guard_resume, rates_for_log
from stacks.contract import BATCH, EXAMPLES, SAVE_AT, STEPS, WARMUP, Run, Setup
from stacks.models import Tokens, classifier


def optimizer_of(model: torch.nn.Module, setup: Setup) -> torch.optim.Optimizer:
    if setup.lr_ratio is None:
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=setup.lr)
    return loraplus.create_optimizer(
        model, torch.optim.AdamW, lr=setup.lr, lr_ratio=setup.lr_ratio, weight_decay=setup.weight_decay
    )


def schedule_of(optimizer: Any) -> Any:
    return get_linear_schedule_with_warmup(optimizer, WARMUP, STEPS)


def pytorch(setup: Setup) -> Run:
    model, logs = classifier(), []
    optimizer = optimizer_of(model, setup)
    if setup.lr_ratio is not None:
        guard_resume(optimizer)
    scheduler = schedule_of(optimizer)
    loader = DataLoader(Tokens(), batch_size=setup.micro_batch)
    file, step, micro = setup.folder / "checkpoint.pt", 0, 0
    if setup.resume:
        state = torch.load(file)
        optimizer.load_state_dict(state["optimizer"])
        model.load_state_dict(state["model"])
        scheduler.load_state_dict(state["scheduler"])
        step = SAVE_AT
    while step < STEPS:
        for batch in loader:
            (model(**batch).loss / setup.accumulation).backward()
            micro += 1
            if micro % setup.accumulation:
                continue
            if setup.clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), setup.clip)
            optimizer.step()
            logs.append(rates_for_log(optimizer))
            scheduler.step()
            optimizer.zero_grad()
            step += 1
            if step == SAVE_AT and not setup.resume:
                state = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
                setup.folder.mkdir(parents=True, exist_ok=True)
                torch.save({name: part.state_dict() for name, part in state.items()}, file)
    return Run(model, optimizer, logs)


def accelerate(setup: Setup) -> Run:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.tracking import GeneralTracker

    from loraplus.integrations.accelerate import guard_resume

    class Memory(GeneralTracker):
        name, requires_logging_directory, tracker = "memory", False, None

        def __init__(self) -> None:
            super().__init__()
            self.rows: list[dict[str, float]] = []

        def store_init_configuration(self, values: dict) -> None:
            pass

        def log(self, values: dict, step: int | None = None, **_: Any) -> None:
            self.rows.append(values)

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    memory = Memory()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=setup.accumulation, log_with=memory)
    accelerator.init_trackers("suite")
    model = classifier()
    optimizer = optimizer_of(model, setup)
    scheduler = schedule_of(optimizer)
    loader = DataLoader(Tokens(), batch_size=setup.micro_batch)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    if setup.lr_ratio is not None:
        guard_resume(accelerator, model, optimizer)
    step = 0
    if setup.resume:
        accelerator.load_state(str(setup.folder))
        step = SAVE_AT
    while step < STEPS:
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                if setup.clip and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), setup.clip)
                optimizer.step()
                if accelerator.sync_gradients:
                    accelerator.log(rates_for_log(optimizer), step=step)
                scheduler.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                step += 1
                if step == SAVE_AT and not setup.resume:
                    accelerator.save_state(str(setup.folder))
    return Run(model, optimizer, memory.rows)


def lightning(setup: Setup) -> Run:
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.loggers.logger import DummyLogger

    from loraplus.integrations.lightning import LoraPlusCallback

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = classifier()

        def training_step(self, batch: dict, index: int) -> torch.Tensor:
            return self.model(**batch).loss

        def configure_optimizers(self) -> Any:
            optimizer = optimizer_of(self, setup)
            return [optimizer], [{"scheduler": schedule_of(optimizer), "interval": "step"}]

    class Memory(DummyLogger):
        def __init__(self) -> None:
            super().__init__()
            self.rows: list[dict[str, float]] = []

        def log_metrics(self, metrics: dict, *_: Any, **__: Any) -> None:
            self.rows.append(metrics)

        def __getattr__(self, name: str) -> Any:
            raise AttributeError(name)

    memory = Memory()
    checkpoints = ModelCheckpoint(dirpath=setup.folder, filename="{epoch}", every_n_epochs=1, save_top_k=-1)
    ours = [] if setup.lr_ratio is None else [LoraPlusCallback(setup.lr_ratio)]
    # Counted in epochs: with max_steps Lightning 2.6 takes a batch twice after resuming at an epoch's end.
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=STEPS * BATCH // EXAMPLES, log_every_n_steps=1, logger=memory,
        callbacks=[checkpoints, *ours],
        accumulate_grad_batches=setup.accumulation, gradient_clip_val=setup.clip or None, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    module = Module()
    loader = DataLoader(Tokens(), batch_size=setup.micro_batch)
    trainer.fit(module, loader, ckpt_path=str(setup.folder / "epoch=0.ckpt") if setup.resume else None)
    logs = [{k: float(v) for k, v in row.items() if k.startswith("lr/")} for row in memory.rows]
    return Run(module, trainer.optimizers[0], [row for row in logs if row])
