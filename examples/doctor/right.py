"""Right: B learns 16 times as fast as A. `loraplus doctor -- python examples/doctor/right.py`"""

import torch
from small import loss_of, network

import loraplus

model = network()
optimizer = torch.optim.AdamW(loraplus.param_groups(model, lr=1e-3, lr_ratio=16))
scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 4))  # a warm-up from 0
for _ in range(100):
    loss_of(model).backward()
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
