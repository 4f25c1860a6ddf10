"""Lightning: checkpoints with automatic rates, of other parameters, after a merge; what its callbacks do to rates."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from torch.utils.data import DataLoader

pl = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")

from stacks.models import Tokens, classifier  # noqa: E402

import loraplus  # noqa: E402
from loraplus.auto import AutoRates  # noqa: E402
from loraplus.errors import RateMismatchError, ResumeMismatchError, TrainerSetupError  # noqa: E402
from loraplus.integrations.lightning import AUTO, RECORD, LoraPlusCallback  # noqa: E402


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
    assert resumed.auto._growth._mean == whole.auto._growth._mean != 0  # of all steps but the first
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


class Fixed(Module):
    """Rates given as numbers; notes λ at every step."""

    def __init__(self, schedule=None, freeze=""):
        super().__init__()
        self.ratios, self.lr, self.schedule = [], 1e-3, schedule
        for name, parameter in self.named_parameters():
            if freeze and freeze in name:
                parameter.requires_grad_(False)

    def training_step(self, batch, index):
        a, b = self.optimizers().param_groups[:2]
        self.ratios.append(round(b["lr"] / a["lr"], 3))
        return super().training_step(batch, index)

    def configure_optimizers(self):
        optimizer = loraplus.create_optimizer(self, lr=self.lr, lr_ratio=16)
        if self.schedule is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.schedule(optimizer), "interval": "step"}}


QUIET = {
    "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
    "enable_checkpointing": False,
}  # fmt: skip


def fitted(module, callbacks, tmp_path, resume=None, epochs=3):
    """The trainer, and what loraplus warned of; three epochs of six steps."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", loraplus.LoraPlusWarning)
        trainer = pl.Trainer(max_epochs=epochs, callbacks=callbacks, default_root_dir=tmp_path, **QUIET)
        trainer.fit(module, DataLoader(Tokens(), batch_size=4), ckpt_path=resume)
    return trainer, [str(entry.message) for entry in caught if entry.category is loraplus.LoraPlusWarning]


def swa():
    return pl.callbacks.StochasticWeightAveraging(1e-4, swa_epoch_start=1, annealing_epochs=1)


def test_weight_averaging_keeps_the_ratio_and_without_the_callback_it_is_told(tmp_path):
    for callbacks in ([LoraPlusCallback(16), swa()], [swa(), LoraPlusCallback(16)]):
        module = Fixed()
        trainer, told = fitted(module, callbacks, tmp_path)
        assert not told and set(module.ratios) == {16.0}
        assert [group["lr"] for group in trainer.optimizers[0].param_groups] == pytest.approx([1e-4, 16e-4, 1e-4])
    module = Fixed()
    (told,) = fitted(module, [swa()], tmp_path)[1]
    assert module.ratios[-1] == 1 and "SWALR did it" in told and "swa_lr=[0.0001, 0.0016, 0.0001]" in told


def finder(**options):
    return pl.callbacks.LearningRateFinder(
        min_lr=1e-5, max_lr=1e-2, num_training_steps=14, early_stop_threshold=None, **options
    )


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_rate_finder_is_told_of_and_the_run_it_leaves_flattened_is_refused(tmp_path):
    for callbacks in ([LoraPlusCallback(16), finder()], [finder(), LoraPlusCallback(16)]):
        with pytest.raises(RateMismatchError, match="LearningRateFinder gives every group one rate"):
            fitted(Fixed(), callbacks, tmp_path)
    module = Fixed()
    (told,) = fitted(module, [finder(update_attr=False), LoraPlusCallback(16)], tmp_path)[1]
    assert "learning-rate finder did it" in told and "plain LoRA" in told
    assert set(module.ratios[-6:]) == {16.0}
    found, left = fitted(Fixed(), [finder()], tmp_path)[1]
    assert "learning-rate finder did it" in found and "no scheduler did it" in left


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_tuner_is_told_of_and_the_run_after_it_has_the_ratio(tmp_path):
    from lightning.pytorch.tuner import Tuner

    module, loader = Fixed(), DataLoader(Tokens(), batch_size=4)
    trainer = pl.Trainer(max_epochs=3, callbacks=[LoraPlusCallback(16)], default_root_dir=tmp_path, **QUIET)
    with pytest.warns(loraplus.LoraPlusWarning, match="learning-rate finder did it"):
        Tuner(trainer).lr_find(module, loader, num_training=14, min_lr=1e-5, max_lr=1e-2, early_stop_threshold=None)
    module.ratios.clear()
    trainer.fit(module, loader)
    assert set(module.ratios) == {16.0}


class ByHand(pl.Callback):
    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            for group in trainer.optimizers[0].param_groups:
                group["lr"] = 2e-4


