"""Off: the optimizer is built before the second layer's adapter is unfrozen, so that never learns."""

import torch
from small import loss_of, network

import loraplus

model = network()
model[2].requires_grad_(False)
optimizer = loraplus.create_optimizer(model, torch.optim.AdamW, lr=1e-3, lr_ratio=16)
for name, parameter in model.named_parameters():
    parameter.requires_grad_("lora_" in name)
for _ in range(100):
    loss_of(model).backward()
    optimizer.step()
    optimizer.zero_grad()
