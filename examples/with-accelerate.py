"""LoRA+ with Accelerate: `accelerate launch examples/with-accelerate.py` (docs/migrate/accelerate.md)."""

import tempfile

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, get_linear_schedule_with_warmup

import loraplus
from loraplus.integrations.accelerate import guard_resume, rates_for_log

torch.manual_seed(0)
accelerator = Accelerator(cpu=not torch.accelerator.is_available(), gradient_accumulation_steps=2)
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
loader = DataLoader([torch.arange(8).repeat(4) for _ in range(64)], batch_size=4)

# optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
optimizer = loraplus.create_optimizer(model, torch.optim.AdamW, lr=2e-3, lr_ratio=16)
scheduler = get_linear_schedule_with_warmup(optimizer, 1, 8)
model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
guard_resume(accelerator, model, optimizer)  # save_state records the rates, load_state refuses others

step = 0
for batch in loader:
    with accelerator.accumulate(model):
        loss = model(input_ids=batch, labels=batch).loss
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if accelerator.sync_gradients:
            step += 1
            rates = rates_for_log(optimizer)
            accelerator.log(rates, step=step)
            accelerator.print(f"step {step}: loss {loss.item():.4f} {rates}")
        scheduler.step()
        optimizer.zero_grad()

with tempfile.TemporaryDirectory() as folder:
    accelerator.save_state(folder)
    accelerator.load_state(folder)
table = loraplus.verify(model, optimizer, lr_ratio=16, lr=2e-3)
accelerator.print(table)
