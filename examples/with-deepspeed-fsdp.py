"""LoRA+ under FSDP2 and DeepSpeed (docs/migrate/deepspeed-fsdp.md).

torchrun --nproc_per_node 2 examples/with-deepspeed-fsdp.py
"""

import os

import torch
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import loraplus
from loraplus.integrations.deepspeed import check_deepspeed_config

if "RANK" not in os.environ:  # started without torchrun: one process
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
else:
    torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()

torch.manual_seed(0)
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
for layer in model.base_model.model.model.layers:
    fully_shard(layer)
fully_shard(model)

# optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
optimizer = loraplus.create_optimizer(model, torch.optim.AdamW, lr=2e-3, lr_ratio=16)
batch = torch.arange(8).repeat(4, 4)
for step in range(10):
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if rank == 0:
        print(f"step {step}: loss {loss.item():.4f}")
table = loraplus.verify(model, optimizer, lr_ratio=16, lr=2e-3)  # after wrapping, in every process

# DeepSpeed: no "optimizer" and no "scheduler" in the JSON; give both to deepspeed.initialize.
zero = {
    "train_micro_batch_size_per_gpu": 4,
    # "optimizer": {"type": "AdamW", "params": {"lr": 2e-3}},
    # "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 2e-3}},
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {"stage": 2},
}
check_deepspeed_config(zero)
# engine, optimizer, _, scheduler = deepspeed.initialize(model=model, optimizer=optimizer, config=zero)

if rank == 0:
    print(table)
torch.distributed.destroy_process_group()
