"""Off: the groups are built at lr_ratio 16, and a scheduler with one max_lr gives both the same rate."""

import torch
from small import loss_of, network

import loraplus

model = network()
optimizer = torch.optim.AdamW(loraplus.param_groups(model, lr=1e-3, lr_ratio=16))
scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=100)
for _ in range(100):
    loss_of(model).backward()
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
