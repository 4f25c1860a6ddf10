"""Off: the two factors are swapped, so A learns 16 times as fast as B."""

import torch
from small import loss_of, network

model = network()
groups = [
    {"params": [p for name, p in model.named_parameters() if "lora_A" in name], "lr": 16e-3},
    {"params": [p for name, p in model.named_parameters() if "lora_B" in name], "lr": 1e-3},
]
optimizer = torch.optim.AdamW(groups)
for _ in range(100):
    loss_of(model).backward()
    optimizer.step()
    optimizer.zero_grad()
