"""LoRA+ in a loop of your own: `python examples/with-plain-pytorch.py` (docs/migrate/plain-pytorch.md)."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, get_linear_schedule_with_warmup

import loraplus
from loraplus.integrations.pytorch import guard_resume, rates_for_log

STEPS = 30
torch.manual_seed(0)
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
batch = torch.arange(8).repeat(4, 4)  # a sequence that repeats

# optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
optimizer = loraplus.create_optimizer(model, torch.optim.AdamW, lr=2e-3, lr_ratio=16, weight_decay=0.01)
guard_resume(optimizer)  # optimizer.load_state_dict refuses a checkpoint of another ratio
scheduler = get_linear_schedule_with_warmup(optimizer, 3, STEPS)

for step in range(STEPS):
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    if step % 10 == 0:
        print({"loss": round(loss.item(), 4), **rates_for_log(optimizer)})
    scheduler.step()
    optimizer.zero_grad()

print(loraplus.verify(model, optimizer, lr_ratio=16, lr=2e-3))