class Unfreeze(pl.callbacks.BaseFinetuning):
    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.model.base_model.model.bert.encoder.layer[0])

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            layer = pl_module.model.base_model.model.bert.encoder.layer[0]
            adapters = [m for name, m in layer.named_modules() if name.endswith(("lora_A", "lora_B"))]
            self.unfreeze_and_add_param_group(adapters, optimizer)


def test_what_callbacks_do_to_the_groups_is_told_by_step(tmp_path):
    (told,) = fitted(Fixed(), [LoraPlusCallback(16), ByHand()], tmp_path)[1]
    assert told.startswith("at step 7, lora_B is at 1 times") and "no scheduler did it" in told
    (told,) = fitted(Fixed(), [LoraPlusCallback(16), Unfreeze()], tmp_path)[1]
    assert told.startswith("at step 7, ") and "came into group 3 at 1 times the rate of its A" in told


def test_schedules_that_flatten_are_refused_at_the_start_or_told_later_by_name(tmp_path):
    schedulers = torch.optim.lr_scheduler
    with pytest.raises(RateMismatchError, match=re.escape("OneCycleLR did it")):
        fitted(Fixed(lambda o: schedulers.OneCycleLR(o, 1e-3, total_steps=30)), [LoraPlusCallback(16)], tmp_path)
    module = Fixed(lambda o: schedulers.CosineAnnealingLR(o, 18, eta_min=1e-4))
    (told,) = fitted(module, [LoraPlusCallback(16)], tmp_path)[1]
    assert "CosineAnnealingLR(eta_min=0.0001) did it" in told
    module = Fixed(lambda o: schedulers.CosineAnnealingLR(o, 18))
    assert not fitted(module, [LoraPlusCallback(16)], tmp_path)[1] and set(module.ratios) == {16.0}


def test_a_checkpoint_of_other_parameters_is_refused(tmp_path):
    trainer, _ = fitted(Fixed(), [LoraPlusCallback(16)], tmp_path, epochs=1)
    trainer.save_checkpoint(tmp_path / "whole.ckpt")
    fitted(Fixed(), [LoraPlusCallback(16)], tmp_path, str(tmp_path / "whole.ckpt"), epochs=2)
    for pattern, count in (("layer.0", 4), ("lora_A", 4), ("modules_to_save", 2)):
        with pytest.raises(ResumeMismatchError, match=f"other parameters: {count} of its 10 are not trained by this"):
            fitted(Fixed(freeze=pattern), [LoraPlusCallback(16)], tmp_path, str(tmp_path / "whole.ckpt"), epochs=2)


def test_a_checkpoint_saved_after_a_merge_has_the_record_of_the_run(tmp_path):
    module = Fixed()
    trainer, _ = fitted(module, [LoraPlusCallback(16)], tmp_path, epochs=1)
    module.model = module.model.merge_and_unload()
    trainer.save_checkpoint(tmp_path / "merged.ckpt")
    record = torch.load(tmp_path / "merged.ckpt", weights_only=False)[RECORD]
    assert record["lr_ratio"] == 16 and len(record["roles"]) == 10


def test_several_optimizers_are_refused(tmp_path):
    class Two(Fixed):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self):
            return [loraplus.create_optimizer(self, lr=1e-3), loraplus.create_optimizer(self, lr=1e-3)]

    with pytest.raises(TrainerSetupError, match="reads the rates of one optimizer, Two has 2"):
        fitted(Two(), [LoraPlusCallback(16)], tmp_path)


class Adapted(Fixed):
    def __init__(self, **options):
        super().__init__()
        self.model = classifier(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["query"]}, "are not trained by this run"),
        ({"target_modules": ["query", "value", "key"]}, "are not among them"),
        ({"r": 2}, "rank was .* there, 2 here"),
    ],
)
def test_other_target_modules_and_ranks_are_refused_in_one_line_before_lightning_loads_them(options, message, tmp_path):
    trainer, _ = fitted(Adapted(target_modules=["query", "value"]), [LoraPlusCallback(16)], tmp_path, epochs=1)
    trainer.save_checkpoint(tmp_path / "some.ckpt")
    module = Adapted(**{"target_modules": ["query", "value"], **options})
    with pytest.raises(ResumeMismatchError, match=message) as refusal:
        fitted(module, [LoraPlusCallback(16)], tmp_path, resume=str(tmp_path / "some.ckpt"))
    assert "\n" not in str(refusal.value)


def test_the_same_parameters_are_loaded_and_no_hook_is_left(tmp_path):
    trainer, _ = fitted(Adapted(), [LoraPlusCallback(16)], tmp_path, epochs=1)
    trainer.save_checkpoint(tmp_path / "some.ckpt")
    module = Adapted()
    fitted(module, [LoraPlusCallback(16)], tmp_path, resume=str(tmp_path / "some.ckpt"), epochs=2)
    assert not module._load_state_dict_pre_hooks and len(module.ratios) == 6
