"""LoRA+ with Lightning: `python examples/with-lightning.py` (docs/migrate/lightning.md)."""

import lightning.pytorch as pl
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, get_linear_schedule_with_warmup

import loraplus
from loraplus.integrations.lightning import LoraPlusCallback


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        config = LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
        )
        self.model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))

    def training_step(self, batch, index):
        loss = self.model(input_ids=batch, labels=batch).loss
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        # optimizer = torch.optim.AdamW(self.parameters(), lr=2e-3)
        optimizer = loraplus.create_optimizer(self, torch.optim.AdamW, lr=2e-3, lr_ratio=16)
        scheduler = get_linear_schedule_with_warmup(optimizer, 2, self.trainer.estimated_stepping_batches)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


torch.manual_seed(0)
loader = DataLoader([torch.arange(8).repeat(4) for _ in range(32)], batch_size=4)
module = Module()
trainer = pl.Trainer(
    accelerator="auto", devices=1, max_epochs=2, gradient_clip_val=1.0, logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False,
    # callbacks=[],
    callbacks=[LoraPlusCallback(loraplus_lr_ratio=16)],  # proves the rates, logs them, guards checkpoints
)  # fmt: skip
trainer.fit(module, loader)
print({name: float(value) for name, value in trainer.callback_metrics.items()})
print(loraplus.verify(module, trainer.optimizers[0], lr_ratio=16, lr=2e-3))
