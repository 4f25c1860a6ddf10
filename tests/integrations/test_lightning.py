"""Automatic rates in Lightning: the checkpoint holds them, and a resumed run goes on with them."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

pl = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")

from stacks.models import Tokens, classifier  # noqa: E402

import loraplus  # noqa: E402
from loraplus.auto import AutoRates  # noqa: E402
from loraplus.errors import ResumeMismatchError  # noqa: E402
from loraplus.integrations.lightning import AUTO, LoraPlusCallback  # noqa: E402


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = classifier()

    def training_step(self, batch, index):
        return self.model(**batch).loss

    def configure_optimizers(self):
        optimizer = loraplus.create_optimizer(self, torch.optim.AdamW, lr=1.0, lr_ratio=1, lr_head=1e-3)
        self.auto = AutoRates(self, optimizer)
        return optimizer


def trained(folder, resume=None):
    """Four epochs of six steps; a checkpoint after each."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    torch.manual_seed(0)
    checkpoints = ModelCheckpoint(dirpath=folder, filename="{epoch}", every_n_epochs=1, save_top_k=-1)
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=4, logger=False, callbacks=[checkpoints, LoraPlusCallback()],
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    module = Module()
    trainer.fit(module, DataLoader(Tokens(), batch_size=4), ckpt_path=None if resume is None else str(resume))
    return module


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_resumed_run_ends_at_the_rates_and_weights_of_an_uninterrupted_one(tmp_path):
    whole = trained(tmp_path / "whole")
    resumed = trained(tmp_path / "resumed", tmp_path / "whole" / "epoch=1.ckpt")
    assert resumed.auto.steps == whole.auto.steps == 24
    assert (resumed.auto.lr_a, resumed.auto.lr_b) == (whole.auto.lr_a, whole.auto.lr_b)
    for (name, expected), found in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(expected, found), name


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_checkpoint_without_the_state_is_refused(tmp_path):
    trained(tmp_path)
    checkpoint = torch.load(tmp_path / "epoch=1.ckpt", weights_only=False)
    del checkpoint[AUTO]
    torch.save(checkpoint, tmp_path / "part.ckpt")
    with pytest.raises(ResumeMismatchError, match="no state of its automatic rates"):
        trained(tmp_path / "again", tmp_path / "part.ckpt")
