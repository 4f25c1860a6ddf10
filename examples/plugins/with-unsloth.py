"""Unsloth's trainer with LoRA+: `python examples/plugins/with-unsloth.py`."""

from datasets import load_dataset
from unsloth import FastLanguageModel, UnslothTrainer, UnslothTrainingArguments

import loraplus

model, tokenizer = FastLanguageModel.from_pretrained("unsloth/Qwen2.5-0.5B", max_seq_length=1024)
model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=32)
args = UnslothTrainingArguments(output_dir="out", learning_rate=1e-4, max_steps=100)  # without loraplus_lr_ratio
data = load_dataset("trl-lib/Capybara", split="train")
trainer = UnslothTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer)
loraplus.attach(trainer, lr_ratio=16)  # the one new line
trainer.train()
