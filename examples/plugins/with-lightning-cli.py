"""Lightning's CLI with LoRA+: `python with-lightning-cli.py fit --config with-lightning-cli.yaml`."""

import lightning.pytorch as pl
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from loraplus.integrations.lightning_cli import LoraPlusCLI


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        config = LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
        )
        self.model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))

    def training_step(self, batch, index):
        return self.model(input_ids=batch, labels=batch).loss

    def train_dataloader(self):
        return DataLoader([torch.arange(8).repeat(4) for _ in range(32)], batch_size=4)


if __name__ == "__main__":
    # LightningCLI(Module)
    LoraPlusCLI(Module)
