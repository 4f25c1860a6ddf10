"""LoRA+ with transformers' Trainer: `python examples/with-transformers.py` (docs/migrate/transformers.md)."""

import tempfile

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import loraplus

torch.manual_seed(0)
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
ids = torch.arange(8).repeat(4)
data = [{"input_ids": ids, "labels": ids} for _ in range(64)]

with tempfile.TemporaryDirectory() as folder:
    args = TrainingArguments(
        folder, learning_rate=2e-3, max_steps=20, warmup_steps=2, logging_steps=5, per_device_train_batch_size=4,
        save_steps=10, report_to=[], disable_tqdm=True, use_cpu=not torch.accelerator.is_available(),
    )  # fmt: skip
    trainer = Trainer(model, args, train_dataset=data)
    # trainer.train()
    loraplus.attach(trainer, lr_ratio=16).train()  # logs lr/lora_A, lr/lora_B; checkpoints hold the rates

print(loraplus.verify(trainer.model, trainer.optimizer, lr_ratio=16, lr=2e-3))
